"""How an adapter is read from and written to a PEFT model, tensor by tensor (`fedlr.adapters.state` has its types)."""

from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlr.adapters.state import (
    HEAD,
    LORA_A,
    LORA_B,
    SHIPPED,
    AdapterState,
    Block,
    Slot,
    given_ranks,
    in_block,
    of_rank,
)

LAYOUT = (
    "fedlr_layout"  # the attribute of a model whose adapter is another system's than LoRA (fedlr.models.tuners.attach)
)
ADAPTER_NAME = "default"


def adapter_parameters(model: nn.Module) -> dict[Slot, nn.Parameter]:
    """Return every adapter parameter of a PEFT model by its slot: lora_A, lora_B, and the head's copy.

    Of another system those of its blocks, by the name of the parameter.
    """
    found: dict[Slot, nn.Parameter] = {}
    layout = getattr(model, LAYOUT, None)
    if layout is not None:
        found = {Slot(name, role): p for name, p in model.named_parameters() if (role := layout.role(name))}
    for path, module in model.named_modules():
        if layout is None and isinstance(module, LoraLayer):
            for role, factor in ((LORA_A, module.lora_A), (LORA_B, module.lora_B)):
                found[Slot(path, role)] = cast(nn.Parameter, factor[ADAPTER_NAME].weight)
        elif isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.modules_to_save[ADAPTER_NAME].named_parameters():
                found[Slot(f"{path}.{name}", HEAD)] = parameter
    return found


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with LoRA by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the frozen layers that an adapter of any system sits on, by the path of the adapted layer."""
    return {path: m.get_base_layer() for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


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
    if (layout := getattr(model, LAYOUT, None)) is not None:
        trained = {slot: p.detach().to("cpu", copy=True) for slot, p in adapter_parameters(model).items()}
        return AdapterState(trained | {slot: part.cpu() for slot, part in layout.shipped(model).items()}, scale=1.0)
    scales = {m.scaling[ADAPTER_NAME] for m in model.modules() if isinstance(m, LoraLayer)}
    if len(scales) != 1:
        raise ValueError(f"Expected one scale for all layers of the adapter, got {sorted(scales)}")
    tensors = {slot: p.detach().to("cpu", copy=True) for slot, p in adapter_parameters(model).items()}
    return AdapterState(tensors, scale=float(scales.pop()))


def write_adapter(model: nn.Module, tensors: Mapping[Slot, Tensor]) -> None:
    """Copy values into a PEFT model; every slot must exist there with the same shape. A layer of which both factors are
    given takes their rank, at most the one it was made with: the parameters stay the same objects, the scale stays.

    Parts that were shipped are not written but compared: all copies of a model share them.
    """
    parameters = adapter_parameters(model)
    if shipped := {slot.path: tensor for slot, tensor in tensors.items() if slot.role == SHIPPED}:
        frozen = getattr(model, LAYOUT).frozen(model)
        for path, tensor in shipped.items():
            if path not in frozen or not torch.equal(frozen[path].cpu(), tensor):
                raise ValueError(f"Expected the frozen parts that were shipped, got others at {path}")
        tensors = {slot: tensor for slot, tensor in tensors.items() if slot.role != SHIPPED}
    _take_ranks(model, given_ranks(tensors))
    with torch.no_grad():
        for slot, tensor in tensors.items():
            if slot not in parameters or parameters[slot].shape != tensor.shape:
                raise ValueError(f"Expected a tensor that the model has, got {slot} of shape {tuple(tensor.shape)}")
            parameters[slot].copy_(tensor)


def _take_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give layers with LoRA these ranks, with any values in the layers whose rank changes."""
    for path, layer in adapted_layers(model).items() if ranks else ():
        lora_A, lora_B = (cast(nn.Linear, factor[ADAPTER_NAME]) for factor in (layer.lora_A, layer.lora_B))
        rank = ranks.get(path, len(lora_A.weight))
        if len(lora_A.weight) != rank <= layer.r[ADAPTER_NAME]:
            for linear, role in ((lora_A, LORA_A), (lora_B, LORA_B)):
                linear.weight.data = of_rank(linear.weight.data, Slot(path, role), rank)
            lora_A.out_features = lora_B.in_features = rank


def train_only(model: nn.Module, block: Block) -> dict[Slot, nn.Parameter]:
    """Let exactly the tensors of `block` require gradients, and return them sorted by slot."""
    model.requires_grad_(False)
    trained = {slot: p for slot, p in sorted(adapter_parameters(model).items()) if in_block(slot, block)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
