"""Frozen layers run once for pictures: below the first adapted layer a picture always gives the same states.

The same as `fedlr.models.prefix` does for texts, for networks with `embeddings` and a list of layers that pass on
nothing but states: ViT and its kin, and our EfficientNet. A picture has a fixed number of states, so there is no mask.
The states of a ViT-S at 224 pixels are 303 kB a picture in float32: `runtime.base_dtype=bfloat16` halves them, and
`runtime.cache_dir` keeps them on disk. Legend: N pictures, T states of one, H their size, F features of a head.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from fedlr.data.store import Put, TableStore
from fedlr.errors import InputError
from fedlr.models.copies import sharing_tensors
from fedlr.models.prefix import (
    _digest,
    _encoder_owner,
    _evaluating,
    _identity,
    _identity_of_encoder,
    _model_type,
    _one_thread_each,
    _pooled_network,
    _Reached,
    _Skipped,
    _stopping_at,
    prefix,
)
from fedlr.models.zero_head import awake
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.pictures import EncodedImages
from fedlr.tasks.probe import probe_inputs

PICTURES = 32  # of one micro-batch: what rounds alike in every run
GIVEN_STATES = "fedlr_given_states"  # of a model above its prefix: the (T, H) that stand in for a picture


def encode_picture_prefix(
    model: nn.Module, data: EncodedImages, *, num_threads: int = 1, store: TableStore | None = None
) -> EncodedImages:
    """Return the pictures with the states that enter the first adapted layer, (N, T, H) float32 or bfloat16's bits.

    Args:
        model: a PEFT model; only its frozen layers below the first adapted one run.
        data: any pictures of its size.
        num_threads: micro-batches that run at a time, each on one thread; no effect on the result.
        store: where the states stay; None: in memory.

    Privacy: a function of each picture alone, computed where the picture is; nothing leaves. The states are as private
    as the pictures, and so is a store on disk.

    Raises:
        InputError: if the model has no prefix that can be cut off, or the store cannot take its states.
    """
    layers, first = prefix(model)
    with _stopping_at(model, layers[first]):

        def states(inputs: dict[str, Tensor]) -> Tensor:
            try:
                model(**inputs)
            except _Reached as reached:
                return reached.states
            raise AssertionError("a forward pass goes through every layer")

        shape, kind = _shape(states, model)
        key: dict[str, str | int] = {**_pictures(data), "pictures": PICTURES}
        return _encoded(
            states, model, data, lambda: {**_identity(model), **key}, shape, kind, num_threads=num_threads, store=store
        )


def encode_picture_features(
    model: nn.Module, data: EncodedImages, *, num_threads: int = 1, store: TableStore | None = None
) -> EncodedImages:
    """Return the pictures with what the head reads of each, (N, 1, F) float32.

    As `encode_picture_prefix`, for a model that `fedlr.models.prefix.without_encoder` takes whose adapters are zero.
    """
    network = _pooled_network(model)
    key: dict[str, str | int] = {**_pictures(data), "pictures": PICTURES}

    def features(inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = network.features(**inputs)
        return found[:, None].float()

    with _evaluating(model):
        found = _encoded(
            features,
            model,
            data,
            lambda: {**_identity_of_encoder(model), **key},
            (1, network.num_features),
            np.float32,
            num_threads=num_threads,
            store=store,
        )
    return replace(found, reads_features=True)


def without_picture_prefix(model: nn.Module) -> nn.Module:
    """Return a copy of the model that starts at its first adapted layer; all tensors are shared with the original.

    What comes in as `pixel_values` are the states that enter it. The names of all remaining layers stay.

    Raises:
        InputError: if the model has no prefix that can be cut off, or is another model without it.
    """
    short = sharing_tensors(model)
    layers, first = prefix(short)
    for index in range(first):
        layers[index] = _Skipped(layers[index])
    owner = cast(Any, _encoder_owner(short))
    owner.embeddings = _GivenStates(owner.embeddings)
    shape = _same_logits(model, short)
    if shape is None:
        raise InputError(
            f"Expected layers that pass on nothing but states for runtime.cache_prefix=true, got those of "
            f"{_model_type(model)}; set runtime.cache_prefix=false"
        )
    setattr(short, GIVEN_STATES, shape)
    return short


class _GivenStates(nn.Module):
    """Stands where the embeddings were: what comes in as pixels is what the first adapted layer reads."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        patches = getattr(embeddings, "patch_embeddings", None)
        if isinstance(patches, nn.Module):  # ViT asks it for its dtype
            self.patch_embeddings = patches

    def forward(self, pixel_values: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return pixel_values


def _shape(states: Callable[[dict[str, Tensor]], Tensor], model: nn.Module) -> tuple[tuple[int, int], DTypeLike]:
    with torch.inference_mode():
        probe = states(probe_inputs(model))
    if probe.dim() != 3 or probe.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(
            f"Expected states (N, T, H) in float32 or bfloat16 for runtime.cache_prefix=true, got those of "
            f"{_model_type(model)}; set runtime.cache_prefix=false"
        )
    return (probe.shape[1], probe.shape[2]), np.float32 if probe.dtype == torch.float32 else np.uint16


def _encoded(
    run: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    data: EncodedImages,
    key: Callable[[], dict[str, str | int]],
    shape: tuple[int, int],
    kind: DTypeLike,
    *,
    num_threads: int,
    store: TableStore | None,
) -> EncodedImages:
    """Return the pictures with what `run` makes of them, each micro-batch on one thread."""
    device = next(model.parameters()).device
    batches = micro_batches(np.ones(len(data), dtype=np.int64), range(len(data)), PICTURES)

    def put_states(rows: NDArray[np.int64], put: Put) -> None:
        with torch.inference_mode():
            found = run(dict(data.batch(rows).to(device).inputs)).cpu()
        flat = (found.view(torch.uint16) if found.dtype == torch.bfloat16 else found).flatten(1).numpy()
        put(int(rows[0]), flat)  # rows are neighbours: all pictures cost the same

    def fill(put: Put) -> None:
        with _one_thread_each(num_threads) as threads:
            list(threads.map(lambda rows: put_states(rows, put), batches))

    table = (store or TableStore()).table(key, shape=(len(data), shape[0] * shape[1]), dtype=kind, fill=fill)
    return replace(data, hidden=table.reshape(-1, *shape))


def _pictures(data: EncodedImages) -> dict[str, str]:
    """Return the hash of what a model reads of the pictures."""
    processor = data.processor
    return {"pictures_sha256": _digest(*(data.pixels[row] for row in data.rows), repr(processor).encode())}


@torch.no_grad()
def _same_logits(model: nn.Module, short: nn.Module) -> tuple[int, int] | None:
    """Return (T, H) if both say the same of a few constant pictures, else None."""
    model, short = awake(model), awake(short)
    layers, first = prefix(model)
    inputs = probe_inputs(model)
    try:
        with _evaluating(model), _evaluating(short):
            whole = cast(Any, model)(**inputs).logits
            with _stopping_at(model, layers[first]):
                try:
                    cast(Any, model)(**inputs)
                except _Reached as reached:
                    states = reached.states
            upper = cast(Any, short)(pixel_values=states).logits
    except Exception:  # whatever a foreign forward makes of states that it did not expect
        return None
    same = whole.shape == upper.shape and torch.allclose(whole, upper, rtol=1e-3, atol=1e-4)
    return (states.shape[1], states.shape[2]) if same else None
