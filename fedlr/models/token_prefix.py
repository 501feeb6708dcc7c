"""The frozen prefix of a language model, run once: below the first adapted layer tokens always give the same states.

As `fedlr.models.prefix` does for encoders, for decoders that begin with `embed_tokens` and have a list of `layers` that
pass on nothing but hidden states: Llama, Qwen, Gemma, Mistral and their kin. What a family does to its embeddings
before the first layer (Granite multiplies them) would be done to the states again: a probe compares the logits of the
two models, and such a model is refused by name. It pays where a row is read more than once: by several rounds, or, with
`runtime.cache_dir`, by several seeds or methods. Legend: N examples, T tokens, H hidden size.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlr.adapters.state import HEAD
from fedlr.data.store import Put, TableStore
from fedlr.errors import InputError
from fedlr.models.copies import sharing_tensors
from fedlr.models.peft_state import adapter_parameters
from fedlr.models.prefix import (
    _computed_by,
    _digest,
    _evaluating,
    _model_type,
    _one_thread_each,
    _put_rows,
    _Skipped,
    _states,
    _stopping_at,
)
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.probe import probe_inputs
from fedlr.tasks.tokenised_turns import TokenisedTurns


def encode_token_prefix(
    model: nn.Module,
    data: TokenisedTurns,
    *,
    token_budget: int = 1024,
    num_threads: int = 1,
    store: TableStore | None = None,
) -> TokenisedTurns:
    """Return the conversations with the hidden states that enter the first adapted layer.

    Args:
        model: a PEFT model; only its frozen layers below the first adapted one run.
        data: any conversations.
        token_budget: tokens of one micro-batch, padding included.
        num_threads: micro-batches that run at a time, each on one thread; no effect on the result.
        store: where the states stay; None: in memory.

    Returns:
        `data` with `hidden`, (total T, H): float32, or uint16 that holds bfloat16.

    Privacy: a function of each conversation alone, computed where it is; nothing leaves. The states are as private as
    the conversations, and so is a store on disk.

    Raises:
        InputError: if the model has no prefix that can be cut off, or the store cannot take its states.
    """
    owner, first = _prefix(model)
    dtype = next(owner.layers[0].parameters()).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"Expected a base in float32 or bfloat16 for runtime.cache_prefix=true, got {dtype}")
    batches = micro_batches(data.lengths, range(len(data)), token_budget)

    def key() -> dict[str, str | int]:
        return {**_identity(model), "texts": _digest(data.ids, data.offsets), "token_budget": token_budget}

    def put_states(rows: NDArray[np.int64], put: Put) -> None:
        inputs = data.batch(rows).to(next(model.parameters()).device).inputs
        _put_rows(_states(model, inputs), data.offsets, rows, put)

    def fill(put: Put) -> None:
        with _stopping_at(model, owner.layers[first]), _one_thread_each(num_threads) as threads:
            list(threads.map(lambda rows: put_states(rows, put), batches))  # a list: an error of any is raised here

    shape = (int(data.offsets[-1]), int(owner.config.hidden_size))
    kind = np.float32 if dtype == torch.float32 else np.uint16
    return replace(data, hidden=(store or TableStore()).table(key, shape=shape, dtype=kind, fill=fill))


def without_token_prefix(model: nn.Module) -> nn.Module:
    """Return a copy of the model that starts at its first adapted layer; all tensors are shared with the original.

    What comes in as `inputs_embeds` are the states that enter it. The names of all remaining layers stay.

    Raises:
        InputError: if the model has no prefix that can be cut off, or is another model without it.
    """
    short = sharing_tensors(model)
    owner, first = _prefix(short)
    for index in range(first):
        owner.layers[index] = _Skipped(owner.layers[index])
    if not _same_logits(model, short):
        raise InputError(
            "Expected a language model whose layers pass on nothing but hidden states, and whose embeddings are all "
            f"that stands before them, for runtime.cache_prefix=true, got {_model_type(model)}; set "
            "runtime.cache_prefix=false"
        )
    return short


def reads_tokens_in_order(model: nn.Module) -> bool:
    """Return whether a PEFT model is one of a language model, whose prefix is cut off here."""
    config: Any = getattr(model, "peft_config", {}).get("default")
    return getattr(config, "task_type", None) == "CAUSAL_LM"


def _prefix(model: nn.Module) -> tuple[Any, int]:
    """Return the body with its layers, and the index of the first one with an adapter in or after it."""
    network = cast(Any, model)
    body = (network.get_base_model() if hasattr(network, "get_base_model") else network).base_model
    layers, embeddings = getattr(body, "layers", None), getattr(body, "embed_tokens", None)
    if not (isinstance(layers, nn.ModuleList) and isinstance(embeddings, nn.Module)):
        raise InputError(
            "Expected a language model with embed_tokens and a list of layers for runtime.cache_prefix=true, got "
            f"{_model_type(model)}; set runtime.cache_prefix=false"
        )
    place = next(path for path, module in model.named_modules() if module is layers)
    adapted = [slot.path for slot in adapter_parameters(model) if slot.role != HEAD]
    inside = [int(path.removeprefix(f"{place}.").split(".")[0]) for path in adapted if path.startswith(f"{place}.")]
    first = min(inside, default=len(layers))
    if len(inside) < len(adapted) or not 0 < first < len(layers):
        raise InputError(
            "Expected adapters in the upper layers only for runtime.cache_prefix=true, got one in the first layer or "
            "below, or none in any; set adapter.layers, or runtime.cache_prefix=false"
        )
    return body, first


def _identity(model: nn.Module) -> dict[str, str | int]:
    """Return all that hidden states depend on beside the tokens: tensors and shape of the prefix, and who computes."""
    owner, first = _prefix(model)
    parts = [owner.embed_tokens, *owner.layers[:first]]
    tensors = [
        (f"{index} {name}", tensor)
        for index, part in enumerate(parts)
        for name, tensor in sorted([*part.named_parameters(), *part.named_buffers()])
    ]
    return {**_computed_by(model, owner.config, tensors), "num_layers": first}


@torch.no_grad()
def _same_logits(model: nn.Module, short: nn.Module) -> bool:
    """Return whether both say the same of a few constant tokens, of rows of unequal length."""
    owner, first = _prefix(model)
    inputs = probe_inputs(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[-1, mask.shape[1] // 2 :] = 0
    inputs["attention_mask"] = mask
    try:
        with _evaluating(model), _evaluating(short):
            whole = cast(Any, model)(**inputs).logits
            with _stopping_at(model, owner.layers[first]):
                states = _states(model, inputs).clone()
            upper = cast(Any, short)(inputs_embeds=states, attention_mask=mask).logits
    except Exception:  # whatever a foreign forward makes of states that it did not expect
        return False
    real = mask.bool()
    return whole.shape == upper.shape and torch.allclose(whole[real], upper[real], rtol=1e-3, atol=1e-4)
