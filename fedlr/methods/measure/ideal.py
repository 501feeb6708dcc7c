"""The ideal that every aggregate is measured against: sum_k p_k B_k A_k, gathered while the updates stream by.

Where one factor trained, the ideal is the mean of that factor beside the shared other one: exact, whatever the cohort.
Where both did, the clients' factors are stacked, and C clients give C * R columns. The ideal is exact while they are at
most min(D, K) in a layer and take at most HELD_BYTES in all layers together, as the clients sent them: 4 (D + K) bytes
a column in float32, so 21 clients of rank 8 over 48 layers of 1024 x 1024 (170 columns of 393 kB). Beyond that:

- a layer whose D x K matrix is no larger than a sketch of it is summed as that matrix, and stays exact;
- any other is kept as a `SketchedSum`: exact along 4R tracked directions (the rows of the lora_A that was broadcast, of
  the mean lora_A so far, and the 2R directions in which the sum so far is largest besides), a Gaussian sketch of
  SKETCH_COLUMNS columns elsewhere. Its norms are estimates, and `sd` says how good: at most 1 / sqrt(2 * 64) = 9 % of
  the norm in the worst case; for the error of a mean over hundreds of clients, which points into hundreds of
  directions, about 1 %. At 1024 x 1024 and rank 8 a layer then takes 8 * 1024 * (64 + 32 + 32) = 1.0 MB, and up to
  0.3 MB of factors that wait to be taken in.

So memory never grows with the cohort, and `is_exact` and `sd` say of every figure whether it is an estimate.
The sketch is drawn from a public seed, and not from the updates: a client who aims at it could hide from the estimate,
never from the aggregate.
Legend: D out_features, K in_features, R rank, C clients, M columns of a stack, Q tracked directions, P SKETCH_COLUMNS.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from fedlr.adapters.factors import product_norm
from fedlr.adapters.low_rank import LowRankSum, SketchedSum
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.streams import Purpose, stream

HELD_BYTES = 2**26  # 67 MB, of an ideal: a round has one for its diagnostics, and LoRA-FAIR has another
SKETCH_COLUMNS = 64
WAITING_COLUMNS = 32  # that are taken into a sketch together: one product of matrices instead of many thin ones


class Ideal:
    """sum_k p_k B_k A_k of every layer, in float64, over the updates added so far.

    The weight goes on one factor only: on both it would be squared. The updates all hold the same slots.
    """

    def __init__(self, adapter: AdapterState, *, seed: int = 0) -> None:
        """Start at nothing; `adapter`, which was broadcast, gives the factors that do not train; `seed` the sketch."""
        layers = adapter.factors()
        column_bytes = sum(
            len(layer.lora_B) * layer.lora_B.element_size() + layer.lora_A.shape[1] * layer.lora_A.element_size()
            for layer in layers.values()
        )
        held_columns = HELD_BYTES // max(1, column_bytes)
        sketch = cache(partial(_gaussian, seed))
        self._layers = {path: _LayerSum(path, layer, held_columns, sketch) for path, layer in layers.items()}
        self._side = adapter.side
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

    def is_exact(self, path: str) -> bool:
        """Return whether one layer's figures are exact to rounding; else its norms are estimates."""
        return self._layers[path].is_exact

    def norm(self, path: str) -> float:
        """Return the Frobenius norm of one layer's ideal, or its estimate."""
        return self._layers[path].distance(None, self._total)[0]

    def distance(self, path: str, layer: LoraFactors) -> float:
        """Return the Frobenius norm of one layer's ideal less the product of `layer`, or its estimate."""
        return self._layers[path].distance(layer, self._total)[0]

    def sd(self, path: str, layer: LoraFactors | None = None) -> float:
        """Return the standard deviation of `distance(path, layer)`, or of `norm(path)` without a layer, over the draw
        of the sketch: 0.0 where exact; else an estimate itself, from the same sketch."""
        return 0.0 if self.is_exact(path) else self._layers[path].distance(layer, self._total)[1]

    def gained(self, after: AdapterState) -> dict[str, LoraFactors]:
        """Return the product of every layer of an aggregate, with what its side has more than that of the broadcast."""
        layers = after.factors()
        for path, layer in layers.items():
            old, new = self._side.get(path), after.side.get(path)
            if new is not old:
                parts = [(layer, 1), *((side, sign) for side, sign in ((new, 1), (old, -1)) if side is not None)]
                lora_A = torch.cat([part.lora_A.double() for part, _ in parts])
                layers[path] = LoraFactors(lora_A, torch.cat([part.lora_B.double() * sign for part, sign in parts], 1))
        return layers

    def times(self, path: str, right_KR: Tensor, *, elsewhere: LoraFactors) -> Tensor:
        """Return one layer's ideal times a float64 matrix, (D, R).

        Where the ideal is a sketch, it is used along the tracked directions only, where it is exact; along all others
        the product of `elsewhere`, float64 factors, stands in for it. Where the ideal is exact, `elsewhere` has no say.
        """
        return self._layers[path].times(right_KR, self._total, elsewhere)


class _Sketch(Protocol):
    def __call__(self, in_features: int, /) -> Tensor: ...


