"""The frozen prefix, run once: below the first adapted layer a text always gives the same hidden states.

With adapters in the upper layers only, every step, round and client would repeat the same forward pass through the
lower ones. Here each text passes them once and training starts from what came out: the same numbers up to rounding, for
a fraction of the work. It needs dropout off in the prefix, and an encoder of the BERT family (`embeddings`, then a list
of layers that pass on nothing but hidden states). Others are refused by name: their structure is looked at, and a probe
compares the logits of the two. Legend: N examples, T tokens, H hidden size.
"""

import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapter import HEAD, adapter_parameters
from fedlr.data.tokenise import TokenisedText, collate, micro_batches
from fedlr.errors import InputError


def encode_prefix(model: nn.Module, data: TokenisedText, *, token_budget: int = 4096) -> TokenisedText:
    """Return the texts with the hidden states that enter the first adapted layer, (total T, H) float32.

    Privacy: a function of each text alone, computed where the text is; nothing leaves.

    Raises:
        InputError: if the model has no prefix that can be cut off.
    """
    layers, first = prefix(model)
    hidden = np.empty((int(data.offsets[-1]), _hidden_size(model)), dtype=np.float32)
    caught: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    handle = layers[first].register_forward_pre_hook(stop)
    was_training = model.training
    model.eval()
    try:
        for rows in micro_batches(data.lengths, range(len(data)), token_budget):
            inputs, _ = collate(data, rows)
            try:
                with torch.no_grad():
                    model(**inputs)
            except _Reached:
                states = caught.pop()
            for row, state in zip(rows, states, strict=True):
                start, end = data.offsets[row], data.offsets[row + 1]
                hidden[start:end] = state[: end - start].numpy()
    finally:
        handle.remove()
        model.train(was_training)
    return replace(data, hidden=hidden)


def without_prefix(model: nn.Module) -> nn.Module:
    """Return a copy of the model that starts at its first adapted layer; all tensors are shared with the original.

    The names of all remaining layers stay, so adapters pass between the two unchanged.

    Raises:
        InputError: if the model has no prefix that can be cut off, or is another model without it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    short = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    layers, first = prefix(short)
    for index in range(first):
        layers[index] = _Skipped()
    _encoder_owner(short).embeddings = _Given()
    if not _same_logits(model, short):
        raise InputError(
            f"Expected layers that pass on nothing but hidden states for runtime.cache_prefix=true, got those of "
            f"{_model_type(model)}; set runtime.cache_prefix=false"
        )
    return short


def prefix(model: nn.Module) -> tuple[nn.ModuleList, int]:
    """Return the encoder's layers and the index of the first one with an adapter in or after it.

    Raises:
        InputError: if there is no layer below the adapters, or the model is not of the BERT family.
    """
    owner = _encoder_owner(model)
    layers = cast(nn.ModuleList, cast(nn.Module, owner.encoder).layer)
    names = {id(layer): index for index, layer in enumerate(layers)}
    place = next(path for path, module in model.named_modules() if module is layers)
    adapted = [slot.path for slot in adapter_parameters(model) if slot.role != HEAD]
    inside = [int(path.removeprefix(f"{place}.").split(".")[0]) for path in adapted if path.startswith(f"{place}.")]
    before = [path for path in adapted if ".embeddings." in path]
    first = min(inside, default=len(names))
    if before or not 0 < first < len(names):
        raise InputError(
            "Expected adapters in the upper layers only for runtime.cache_prefix=true, got one in the first layer or "
            "none in any; set adapter.layers, or runtime.cache_prefix=false"
        )
    return layers, first


class _Reached(Exception):
    """The first adapted layer has its input: the rest of the forward pass is not needed."""


class _Skipped(nn.Module):
    """Stands where a frozen layer was, whose work is done."""

    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states


class _Given(nn.Module):
    """Stands where the embeddings were: what comes in as embeddings is what the first adapted layer reads."""

    def forward(self, *_args: object, inputs_embeds: Tensor, **_kwargs: object) -> Tensor:
        return inputs_embeds


def _encoder_owner(model: nn.Module) -> nn.Module:
    for module in model.modules():
        layers = getattr(getattr(module, "encoder", None), "layer", None)
        if isinstance(layers, nn.ModuleList) and isinstance(getattr(module, "embeddings", None), nn.Module):
            return module
    raise InputError(
        f"Expected an encoder of the BERT family for runtime.cache_prefix=true, got {_model_type(model)} without "
        "embeddings and encoder.layer; set runtime.cache_prefix=false"
    )


def _same_logits(model: nn.Module, short: nn.Module) -> bool:
    """Return whether both say the same of two constant texts of different lengths."""
    pad_id = cast(Any, model).config.pad_token_id or 0
    ids, offsets = np.arange(2, 7, dtype=np.int32), np.array([0, 2, 5])
    probe = TokenisedText(ids, offsets, labels=np.zeros(2, dtype=np.int64), pad_id=pad_id, num_truncated=0)
    try:
        cached = encode_prefix(model, probe)
        with torch.no_grad():
            whole, upper = (m(**collate(d, [0, 1])[0]).logits for m, d in ((model, probe), (short, cached)))
    except Exception:  # whatever a foreign forward makes of hidden states that it did not expect
        return False
    return whole.shape == upper.shape and torch.allclose(whole, upper, rtol=1e-3, atol=1e-4)


def _hidden_size(model: nn.Module) -> int:
    return int(cast(Any, _encoder_owner(model)).config.hidden_size)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
