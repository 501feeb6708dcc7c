"""A few constant examples that a model can read: what is tried on them is known before any private row is."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.errors import InputError

PROBE_EXAMPLES, PROBE_TOKENS = 3, 5  # neither equal nor one, so that a wrong axis shows


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Return what a model reads, of a few constant examples: token ids and their mask, or pixels.

    Raises:
        InputError: if the model reads neither.
    """
    device = next(model.parameters()).device
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (PROBE_EXAMPLES, config.num_channels, height, width)
        # In [-1, 1], and rough: a model sees little of a smooth image.
        pixels = torch.arange(math.prod(shape), device=device) * 7919 % 257 / 128 - 1
        return {"pixel_values": pixels.view(shape)}
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    special = _special_tokens(config)
    usable = [token for token in range(vocabulary) if token not in special][:64]
    if len(usable) < 2:
        raise InputError("Expected a model that reads tokens or pixels, got one without a token embedding")
    positions = torch.arange(PROBE_EXAMPLES * PROBE_TOKENS) % len(usable)
    tokens = torch.tensor(usable)[positions].view(PROBE_EXAMPLES, PROBE_TOKENS).to(device)
    if (end := end_token(model)) is not None:
        tokens[:, -1] = end
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def end_token(model: Any) -> int | None:
    """Return the token at which a classifier reads a text (BART, T5), of which every example must hold one; else None.

    Others read the first token, the last one, or the mean.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = network.config.get_text_config()
    if not network.config.is_encoder_decoder or not hasattr(network, "classification_head"):
        return None
    end = config.eos_token_id
    return end if isinstance(end, int) else None


def _special_tokens(config: Any) -> set[int]:
    """Return the ids that a model's configuration gives a meaning of their own."""
    names = ("pad", "bos", "eos", "sep", "cls", "mask", "decoder_start")
    given = (getattr(config.get_text_config(), f"{name}_token_id", None) for name in names)
    return {token for value in given for token in (value if isinstance(value, list) else [value]) if token is not None}


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode for a while; afterwards each of its modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
