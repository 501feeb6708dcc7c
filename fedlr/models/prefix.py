"""The frozen prefix, run once: below the first adapted layer a text always gives the same hidden states.

With adapters in the upper layers only, every step, round and client would repeat the same forward pass through the
lower ones. Here each text passes them once and training starts from what came out, for a fraction of the work. It needs
dropout off in the prefix, and an encoder of the BERT family (`embeddings`, then a list of layers that pass on nothing
but hidden states). Others are refused by name: their structure is looked at, and a probe compares the logits of the
two.

Notable choices:
- A cached state has the bits that the layers gave, in the type they compute in. In float32 the model above the prefix
  gives the logits of the whole one to the bit where both see the same micro-batch; in micro-batches of other shapes a
  matrix product rounds otherwise, cached or not.
- Each micro-batch passes on one thread, several at a time, so the states do not depend on the number of threads.
- numpy has no bfloat16: such states are kept as uint16, the same bits (`collate` gives them their type back).
- Where nothing but the head trains, and the features are pooled by us (`fedlr.models.pooling`), the prefix is the whole
  encoder: a text becomes one row, what the head reads, as if it had one token.

Legend: N examples, T tokens, H hidden size, F features of a text (H + 1).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlr.adapters.state import HEAD
from fedlr.data.store import Put, TableStore
from fedlr.errors import InputError
from fedlr.models.copies import sharing_tensors
from fedlr.models.peft_state import adapter_parameters
from fedlr.models.pooling import PooledClassifier
from fedlr.models.products import library_in
from fedlr.models.zero_head import awake
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.tokenise import TokenisedText

# What an encoder of this family calls its layers.
_LAYER_LISTS = ("encoder.layer", "transformer.layer", "layers")
# Entries of a model's configuration that no hidden state depends on; a run with another head finds its states again.
_NO_MATTER = ("id2label", "label2id", "num_labels", "problem_type", "initializer_range", "_name_or_path")


def encode_prefix(
    model: nn.Module,
    data: TokenisedText,
    *,
    token_budget: int = 1024,
    num_threads: int = 1,
    store: TableStore | None = None,
) -> TokenisedText:
    """Return the texts with the hidden states that enter the first adapted layer.

    Args:
        model: a PEFT model; only its frozen layers below the first adapted one run.
        data: any texts.
        token_budget: tokens of one micro-batch, padding included.
        num_threads: micro-batches that run at a time, each on one thread; no effect on the result.
        store: where the states stay; None: in memory.

    Returns:
        `data` with `hidden`, (total T, H): float32, or uint16 that holds bfloat16.

    Privacy: a function of each text alone, computed where the text is; nothing leaves. The states are as private as the
    texts, and so is a store on disk.

    Raises:
        InputError: if the model has no prefix that can be cut off, or the store cannot take its states.
    """
    layers, first = prefix(model)
    dtype = next(layers[0].parameters()).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"Expected a base in float32 or bfloat16 for runtime.cache_prefix=true, got {dtype}")
    batches = micro_batches(data.lengths, range(len(data)), token_budget)

    def key() -> dict[str, str | int]:
        return {**_identity(model), **_texts(data), "token_budget": token_budget}

    def fill(put: Put) -> None:
        with _stopping_at(model, layers[first]), _one_thread_each(num_threads) as threads:
            # A list: an error of any micro-batch is raised here.
            list(threads.map(lambda rows: _put_states(model, data, rows, put), batches))

    shape = (int(data.offsets[-1]), _hidden_size(model))
    kind = np.float32 if dtype == torch.float32 else np.uint16
    return replace(data, hidden=(store or TableStore()).table(key, shape=shape, dtype=kind, fill=fill))


def encode_features(
    model: nn.Module,
    data: TokenisedText,
    *,
    token_budget: int = 1024,
    num_threads: int = 1,
    store: TableStore | None = None,
) -> TokenisedText:
    """Return the texts as rows of one token each, whose hidden state is what the head reads: (N, F) float32.

    As `encode_prefix`, for a model that `without_encoder` takes whose adapters are zero, and the same of privacy.
    """
    network = _pooled_network(model)
    batches = micro_batches(data.lengths, range(len(data)), token_budget)

    def key() -> dict[str, str | int]:
        return {**_identity_of_encoder(model), **_texts(data), "token_budget": token_budget}

    def put_features(rows: NDArray[np.int64], put: Put) -> None:
        with torch.inference_mode():
            features = network.features(**_inputs(model, data, rows)).cpu().float().numpy()
        for row, feature in zip(rows, features, strict=True):
            put(int(row), feature[None])

    def fill(put: Put) -> None:
        with _evaluating(model), _one_thread_each(num_threads) as threads:
            list(threads.map(lambda rows: put_features(rows, put), batches))

    shape = (len(data), network.num_features)
    hidden = (store or TableStore()).table(key, shape=shape, dtype=np.float32, fill=fill)
    ids, offsets = np.full(len(data), data.pad_id, dtype=np.int32), np.arange(len(data) + 1, dtype=np.int64)
    return replace(data, ids=ids, offsets=offsets, token_type_ids=None, hidden=hidden)


def without_encoder(model: nn.Module) -> nn.Module:
    """Return a copy of the model that reads features, as `encode_features` makes them; all tensors are shared.

    Names stay, so adapters pass between the two unchanged; layers of the encoder have no part in what it computes.

    Raises:
        InputError: if the model's features are not pooled by us.
    """
    short = sharing_tensors(model)
    _pooled_network(short).reads_features = True
    return short


def without_prefix(model: nn.Module) -> nn.Module:
    """Return a copy of the model that starts at its first adapted layer; all tensors are shared with the original.

    The names of all remaining layers stay, so adapters pass between the two unchanged.

    Raises:
        InputError: if the model has no prefix that can be cut off, or is another model without it.
    """
    short = sharing_tensors(model)
    layers, first = prefix(short)
    for index in range(first):
        layers[index] = _Skipped(layers[index])
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
    layers = cast(nn.ModuleList, _layer_list(owner))
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
    """The first adapted layer has its input, and the rest of the forward pass is not needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Skipped(nn.Module):
    """Stands where a frozen layer was, whose work is done."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # ModernBERT asks every layer for its mask

    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states


class _Given(nn.Module):
    """Stands where the embeddings were: what comes in as embeddings is what the first adapted layer reads."""

    def forward(self, input_ids: None = None, inputs_embeds: Any = None, *_args: object, **_kwargs: object) -> Any:
        return inputs_embeds


@contextmanager
def _stopping_at(model: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Let a forward pass of the model end where it would enter a layer."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        with _evaluating(model):
            yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _one_thread_each(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Give workers in which torch uses one thread an operation, and what it had before to everybody else after."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, "prefix", initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def _put_states(model: nn.Module, data: TokenisedText, rows: NDArray[np.int64], put: Put) -> None:
    _put_rows(_states(model, _inputs(model, data, rows)), data.offsets, rows, put)


def _states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what enters the layer that `_stopping_at` watches, (N, T, H)."""
    try:
        with torch.inference_mode():
            model(**inputs)
    except _Reached as reached:
        return reached.states
    raise AssertionError("a forward pass goes through every layer")


