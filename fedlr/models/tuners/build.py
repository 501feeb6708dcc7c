"""A tuner on a model: which parameters train, which frozen parts exist, and how a server's parts are loaded.

Parts are all tensors that PEFT hung on the model beside the trained ones: frozen parameters, buffers (saved or not)
and tensors in plain dictionaries of its layers, which no `state_dict` shows.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.models.starts.tuner_starts import PublicBatch
from fedlr.models.tuners.entry import Tuner, matches

_Place = tuple[MutableMapping[str, Any], str]


def build(
    model: nn.Module,
    tuner: Tuner,
    *,
    public: PublicBatch | None = None,
    client: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Adapt a model in place and let exactly the tuner's blocks train.

    Args:
        model: a model without an adapter.
        tuner: an entry of the registry.
        public: for a tuner whose start is made from data.
        client: build what a client builds, before it loads what the server ships.
        arguments: for the PEFT configuration, `target_modules` among them.

    Returns:
        PEFT's own model around it (a `LoraModel`, `VeraModel`, ...), in train mode as the tuner allows.

    Raises:
        InputError: if a start needs public data and none is given, or PEFT trains a tensor that no block names.
    """
    config = tuner.peft_config(client=client, **arguments)
    if tuner.start is None or client:
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False).base_model
    elif public is None:
        raise InputError(f"Expected a public batch for the start of {tuner.title}, got none")
    else:
        adapted = tuner.start(model, config, public).base_model
    trained = trained_parameters(adapted, tuner)
    adapted.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return train_mode(adapted, tuner)


def trained_parameters(model: nn.Module, tuner: Tuner) -> dict[Slot, nn.Parameter]:
    """Return every parameter of the tuner's blocks by (dotted name, block), sorted.

    Raises:
        InputError: if a block has no tensor, or PEFT trains a tensor that the registry does not name.
    """
    found: dict[Slot, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        block = tuner.block_of(name)
        if block is not None:
            found[Slot(name, block)] = parameter
        elif parameter.requires_grad and not matches(name, tuner.frozen):
            raise InputError(f"Expected {tuner.title} to train the blocks {sorted(tuner.blocks)}, got {name} besides")
    empty = sorted(set(tuner.blocks) - {slot.role for slot in found})
    if empty:
        raise InputError(f"Expected {tuner.title} to have tensors in every block, got none in {empty[0]}")
    return dict(sorted(found.items()))


def train_mode(model: nn.Module, tuner: Tuner) -> nn.Module:
    """Put a model in train mode, but for the modules that the tuner holds in eval mode."""
    model.train()
    for module in model.modules():
        if type(module).__name__ in tuner.held:
            module.eval()
    return model


def frozen_parts(model: nn.Module) -> dict[str, Tensor]:
    """Return every frozen tensor by its name: parameters, buffers, and what layers of PEFT keep in dictionaries."""
    return {name: place[key] for name, (place, key) in _places(model).items()}


def shipped_parts(model: nn.Module, tuner: Tuner) -> dict[str, Tensor]:
    """Return copies of the frozen tensors that the server sends once.

    Raises:
        ValueError: if a pattern of the entry finds nothing.
    """
    parts = frozen_parts(model)
    for pattern in tuner.ships:
        if not any(matches(name, (pattern,)) for name in parts):
            raise ValueError(f"Expected a frozen tensor named {pattern} in {tuner.title}, got none")
    return {name: tensor.detach().clone() for name, tensor in parts.items() if matches(name, tuner.ships)}


def load_parts(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Write frozen tensors into a model that has them.

    Raises:
        ValueError: if the model has no such tensor, or one of another shape.
    """
    places = _places(model)
    for name, tensor in parts.items():
        place, key = places.get(name, ({}, name))
        if key not in place or place[key].shape != tensor.shape:
            raise ValueError(f"Expected a frozen tensor that the model has, got {name} of shape {tuple(tensor.shape)}")
        if isinstance(place[key], nn.Parameter):
            with torch.no_grad():
                place[key].copy_(tensor)
        else:
            place[key] = tensor.to(place[key].dtype).clone()


def _places(model: nn.Module) -> dict[str, _Place]:
    return dict(_walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield prefix + name, (module._parameters, name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield prefix + name, (module._buffers, name)
        if isinstance(module, BaseTunerLayer):
            for name, value in vars(module).items():
                if isinstance(value, dict) and not name.startswith("_"):
                    for key, tensor in value.items():
                        if isinstance(tensor, Tensor):
                            yield f"{prefix}{name}.{key}", (value, key)
