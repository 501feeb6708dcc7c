"""The ideal that every aggregate is measured against: sum_k p_k B_k A_k, gathered while the updates stream by.

Where one factor trained, the ideal is the mean of that factor beside the shared other one. Where both did, w_k B_k and
A_k are stacked: C clients give rank C * R, and no smaller form is exact. A layer has rank min(D, K) at most, so a stack
that has more columns is folded into one D x K sum; memory never grows with the cohort beyond that.
Legend: D out_features, K in_features, R rank, C clients, M columns of a stack.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedlr.adapter import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.refactor import product_norm


class Ideal:
    """sum_k p_k B_k A_k of every layer, in float64, over the updates added so far.

    The weight goes on one factor only: on both it would be squared. The updates all hold the same slots.
    """

    def __init__(self, adapter: AdapterState) -> None:
        """Start at nothing; `adapter`, which was broadcast, gives the factors that do not train."""
        self._layers = {path: _LayerSum(path, layer) for path, layer in adapter.factors().items()}
        self._total = 0.0

    @classmethod
    def of(cls, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> "Ideal":
        """Return the ideal of these updates."""
        ideal = cls(adapter)
        for update in updates:
            ideal.add(update)
        return ideal

    def add(self, update: ClientUpdate) -> None:
        """Take in one update."""
        self._total += update.weight
        for layer in self._layers.values():
            layer.add(update)

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on, and take in each of them on its way."""
        for update in updates:
            self.add(update)
            yield update

    def norm(self, path: str) -> float:
        """Return the Frobenius norm of one layer's ideal."""
        return self._layers[path].distance(None, self._total)

    def distance(self, path: str, layer: LoraFactors) -> float:
        """Return the Frobenius norm of one layer's ideal less the product of `layer`."""
        return self._layers[path].distance(layer, self._total)

    def times(self, path: str, right_KR: Tensor) -> Tensor:
        """Return one layer's ideal times a float64 matrix, (D, R)."""
        return self._layers[path].times(right_KR, self._total)


class _LayerSum:
    """sum_k w_k B_k A_k of one layer: one summed factor, or a stack of both that is folded when it is too long."""

    def __init__(self, path: str, start: LoraFactors) -> None:
        self._slot_A, self._slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
        self._start = LoraFactors(start.lora_A.double(), start.lora_B.double())
        self._sum: LoraFactors | None = None  # with the start's factor where that did not train
        self._stack: list[LoraFactors] = []
        self._num_columns = 0
        self._folded_DK: Tensor | None = None

    def add(self, update: ClientUpdate) -> None:
        lora_A, lora_B = update.tensors.get(self._slot_A), update.tensors.get(self._slot_B)
        if lora_A is not None and lora_B is not None:
            self._stack.append(LoraFactors(lora_A.double(), lora_B.double() * update.weight))
            self._num_columns += len(lora_A)
            if self._num_columns > min(self._start.lora_A.shape[1], len(lora_B)):
                self._fold()
        elif lora_A is not None:
            if self._sum is None:
                self._sum = LoraFactors(torch.zeros_like(self._start.lora_A), self._start.lora_B)
            self._sum.lora_A.add_(lora_A, alpha=update.weight)
        elif lora_B is not None:
            if self._sum is None:
                self._sum = LoraFactors(self._start.lora_A, torch.zeros_like(self._start.lora_B))
            self._sum.lora_B.add_(lora_B, alpha=update.weight)

    def distance(self, layer: LoraFactors | None, total: float) -> float:
        if self._folded_DK is not None:
            self._fold()
            ideal_DK = self._folded_DK / total
            if layer is not None:
                ideal_DK.addmm_(layer.lora_B.double(), layer.lora_A.double(), alpha=-1)
            return float(ideal_DK.norm())
        ideal = self._factors(total)
        if layer is None:
            return product_norm(ideal)
        lora_A = torch.cat([ideal.lora_A, layer.lora_A.double()])
        lora_B = torch.cat([ideal.lora_B, -layer.lora_B.double()], dim=1)
        return product_norm(LoraFactors(lora_A, lora_B))

    def times(self, right_KR: Tensor, total: float) -> Tensor:
        if self._folded_DK is not None:
            self._fold()
            return self._folded_DK @ right_KR / total
        ideal = self._factors(total)
        return ideal.lora_B @ (ideal.lora_A @ right_KR)

    def _factors(self, total: float) -> LoraFactors:
        """Return the ideal as (M, K) and (D, M) factors."""
        if self._stack:
            stacked = self._stacked()
            return LoraFactors(stacked.lora_A, stacked.lora_B / total)
        if self._sum is None:
            return self._start
        if self._sum.lora_A is self._start.lora_A:
            return LoraFactors(self._start.lora_A, self._sum.lora_B / total)
        return LoraFactors(self._sum.lora_A / total, self._start.lora_B)

    def _stacked(self) -> LoraFactors:
        lora_A = torch.cat([layer.lora_A for layer in self._stack])
        return LoraFactors(lora_A, torch.cat([layer.lora_B for layer in self._stack], dim=1))

    def _fold(self) -> None:
        """Add what is stacked to the D x K sum."""
        if self._folded_DK is None:
            self._folded_DK = torch.zeros(len(self._start.lora_B), self._start.lora_A.shape[1], dtype=torch.float64)
        if self._stack:
            stacked = self._stacked()
            self._folded_DK.addmm_(stacked.lora_B, stacked.lora_A)
            self._stack, self._num_columns = [], 0
