"""The mean of the clients' layers, of a system whose tensors' mean is not the layer of the mean: what a server needs.

A server reads every client's layer with the formula of its system, averages what it read, and writes the mean back:
*folded*, as a low-rank product beside the frozen weights, after which the trained tensors start again; or *in its own
form*, as tensors of the system whose layer is the mean, or the nearest of its rank. All of it reads released tensors
and frozen parts only, so it is post-processing.

Legend: D out_features, K in_features, C clients, R rank.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlr.adapters.factors import product_norm
from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import LAYOUT, adapter_parameters, base_layers

Values = Mapping[str, Tensor]  # the trained tensors of one layer by block, float64
STILL = 1e-6  # of the weights' norm: below it a layer is as it was, to float32's rounding


@dataclass(frozen=True)
class Layer:
    """One adapted layer as a server has it, on the CPU.

    Attributes:
        module: a copy of PEFT's layer, for its sizes and frozen parts; its trained tensors mean nothing here.
        slots: where its trained tensors are in the adapter, by block.
        side: what has been folded into its weights.
    """

    module: Any
    slots: Mapping[str, Slot]
    side: LoraFactors | None = None

    @cached_property
    def weight_DK(self) -> Tensor:
        """The weights that clients trained over, float64: those the model came with, and the side."""
        base = self.module.get_base_layer()
        weight_DK: Tensor = base.weight.detach().double()
        if not isinstance(base, nn.Linear):
            weight_DK = weight_DK.T  # GPT-2's Conv1D keeps its weight as (K, D)
        if self.side is not None:
            weight_DK = weight_DK + self.side.lora_B.double() @ self.side.lora_A.double()
        return weight_DK


Delta = Callable[[Layer, Values], LoraFactors]  # what tensors add to a layer's weights, as factors in float64


@dataclass(frozen=True)
class Written:
    """The mean of one layer, written back.

    Attributes:
        values: new trained tensors by block; a block that is absent goes back to what was broadcast.
        fold: what goes into the side, float64; None where the system holds the mean in its own form.
        error: what `values` miss of the mean: Frobenius, relative to how far the mean is from the layer before.
    """

    values: Values = field(default_factory=dict)
    fold: LoraFactors | None = None
    error: float = 0.0


class RunningLayer(Protocol):
    """The mean of one layer over the clients added so far."""

    def add(self, values: Values, weight: float) -> None:
        """Take in one client's tensors."""
        ...

    def written(self) -> Written:
        """Return the mean, written back; at least one client has a weight."""
        ...


class InOwnForm(Protocol):
    """Makes the running mean of a layer that is written back as tensors of its system; they start at `start`."""

    def __call__(self, layer: Layer, start: Values) -> RunningLayer:
        """Return the mean of nothing yet."""
        ...


@dataclass(frozen=True)
class Folded:
    """A layer W + delta is written back as W <- W + sum_k p_k delta_k - delta_start, its tensors as they started.

    Attributes:
        delta: the formula.
        reads_base: whether it reads W. Then delta_start must be zero: over other weights it would be another one.
    """

    delta: Delta
    reads_base: bool = False

    def __call__(self, layer: Layer, start: Values) -> RunningLayer:
        """Return the mean of nothing yet.

        Raises:
            InputError: the start of the tensors would move the weights that were folded.
        """
        return FoldedMean(self.delta, layer, self.start_delta(layer, start))

    def start_delta(self, layer: Layer, start: Values) -> LoraFactors:
        """Return what the tensors add before they train.

        Raises:
            InputError: as above.
        """
        delta = self.delta(layer, start)
        if self.reads_base and product_norm(delta) > STILL * float(layer.weight_DK.norm()):
            raise InputError(
                "Expected a start of the adapter that leaves its layers as they are, to fold into them, got another; "
                "set an even adapter.rank and no init_weights in adapter.sizes"
            )
        return delta


class FoldedMean:
    """sum_k p_k delta_k - delta_start as factors. A weight stands on one factor only: on both it would be squared."""

    def __init__(self, delta: Delta, layer: Layer, start: LoraFactors) -> None:
        self._delta, self._layer, self._start = delta, layer, start
        self._sum = LowRankSum(max_rank=min(len(start.lora_B), start.lora_A.shape[1]))
        self._beside_B = torch.zeros_like(start.lora_A)  # of clients whose lora_B is the start's own
        self._total = 0.0

    def add(self, values: Values, weight: float) -> None:
        """See `RunningLayer.add`."""
        delta = self._delta(self._layer, values)
        self._total += weight
        if delta.lora_B is self._start.lora_B:  # the layer's own weights, of which each client has another turn
            self._beside_B += weight * delta.lora_A
        else:
            self._sum.add(delta, weight)

    def written(self) -> Written:
        """See `RunningLayer.written`."""
        start = self._start
        if self._beside_B.any():
            return Written(fold=LoraFactors(self._beside_B / self._total - start.lora_A, start.lora_B))
        self._sum.add(start, -self._total)
        fold = self._sum.factors()
        return Written(fold=LoraFactors(fold.lora_A, fold.lora_B / self._total))


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the adapted layers of a model by path: copies, which nothing is merged into later.

    They hold the adapted layers' weights once more.
    """
    if getattr(model, LAYOUT, None) is None:
        raise ValueError("Expected a model with another system than LoRA, got LoRA")
    slots = {id(parameter): slot for slot, parameter in adapter_parameters(model).items()}
    modules = {path: model.get_submodule(path) for path in base_layers(model)}
    own: dict[str, dict[str, Slot]] = {}
    for path, module in modules.items():
        found = [slots[id(parameter)] for parameter in module.parameters() if id(parameter) in slots]
        own[path] = {slot.role.rpartition(".")[2]: slot for slot in found}
    copies = copy.deepcopy({path: module for path, module in modules.items() if own[path]})
    return {path: Layer(module.cpu(), own[path]) for path, module in copies.items()}
