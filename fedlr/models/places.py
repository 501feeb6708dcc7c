"""Which layers of a network an adapter goes on, and which are its head: found before PEFT passes anything over."""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlr.errors import InputError
from fedlr.models.adapter_config import AdapterConfig

LINEAR = (nn.Linear, Conv1D)  # Conv1D: GPT-2's linear layer, its weight the other way round
ALL_LINEAR = "all-linear"
PEFT_HEADS = ("classifier", "score")  # of PEFT 0.21's classifiers: saved and trained whole, told by these endings


def head_modules(network: PreTrainedModel, absent: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the modules of a classifier's head besides those that PEFT knows by name.

    Where PEFT knows none (T5, BART, XLNet), it is all that stands beside the base model. Where it does, it is what else
    was drawn because the checkpoint lacked it (the pooler of DeBERTa, the dense layer of ModernBERT): a base model
    loaded anew would draw another. Absent tensors of one repeated value, as in a layer norm, are the same everywhere.
    """
    body = network.base_model
    outside = {name: child for name, child in network.named_children() if child is not body}
    if not any(path.endswith(PEFT_HEADS) for path, _ in network.named_modules()):
        return tuple(sorted(name for name, child in outside.items() if any(True for _ in child.parameters())))
    tensors = dict(network.named_parameters())
    found = set()
    for name in absent:
        module = name.rpartition(".")[0]
        tensor = tensors.get(name)
        if tensor is None or name.split(".")[0] not in outside or in_head(module, PEFT_HEADS):
            continue
        if not bool((tensor == tensor.reshape(-1)[0]).all()):
            found.add(module)
    return tuple(sorted(found))


def last_layer(network: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the path and the layer of a classifier's head that gives the logits: its last linear layer.

    Raises:
        InputError: if the head has none.
    """
    layers = [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[0] != network.base_model_prefix
    ]
    num_labels = network.config.num_labels
    layers = [(path, module) for path, module in layers if module.out_features == num_labels] or layers
    if not layers:
        raise InputError(
            f"Expected a head with a linear layer for model.head_std=0, got {type(network).__name__}; set "
            "model.head_std=null"
        )
    return layers[-1]


def in_head(path: str, heads: Sequence[str]) -> bool:
    """Return whether a module is one of the heads or lies in one, by PEFT's rule: the end of a path.

    >>> in_head("classifier.dense", PEFT_HEADS), in_head("bert.encoder.layer.0.output.dense", PEFT_HEADS)
    (True, False)
    """
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(tuple(heads)) for end in range(1, len(parts) + 1))


def check_places(network: nn.Module, source: str, config: AdapterConfig, *, heads: Sequence[str]) -> None:
    """Refuse what PEFT passes over in silence, or allocates: a name or layer without a match, a head, a huge rank.

    Args:
        network: without an adapter.
        source: what it is called.
        config: of the adapter.
        heads: endings of the paths of the head's modules, PEFT's included.

    Raises:
        InputError: naming the key, the value and what fits.
    """
    modules = dict(network.named_modules())
    limit = max((min(m.weight.shape) for m in modules.values() if isinstance(m, LINEAR)), default=0)
    if config.rank > limit:
        raise InputError(f"Expected adapter.rank <= {limit}, the smaller side of a layer, got {config.rank}")
    known = ", ".join(linear_names(network, heads))
    targets = config.target_modules
    if isinstance(targets, str):
        if targets != ALL_LINEAR:
            matched = [path for path in modules if path and re.fullmatch(targets, path)]
            _check_matched(targets, [path for path in matched if in_head(path, heads)][:1], modules, heads, known)
            _check_matched(targets, matched, modules, heads, known)
    else:
        for name in targets:
            matched = [path for path in modules if path == name or path.endswith(f".{name}")]
            if not matched:
                raise InputError(
                    f"Expected adapter.target_modules to name layers of {source}, such as {known}, got {name!r}"
                )
            _check_matched(name, matched, modules, heads, known)
    numbers = {int(part) for path in modules for part in path.split(".") if part.isdecimal()}
    if strangers := sorted(set(config.layers or []) - numbers):
        raise InputError(f"Expected adapter.layers in 0 to {max(numbers, default=0)}, got {strangers[0]}")


def linear_names(network: nn.Module, heads: Sequence[str] = PEFT_HEADS) -> list[str]:
    """Return the distinct last names of the network's linear layers below the head: what target_modules may name."""
    layers = (path for path, m in network.named_modules() if isinstance(m, LINEAR) and not in_head(path, heads))
    return sorted({path.rsplit(".", 1)[-1] for path in layers})


def _check_matched(
    target: str, matched: Sequence[str], modules: dict[str, nn.Module], heads: Sequence[str], known: str
) -> None:
    """Refuse a name or pattern that stands for the head alone, or for something that is no linear layer."""
    body = [path for path in matched if not in_head(path, heads)]
    if matched and not body:
        raise InputError(
            f"Expected adapter.target_modules without the head, got {target!r}, which is {matched[0]}: a head trains "
            f"whole, with adapter.train_head=true; layers for adapters are {known}"
        )
    others = [path for path in body if not isinstance(modules[path], LINEAR)]
    if others:
        raise InputError(
            f"Expected adapter.target_modules to name linear layers, such as {known}, got {target!r}, which is "
            f"{others[0]} ({type(modules[others[0]]).__name__})"
        )
