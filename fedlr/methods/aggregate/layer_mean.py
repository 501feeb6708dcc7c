"""The mean of the clients' layers, factored again: FedSVD's and FlexLoRA's step for any system that can be read.

Legend: D out_features, K in_features.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedlr.adapters.factors import product_norm
from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LARGEST_VALUE, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.methods.aggregate.rank import svd_redistribution
from fedlr.methods.measure.diagnostics import ERRORS
from fedlr.models.peft_state import LAYOUT
from fedlr.models.tuners.entry import Tuner
from fedlr.models.tuners.layer_means import Folded, Layer, layers_of


@dataclass(frozen=True)
class LayerMean:
    """Average the clients' layers, sum_k p_k W_k, and write the mean back; average the head.

    Source: the step of FedSVD (Lee et al. 2025, https://arxiv.org/abs/2505.12805) and FlexLoRA (Bai et al. 2024,
    https://arxiv.org/abs/2402.11505), made for systems that are not linear in what trains, by us. How a layer is read
    and written back is in the registry (`models.tuners.layer_means`): folded into the side, or in its own form. With
    LoRA it is FlexLoRA's `svd_redistribution`.

    It reads the frozen weights, which no adapter holds, so it is bound to a model once (`bound`).

    What is noised under DP: every trained tensor, on the client. Layers are functions of noised tensors and frozen
    weights, so all that is done here is post-processing; what is folded keeps its noise in the base for good.

    Guarantees: no D x K matrix is made but the weights themselves; weights are used in float64. Memory of a folded
    system grows with the cohort, whose products are stacked, up to 2 min(D, K) columns a layer, and no further. The
    error of each layer, relative to how far the mean is from the layer before, is in the round's `aggregation_error`.

    Args:
        max_rank: most columns of a layer's side product; above it the side is cut to its best approximation of that
            rank, and the error says what that costs. None: as many as it has.
    """

    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise InputError(f"Expected max_rank to be at least 1, or null for exact means, got {self.max_rank}")

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return FlexLoRA's aggregate: not bound to a model, it knows LoRA only.

        Raises: ValueError for another system, without updates, or if they do not all hold the same tensors.
        """
        if not adapter.factors():
            raise ValueError("Expected LoRA, or a rule that is bound to the model of another system, got neither")
        return svd_redistribution(adapter, updates)

    @property
    def folds(self) -> bool:
        """Whether anything is folded: of LoRA nothing."""
        return False

    def bound(self, model: nn.Module) -> "LayerMean | BoundLayerMean":
        """Return the rule for this model, whose frozen weights are copied: nothing may be merged into them yet."""
        layout = getattr(model, LAYOUT, None)
        return self if layout is None else BoundLayerMean(layout.tuner, layers_of(model), max_rank=self.max_rank)


class BoundLayerMean:
    """`LayerMean` of one model's layers."""

    def __init__(self, tuner: Tuner, layers: Mapping[str, Layer], *, max_rank: int | None = None) -> None:
        if tuner.layer_mean is None:
            raise InputError(f"Expected a system whose layers a server can average, got {tuner.title}")
        self._write, self._layers, self._max_rank = tuner.layer_mean, layers, max_rank
        self.folds = isinstance(tuner.layer_mean, Folded)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter with the mean of the layers; a block that did not train is at what was broadcast.

        Raises: ValueError without updates.
        """
        layers = {path: replace(layer, side=adapter.side.get(path)) for path, layer in self._layers.items()}
        running = {path: self._write(layer, _values(layer, adapter.tensors)) for path, layer in layers.items()}
        inside = {slot for layer in layers.values() for slot in layer.slots.values()}
        rest = RunningMean()
        for update in updates:
            others = {slot: tensor for slot, tensor in update.tensors.items() if slot not in inside}
            rest.add(replace(update, tensors=others))
            if update.weight > 0:
                tensors = {**adapter.tensors, **update.tensors}
                for path, layer in layers.items():
                    running[path].add(_values(layer, tensors), update.weight)
        values, side, errors = rest.values(), dict(adapter.side), {}
        for path, layer in layers.items():
            written = running[path].written()
            values |= {layer.slots[block]: value for block, value in written.values.items()}
            error = written.error
            if written.fold is not None:
                folded, error = _with_folded(layer, written.fold, max_rank=self._max_rank)
                side |= {} if folded is None else {path: folded}
            errors[Slot(path, ERRORS)] = torch.tensor([error], dtype=torch.float64)
        changed = any(factors is not adapter.side.get(path) for path, factors in side.items())
        adapter = replace(adapter.with_rounded(values), side=side if changed else adapter.side)
        return adapter.remembering(ERRORS, errors)


def _with_folded(layer: Layer, fold: LoraFactors, *, max_rank: int | None) -> tuple[LoraFactors | None, float]:
    """Return a layer's side with a product more, in the dtype of its weights, and the share of it that is missed.

    The side keeps the columns that the dtype can tell from nothing beside the largest one. It stays as it is where the
    product is nothing, and where no device would take it: numbers that pass the gate can explode in a formula.
    """
    if (norm := product_norm(fold)) == 0.0:
        return layer.side, 0.0
    if not math.isfinite(norm):
        return layer.side, 1.0
    full = min(len(fold.lora_B), fold.lora_A.shape[1])
    parts = [fold] if layer.side is None else [layer.side, fold]
    total = LowRankSum(max_rank=min(max_rank or full, full))
    for part in parts:
        total.add(part)
    best = total.truncated(len(total.factors().lora_A))
    dtype, norms_M = layer.module.get_base_layer().weight.dtype, best.lora_B.norm(dim=0)
    used = norms_M > torch.finfo(dtype).eps * norms_M.max()
    used[0] = True  # a side that was taken back stays, as zeros
    after = LoraFactors(best.lora_A[used].to(dtype), best.lora_B[:, used].to(dtype))
    if float(after.lora_B.abs().max()) > LARGEST_VALUE:
        return layer.side, 1.0
    missed_A = torch.cat([after.lora_A.double(), *(part.lora_A.double() for part in parts)])
    missed_B = torch.cat([after.lora_B.double(), *(-part.lora_B.double() for part in parts)], dim=1)
    return after, product_norm(LoraFactors(missed_A, missed_B)) / norm


def _values(layer: Layer, tensors: Mapping[Slot, Tensor]) -> dict[str, Tensor]:
    return {block: tensors[slot].double() for block, slot in layer.slots.items()}