def _put_rows(states: Tensor, offsets: NDArray[np.int64], rows: NDArray[np.int64], put: Put) -> None:
    """Put the states of some rows, (N, T, H), where their tokens lie, without the padding."""
    states = states.cpu()
    flat = (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()
    for row, state in zip(rows, flat, strict=True):
        start, end = offsets[row], offsets[row + 1]
        put(int(start), state[: end - start])


def _inputs(model: nn.Module, data: TokenisedText, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in data.batch(rows)[0].items()}


def _identity(model: nn.Module) -> dict[str, str | int]:
    """Return all that hidden states depend on beside the texts: tensors and shape of the prefix, and who computes."""
    layers, first = prefix(model)
    owner = _encoder_owner(model)
    tensors = [
        (f"{index} {name}", tensor)
        for index, part in enumerate([cast(nn.Module, owner.embeddings), *layers[:first]])
        for name, tensor in sorted([*part.named_parameters(), *part.named_buffers()])
    ]
    return {**_computed_by(model, cast(Any, owner).config, tensors), "num_layers": first}


def _identity_of_encoder(model: nn.Module) -> dict[str, str | int]:
    """Return the same of features: tensors and shape of the encoder, and how it is pooled."""
    network = _pooled_network(model)
    adapter = {
        id(parameter) for parameter in adapter_parameters(model).values()
    }  # changes nothing: see encode_features
    named = [*network.base_model.named_parameters(), *network.base_model.named_buffers()]
    tensors = sorted(((name, tensor) for name, tensor in named if id(tensor) not in adapter), key=lambda one: one[0])
    return {**_computed_by(model, network.config, tensors), "pooling": network.pooling}


def _computed_by(model: nn.Module, config: Any, tensors: list[tuple[str, Tensor]]) -> dict[str, str | int]:
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
    return {
        "prefix": _digest(*(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy() for _, tensor in tensors)),
        "names": _digest(json.dumps([(name, str(t.dtype), list(t.shape)) for name, t in tensors]).encode()),
        "settings": _digest(json.dumps([settings, config._attn_implementation], sort_keys=True, default=str).encode()),
        "model_type": _model_type(model),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(next(model.parameters()).device),
        **_library(model),
    }


def _library(model: nn.Module) -> dict[str, str]:
    """Return which library multiplies, where it is not PyTorch's default, whose tables have no such key."""
    return {"matmul": "onednn"} if any(library_in(module) == "onednn" for module in model.modules()) else {}


def _processor(device: torch.device) -> str:
    """Return what decides which kernels run."""
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _texts(data: TokenisedText) -> dict[str, str]:
    """Return the hashes of what a model reads of the texts."""
    types = {} if data.token_type_ids is None else {"token_types": _digest(data.token_type_ids)}
    return {"texts": _digest(data.ids, data.offsets), **types}


def _digest(*parts: bytes | NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def _pooled_network(model: nn.Module) -> Any:
    """Return the classifier of `fedlr.models.pooling` inside a PEFT model."""
    for module in model.modules():
        if isinstance(module, PooledClassifier):
            return module
    raise InputError(f"Expected features pooled by model.pooling to cache them, got {_model_type(model)} without")


def _layer_list(module: nn.Module) -> nn.ModuleList | None:
    for path in _LAYER_LISTS:
        found: object = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    return None


def _encoder_owner(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if _layer_list(module) is not None and isinstance(getattr(module, "embeddings", None), nn.Module):
            return module
    raise InputError(
        f"Expected an encoder of the BERT family for runtime.cache_prefix=true, got {_model_type(model)} without "
        "embeddings and a list of layers; set runtime.cache_prefix=false"
    )


def _same_logits(model: nn.Module, short: nn.Module) -> bool:
    """Return whether both say the same of two constant texts of different lengths."""
    pad_id = cast(Any, model).config.pad_token_id or 0
    ids, offsets = np.arange(2, 7, dtype=np.int32), np.array([0, 2, 5])
    probe = TokenisedText(ids, offsets, labels=np.zeros(2, dtype=np.int64), pad_id=pad_id, num_truncated=0)
    rows = np.arange(len(probe))
    model, short = awake(model), awake(short)
    try:
        cached = encode_prefix(model, probe)
        with torch.no_grad():
            whole, upper = (m(**_inputs(m, d, rows)).logits for m, d in ((model, probe), (short, cached)))
    except Exception:  # whatever a foreign forward makes of hidden states that it did not expect
        return False
    return whole.shape == upper.shape and torch.allclose(whole, upper, rtol=1e-3, atol=1e-4)


def _hidden_size(model: nn.Module) -> int:
    return int(cast(Any, _encoder_owner(model)).config.hidden_size)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
