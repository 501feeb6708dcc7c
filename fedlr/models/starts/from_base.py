"""Rows of lora_A that know the base model: where its layers listen, not where a random draw points.

While only lora_B trains, a layer learns from R of its K inputs' directions, those that lora_A was given. Both rules
here choose them from the frozen base alone, so the rows are public and cost no privacy; lora_B stays zero, so the
function is the base's, and an adapter still opens on the plain base. (PiSSA too starts from singular vectors, but moves
them out of the base: Meng et al. 2024, https://arxiv.org/abs/2404.02948.) The rows are orthonormal.

They come from an SVD, whose last bits are a machine's own: clients are given them when they enrol, and none computes
them anew.
Legend: D out_features, K in_features, R rank, N texts, T tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlr.adapters.factors import row_signs
from fedlr.adapters.state import LORA_A, Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import adapted_layers, read_adapter, write_adapter
from fedlr.streams import Purpose, stream
from fedlr.tasks.pictures import PictureProcessor

WEIGHTS, ACTIVATIONS = "principal", "activations"
NUM_TEXTS, NUM_TOKENS, TEXTS_AT_ONCE = 128, 32, 16  # made up, to see what enters a layer


def inform(model: nn.Module, tokenizer: PreTrainedTokenizerBase | PictureProcessor, source: str, *, seed: int) -> None:
    """Set every lora_A of a PEFT model to rows chosen by its frozen base.

    Args:
        model: with lora_B at zero.
        tokenizer: the model's, or its processor of pictures.
        source: "principal", the leading right singular vectors of each layer's weight: the inputs that it answers most;
            or "activations", the leading principal directions (not centred) of what enters the layer when the model
            reads made-up text, ordinary tokens of its vocabulary drawn at random, or pictures of coloured squares.
        seed: of what is made up.

    Raises:
        InputError: if the weights, or what enters a layer, are not finite.
    """
    if source == WEIGHTS:
        matrices = {path: weight_of(layer.get_base_layer()) for path, layer in adapted_layers(model).items()}
    else:
        if isinstance(tokenizer, PictureProcessor):
            matrices = input_moments(model, made_up_pictures(tokenizer, seed=seed))
        else:
            matrices = input_moments(model, made_up_text(tokenizer, seed=seed))
    directions = principal_rows if source == WEIGHTS else leading_rows
    chosen = {}
    for path, layer in read_adapter(model).factors().items():
        if not torch.isfinite(matrices[path]).all():
            raise InputError(f"Expected finite numbers for adapter.init_lora_weights={source}, got others in {path}")
        rank = len(layer.lora_A)
        chosen[Slot(path, LORA_A)] = directions(matrices[path])[:rank].to(layer.lora_A.dtype)
    write_adapter(model, chosen)


def principal_rows(weight_DK: Tensor) -> Tensor:
    """Return the right singular vectors of a weight as rows, (min(D, K), K) float64, the strongest first.

    The largest entry of each row is positive, so that no library's signs matter.

    >>> principal_rows(torch.tensor([[0.0, -2.0], [1.0, 0.0]])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    return _signed(torch.linalg.svd(weight_DK.double(), full_matrices=False).Vh)


def leading_rows(moment_KK: Tensor) -> Tensor:
    """Return the eigenvectors of a second moment as rows, (K, K) float64, the largest eigenvalue first.

    >>> leading_rows(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    return _signed(torch.linalg.eigh(moment_KK.double()).eigenvectors.T.flip(0))


def made_up_pictures(processor: PictureProcessor, *, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield pictures of 8 x 8 squares of random colours, as a model reads them."""
    generator = stream(seed, Purpose.INIT)
    rows, columns = (np.arange(side) * 8 // side for side in (processor.height, processor.width))
    for _ in range(NUM_TEXTS // TEXTS_AT_ONCE):
        squares = generator.integers(256, size=(TEXTS_AT_ONCE, 8, 8, 3)).astype(np.uint8)
        yield {"pixel_values": processor.pixel_values(squares[:, rows][:, :, columns])}


def made_up_text(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield model inputs of random ordinary tokens: text that nobody wrote, the same for every run of a seed."""
    drawn = stream(seed, Purpose.INIT)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    for _ in range(NUM_TEXTS // TEXTS_AT_ONCE):
        ids = drawn.choice(ordinary, size=(TEXTS_AT_ONCE, NUM_TOKENS))
        texts = [str(tokenizer.decode(row)) for row in ids.tolist()]
        length = min(2 * NUM_TOKENS, tokenizer.model_max_length)  # pieces of words may be cut into more of them
        yield tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")


@torch.no_grad()
def input_moments(model: nn.Module, batches: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of x x^T over all tokens that enter each adapted layer, (K, K) float64 by path; no padding."""
    moments = {
        path: torch.zeros((layer.lora_A.shape[1],) * 2, dtype=torch.float64)
        for path, layer in read_adapter(model).factors().items()
    }
    with watching(model) as entered:
        for inputs in batches:
            model(**inputs)
            mask = inputs.get("attention_mask")  # pictures have no padding
            for path, moment in moments.items():
                # A layer behind the choice of one token sees (N, K): no token of it is padding.
                x = entered[path]
                x_NK = x.flatten(0, -2) if x.dim() == 2 or mask is None else x[mask.bool()]
                moment += x_NK.double().T @ x_NK.double()
    return moments


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let a dictionary hold what entered each adapted layer last, by path; no hook stays behind."""
    entered: dict[str, Tensor] = {}

    def watch(path: str, layer: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            entered[path] = arguments[0]

        return layer.register_forward_pre_hook(keep)

    modules = dict(model.named_modules())
    hooks = [watch(path, modules[path]) for path in adapted_layers(model)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight, (D, K); that of GPT-2's lies the other way round."""
    weight = cast(Tensor, layer.weight).detach()
    return weight if isinstance(layer, nn.Linear) else weight.T


def _signed(rows: Tensor) -> Tensor:
    return rows * row_signs(rows)