class _LayerSum:
    """sum_k w_k B_k A_k of one layer: one summed factor, or a stack of both that is folded when it is too long."""

    def __init__(self, path: str, start: LoraFactors, held_columns: int, sketch: _Sketch) -> None:
        self._slot_A, self._slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
        self._start, self._sketch = start, sketch
        self._sum: LoraFactors | None = None  # with the start's factor where that did not train
        self._stack: list[tuple[Tensor, Tensor, float]] = []  # lora_A, lora_B and weight of each client, as they came
        self._num_columns = 0
        rank, in_features = start.lora_A.shape
        out_features = len(start.lora_B)
        self._most_columns = min(out_features, in_features, held_columns)
        sketch_numbers = (out_features + in_features) * (SKETCH_COLUMNS + 4 * rank)
        self._is_small = out_features * in_features <= sketch_numbers
        self._folded_DK: Tensor | None = None
        self._sketched: SketchedSum | None = None

    @property
    def is_exact(self) -> bool:
        return self._sketched is None

    def add(self, update: ClientUpdate) -> None:
        lora_A, lora_B = update.tensors.get(self._slot_A), update.tensors.get(self._slot_B)
        if lora_A is not None and lora_B is not None:
            self._stack.append((lora_A.clone(), lora_B.clone(), update.weight))
            self._num_columns += len(lora_A)
            if self._num_columns > (self._most_columns if self.is_exact else WAITING_COLUMNS):
                self._fold()
        elif lora_A is not None:
            if self._sum is None:
                zeros = torch.zeros_like(self._start.lora_A, dtype=torch.float64)
                self._sum = LoraFactors(zeros, self._start.lora_B)
            self._sum.lora_A.add_(lora_A, alpha=update.weight)
        elif lora_B is not None:
            if self._sum is None:
                zeros = torch.zeros_like(self._start.lora_B, dtype=torch.float64)
                self._sum = LoraFactors(self._start.lora_A, zeros)
            self._sum.lora_B.add_(lora_B, alpha=update.weight)

    def distance(self, layer: LoraFactors | None, total: float) -> tuple[float, float]:
        """Return the norm of the ideal less `layer`, and its standard deviation."""
        if self._folded_DK is not None or self._sketched is not None:
            self._fold()
        if self._sketched is not None:
            return self._sketched.norm(total=total, less=layer)
        if self._folded_DK is not None:
            ideal_DK = self._folded_DK / total
            if layer is not None:
                ideal_DK.addmm_(layer.lora_B.double(), layer.lora_A.double(), alpha=-1)
            return float(ideal_DK.norm()), 0.0
        ideal = self._factors(total)
        if layer is None:
            return product_norm(ideal), 0.0
        lora_A = torch.cat([ideal.lora_A, layer.lora_A.double()])
        lora_B = torch.cat([ideal.lora_B, -layer.lora_B.double()], dim=1)
        return product_norm(LoraFactors(lora_A, lora_B)), 0.0

    def times(self, right_KR: Tensor, total: float, elsewhere: LoraFactors) -> Tensor:
        if self._folded_DK is not None or self._sketched is not None:
            self._fold()
        if self._sketched is not None:
            return self._sketched.times(right_KR, total=total, elsewhere=elsewhere)
        if self._folded_DK is not None:
            return self._folded_DK @ right_KR / total
        ideal = self._factors(total)
        return ideal.lora_B @ (ideal.lora_A @ right_KR)

    def _factors(self, total: float) -> LoraFactors:
        """Return the ideal as (M, K) and (D, M) factors in float64."""
        if self._stack:
            stacked = self._stacked()
            return LoraFactors(stacked.lora_A, stacked.lora_B / total)
        start = LoraFactors(self._start.lora_A.double(), self._start.lora_B.double())
        if self._sum is None:
            return start
        if self._sum.lora_A is self._start.lora_A:
            return LoraFactors(start.lora_A, self._sum.lora_B / total)
        return LoraFactors(self._sum.lora_A / total, start.lora_B)

    def _stacked(self) -> LoraFactors:
        lora_A = torch.cat([lora_A.double() for lora_A, _, _ in self._stack])
        return LoraFactors(lora_A, torch.cat([lora_B.double() * weight for _, lora_B, weight in self._stack], dim=1))

    def _fold(self) -> None:
        """Add what is stacked to the D x K sum of a small layer, or to the sketch of any other."""
        out_features, in_features = len(self._start.lora_B), self._start.lora_A.shape[1]
        if self._is_small and self._folded_DK is None:
            self._folded_DK = torch.zeros(out_features, in_features, dtype=torch.float64)
        elif not self._is_small and self._sketched is None:
            self._sketched = SketchedSum(self._tracked(), self._sketch(in_features), out_features)
        if not self._stack:
            return
        stacked = self._stacked()
        if self._sketched is not None:
            self._sketched.add(stacked)
        elif self._folded_DK is not None:
            self._folded_DK.addmm_(stacked.lora_B, stacked.lora_A)
        self._stack, self._num_columns = [], 0

    def _tracked(self) -> Tensor:
        """Return the directions that are tracked, (K, 4R), from what is stacked and no random number."""
        total = sum(weight for _, _, weight in self._stack) or 1.0
        mean_RK = sum(
            (lora_A.double() * (weight / total) for lora_A, _, weight in self._stack), start=torch.tensor(0.0)
        )
        known_KQ = torch.linalg.qr(torch.cat([self._start.lora_A.double(), mean_RK]).T).Q
        stacked = self._stacked()
        besides = LowRankSum(max_rank=max(1, self._num_columns))
        besides.add(LoraFactors(stacked.lora_A - stacked.lora_A @ known_KQ @ known_KQ.T, stacked.lora_B))
        largest_KQ = besides.truncated(known_KQ.shape[1]).lora_A.T
        basis_KQ: Tensor = torch.linalg.qr(torch.cat([known_KQ, largest_KQ], dim=1)).Q
        return basis_KQ


def _gaussian(seed: int, in_features: int) -> Tensor:
    """Return the sketch of a layer, (K, P): the same for all layers with so many inputs."""
    numbers = stream(seed, Purpose.EVALUATION, step=in_features).standard_normal((in_features, SKETCH_COLUMNS))
    return torch.from_numpy(numbers)
