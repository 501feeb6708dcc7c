"""The adapter: named low-rank tensors, and how they are read from and written to a PEFT model.

delta_W of a layer is `scale * lora_B @ lora_A` (Hu et al. 2021, sec. 4.1).
Legend: D out_features, K in_features, R rank.

A tensor is addressed by a `Slot(path, role)`, never by a substring of its name. A round trains one *block*: a set of
roles. Everything else of the model is frozen.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

LORA_A, LORA_B, HEAD = "lora_A", "lora_B", "head"
ROLES = (LORA_A, LORA_B, HEAD)
ADAPTER_NAME = "default"

Block = frozenset[str]


class Slot(NamedTuple):
    """Address of one adapter tensor: the path of its layer (for a head, of its parameter) and its role."""

    path: str
    role: str


@dataclass(frozen=True)
class LoraFactors:
    """One layer's low-rank update, delta_W = scale * lora_B @ lora_A (Hu et al. 2021, sec. 4.1)."""

    lora_A: Tensor  # (R, K)
    lora_B: Tensor  # (D, R)


@dataclass(frozen=True)
class AdapterState:
    """All tensors of one adapter, detached and on the CPU, with the scale its layers share."""

    tensors: Mapping[Slot, Tensor]
    scale: float

    def factors(self) -> dict[str, LoraFactors]:
        """Return the factors of every layer, sorted by path."""
        paths = sorted({slot.path for slot in self.tensors if slot.role == LORA_A})
        return {p: LoraFactors(self.tensors[Slot(p, LORA_A)], self.tensors[Slot(p, LORA_B)]) for p in paths}

    def with_factors(self, factors: Mapping[str, LoraFactors]) -> "AdapterState":
        """Return a copy in which the given layers have new factors."""
        new: dict[Slot, Tensor] = {}
        for path, layer in factors.items():
            new[Slot(path, LORA_A)], new[Slot(path, LORA_B)] = layer.lora_A, layer.lora_B
        return self.with_tensors(new)

    def with_tensors(self, tensors: Mapping[Slot, Tensor]) -> "AdapterState":
        """Return a copy in which the given slots, all of them known, hold new tensors of the same shape."""
        for slot, tensor in tensors.items():
            if slot not in self.tensors or self.tensors[slot].shape != tensor.shape:
                raise ValueError(f"Expected a tensor that the adapter has, got {slot} of shape {tuple(tensor.shape)}")
        return replace(self, tensors={**self.tensors, **tensors})

    def select(self, block: Block) -> dict[Slot, Tensor]:
        """Return the tensors whose role is in `block`, sorted by slot."""
        return {slot: self.tensors[slot] for slot in sorted(self.tensors) if slot.role in block}

    def fingerprint(self) -> str:
        """Return the SHA-256 of every slot, shape and value, in hexadecimal.

        >>> AdapterState({Slot("layer", LORA_A): torch.ones(1, 2)}, scale=1.0).fingerprint()[:8]
        '7e317337'
        """
        digest = hashlib.sha256(repr(self.scale).encode())
        for slot in sorted(self.tensors):
            tensor = self.tensors[slot]
            digest.update(repr((slot.path, slot.role, str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ClientUpdate:
    """What one client returns from one round: the trained block, as values and not as a difference.

    `weight` is set by the server's rule, never by the client's word (uniform unless sizes are declared public).
    """

    client_id: int
    tensors: Mapping[Slot, Tensor]
    weight: float
    base_round: int


def adapter_parameters(model: nn.Module) -> dict[Slot, nn.Parameter]:
    """Return every adapter parameter of a PEFT model by its slot: lora_A, lora_B, and the head's copy."""
    found: dict[Slot, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for role, factor in ((LORA_A, module.lora_A), (LORA_B, module.lora_B)):
                found[Slot(path, role)] = cast(nn.Parameter, factor[ADAPTER_NAME].weight)
        elif isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.modules_to_save[ADAPTER_NAME].named_parameters():
                found[Slot(f"{path}.{name}", HEAD)] = parameter
    return found


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with LoRA by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def head_parts(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the modules of the adapter's head that hold parameters: by the path of their slots, their place in the
    model and the module."""
    parts: dict[str, tuple[str, nn.Module]] = {}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name, part in wrapper.modules_to_save[ADAPTER_NAME].named_modules():
                if any(True for _ in part.parameters(recurse=False)):
                    place = f"{path}.modules_to_save.{ADAPTER_NAME}.{name}"
                    parts[f"{path}.{name}".rstrip(".")] = (place.rstrip("."), part)
    return parts


def read_adapter(model: nn.Module) -> AdapterState:
    """Copy the adapter out of a PEFT model."""
    scales = {m.scaling[ADAPTER_NAME] for m in model.modules() if isinstance(m, LoraLayer)}
    if len(scales) != 1:
        raise ValueError(f"Expected one scale for all layers of the adapter, got {sorted(scales)}")
    tensors = {slot: p.detach().to("cpu", copy=True) for slot, p in adapter_parameters(model).items()}
    return AdapterState(tensors, scale=float(scales.pop()))


def write_adapter(model: nn.Module, tensors: Mapping[Slot, Tensor]) -> None:
    """Copy values into a PEFT model; every slot must exist there with the same shape."""
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for slot, tensor in tensors.items():
            if slot not in parameters or parameters[slot].shape != tensor.shape:
                raise ValueError(f"Expected a tensor that the model has, got {slot} of shape {tuple(tensor.shape)}")
            parameters[slot].copy_(tensor)


def train_only(model: nn.Module, block: Block) -> dict[Slot, nn.Parameter]:
    """Let exactly the tensors of `block` require gradients, and return them sorted by slot."""
    model.requires_grad_(False)
    trained = {slot: p for slot, p in sorted(adapter_parameters(model).items()) if slot.role in block}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def num_values(tensors: Iterable[Tensor]) -> int:
    """Return how many numbers the tensors hold together."""
    return sum(math.prod(t.shape) for t in tensors)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the numbers themselves: what a message carries, without layout and transport."""
    return sum(t.numel() * t.element_size() for t in tensors)
