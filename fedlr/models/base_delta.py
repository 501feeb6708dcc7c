"""The side product of an adapter, merged into the frozen weights: a client computes no more than without it.

All copies of a model in a process share their frozen tensors, so merging once serves all of them. The weights are
always made anew from those the model came with: after a thousand merges they differ from the exact sum by one rounding.
Layers of any system are served. Frozen parts that a system made of W when it was attached (DeLoRA's column norms, bases
of PSOFT and LoRA-XS) stay those of the W that the model came with.
Legend: D out_features, K in_features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlr.adapters.state import AdapterState, LoraFactors
from fedlr.errors import InputError
from fedlr.models.peft_state import base_layers
from fedlr.models.places import LINEAR


class SideWeights:
    """Merges side products into the layers of one model, and of every copy that shares its frozen tensors.

    Raises:
        InputError: where it is asked to merge into what is no float32 linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = base_layers(model)
        self._plain: dict[str, Tensor] = {}  # as the model came, of the layers that ever had a side
        self._merged: Mapping[str, LoraFactors] = {}

    def merge(self, adapter: AdapterState) -> None:
        """Let the layers hold W + scale * side.lora_B @ side.lora_A. Not while anybody computes with them.

        What has been merged already is recognised by the mapping itself, which nobody changes.
        """
        if adapter.side is self._merged or not (adapter.side or self._merged):
            return
        self._check(adapter.side)
        for path in {*self._merged, *adapter.side}:
            weight = self._weight(path)
            if path not in self._plain:
                self._plain[path] = weight.clone()
            plain = self._plain[path]
            layer = adapter.side.get(path)
            if layer is None:
                weight.copy_(plain)
                continue
            product_DK = layer.lora_B.double() @ layer.lora_A.double()
            if not isinstance(self._layers[path], nn.Linear):
                product_DK = product_DK.T  # GPT-2's Conv1D keeps its weight as (K, D)
            weight.copy_(plain.double() + adapter.scale * product_DK.to(plain.device))
        self._merged = adapter.side

    def _check(self, side: Mapping[str, LoraFactors]) -> None:
        """Refuse what does not fit before anything is merged."""
        for path, layer in side.items():
            if path not in self._layers:
                raise InputError(f"Expected side products of adapted layers, got one of {path[:80]!r}")
            shape = self._weight(path).shape
            wanted = tuple(shape) if isinstance(self._layers[path], nn.Linear) else tuple(shape)[::-1]
            if (got := (len(layer.lora_B), layer.lora_A.shape[1])) != wanted:
                raise InputError(f"Expected a side product of {wanted} for {path}, got {got}")

    def _weight(self, path: str) -> Tensor:
        layer = self._layers[path]
        weight = getattr(layer, "weight", None)
        is_linear = isinstance(layer, LINEAR)
        if not is_linear or not isinstance(weight, Tensor) or weight.dtype != torch.float32:
            raise InputError(
                f"Expected float32 linear layers for a method that folds into the base, got {type(layer).__name__} "
                f"at {path}; set runtime.base_dtype=float32, or another method"
            )
        return weight.detach()
