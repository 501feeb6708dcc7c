"""LoRA-FAIR: average both factors, then correct lora_B so that the product comes closer to the ideal.

Per layer, with A and B the averaged factors and delta_W = sum_k p_k B_k A_k. Two solvers for the residual dB:
the paper's (`LoraFair`) and a closed form of ours (`LoraFairRidge`). Neither solves on a D x K matrix: with
G = A A^T (R, R) and T = delta_W A^T (D, R), <delta_W, B' A> = <T, B'> and ||B' A||^2 = <B' G, B'>.
The residual is computed from released updates only, so it is post-processing and costs no privacy. Where all
clients hold the same lora_A (FFA-LoRA, FedSVD), or the same lora_B, the mean is exact and is left alone. All that
the solvers need is gathered while the updates stream by, in memory that does not grow with the cohort.

T needs the mean lora_A, which is known only when all updates are gone. It is exact while the cohort's factors fit
(`Ideal.is_exact`: 21 clients of rank 8 over 48 layers of 1024 x 1024). For larger cohorts T is exact along the 4R
directions that the ideal tracks, among them the rows of the lora_A that was broadcast and of the mean lora_A of the
clients up to then; along all others delta_W is taken to be the product of the means, which neglects the covariance of
lora_B and lora_A there. T - B G then is off by at most the norm of that covariance times that of the part of the mean
lora_A that leaves the rows named: what the mean of some clients does not tell of the mean of all. In synthetic
federations of 60 and 300 clients that was 2 to 19 % of T - B G, most where lora_A is mostly noise. `LoraFair` then
also takes ||delta_W|| from a sketch (`Ideal.sd`: below 0.1 % there).
Legend: D out_features, K in_features, R rank, C clients.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.methods.measure.ideal import Ideal


@dataclass(frozen=True)
class LoraFair:
    """Correct the mean lora_B by SGD on dB: minimise 1 - cos(delta_W, (B + dB) A) + penalty * ||dB||_F.

    Source: Bian et al. 2025 (LoRA-FAIR), sec. 4, https://arxiv.org/abs/2411.14961: cosine similarity, penalty
    0.01, SGD. Biased: (B + dB) A lies in the row space of the mean lora_A, and the cosine never corrects the
    magnitude.

    Where sources differ: the cosine is over the whole matrix (a descendant of the authors' code takes it by
    column); dB starts at zero (there: Xavier-random, which does not converge in 1000 steps);
    `squared_penalty` takes ||dB||_F^2, as re-implementations do. The plain norm has a corner at zero: where
    the penalty is at least the gradient's norm there, dB = 0.

    Guarantees: the best iterate is returned, so the objective never ends above its value at dB = 0, also
    where a small B makes the steps (proportional to 1 / ||B A||) too long. dB = 0 where B A or delta_W is 0.

    Args:
        num_steps: Most SGD steps a layer.
        tolerance: Stop when a step changes the objective by no more than this.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)

    penalty: float = 0.01
    num_steps: int = 1000
    lr: float = 0.01
    squared_penalty: bool = False
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        _check_not_negative(penalty=self.penalty, num_steps=self.num_steps, lr=self.lr, tolerance=self.tolerance)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the weighted mean with every layer's lora_B corrected."""
        return _correct(adapter, updates, self._solve)

    def _solve(self, layer: "_Layer") -> Tensor:
        if layer.ideal_norm == 0 or not (layer.mean_B_DR @ layer.gram_RR).any():
            return torch.zeros_like(layer.mean_B_DR)
        # Every gradient lies in the column space of [T, B]: the same SGD, step by step, on 2R rows, not D.
        basis, rows = torch.linalg.qr(torch.cat([layer.target_DR, layer.mean_B_DR], dim=1))
        target, mean_B = rows.tensor_split(2, dim=1)
        best = residual = torch.zeros_like(mean_B)
        best_value = last_value = math.inf
        for _ in range(self.num_steps + 1):
            distance, gradient = _cosine_distance(mean_B + residual, target, layer)
            penalty, penalty_gradient = self._penalty(residual)
            value = distance + penalty
            if value < best_value:
                best, best_value = residual, value
            if abs(last_value - value) <= self.tolerance:
                break
            last_value, residual = value, residual - self.lr * (gradient + penalty_gradient)
        solution: Tensor = basis @ best
        return solution

    def _penalty(self, residual: Tensor) -> tuple[float, Tensor]:
        norm = float(residual.norm())
        if self.squared_penalty:
            return self.penalty * norm**2, 2 * self.penalty * residual
        return self.penalty * norm, (self.penalty / norm if norm > 0 else 0.0) * residual


@dataclass(frozen=True)
class LoraFairRidge:
    """Correct the mean lora_B in closed form: dB = (T - B G)(G + penalty I)^-1.

    Ours, not the paper's: it minimises ||delta_W - (B + dB) A||_F^2 + penalty * ||dB||_F^2 exactly, where
    LoRA-FAIR (Bian et al. 2025, https://arxiv.org/abs/2411.14961) descends on a cosine. Biased: what lies
    outside the row space of the mean lora_A is lost. penalty = 0 gives the projection of delta_W on that row
    space, which also has the best cosine; penalty -> infinity gives FedIT. The penalty competes with G, whose
    diagonal is about 1/3 at PEFT's initial lora_A.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)

    penalty: float = 0.01

    def __post_init__(self) -> None:
        _check_not_negative(penalty=self.penalty)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the weighted mean with every layer's lora_B corrected."""
        return _correct(adapter, updates, self._solve)

    def _solve(self, layer: "_Layer") -> Tensor:
        missing_DR = layer.target_DR - layer.mean_B_DR @ layer.gram_RR
        identity_RR = torch.eye(len(layer.gram_RR), dtype=layer.gram_RR.dtype)
        # The pseudo-inverse also serves penalty = 0 with a rank-deficient mean lora_A.
        inverse_RR: Tensor = torch.linalg.pinv(layer.gram_RR + self.penalty * identity_RR, hermitian=True)
        return missing_DR @ inverse_RR


@dataclass(frozen=True)
class _Layer:
    """What the residual of one layer depends on, in float64."""

    mean_B_DR: Tensor
    target_DR: Tensor  # T = delta_W A^T
    gram_RR: Tensor  # G = A A^T
    ideal_norm: float  # ||delta_W||_F


def _correct(adapter: AdapterState, updates: Iterable[ClientUpdate], solve: Callable[[_Layer], Tensor]) -> AdapterState:
    # A sketch of its own: the one that measures the result must not depend on it.
    running, ideal, shared = RunningMean(), Ideal(adapter, seed=1), _Shared()
    for update in ideal.watch(updates):
        running.add(update)
        shared.add(update.tensors)
    mean = running.values()
    corrected: dict[Slot, Tensor] = {}
    for path in adapter.factors():
        slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
        if slot_A in shared.differing and slot_B in shared.differing:
            means = LoraFactors(mean[slot_A], mean[slot_B])
            target_DR, gram_RR = ideal.times(path, mean[slot_A].T, elsewhere=means), mean[slot_A] @ mean[slot_A].T
            corrected[slot_B] = mean[slot_B] + solve(_Layer(mean[slot_B], target_DR, gram_RR, ideal.norm(path)))
    return adapter.with_rounded({**mean, **corrected})


class _Shared:
    """Which slots differ between clients, bit for bit; one update is kept to compare with."""

    def __init__(self) -> None:
        self._first: Mapping[Slot, Tensor] = {}
        self.differing: set[Slot] = set()

    def add(self, tensors: Mapping[Slot, Tensor]) -> None:
        self._first = self._first or tensors
        alike = self._first.keys() - self.differing
        self.differing |= {slot for slot in alike if not torch.equal(self._first[slot], tensors[slot])}


def _cosine_distance(lora_B: Tensor, target: Tensor, layer: _Layer) -> tuple[float, Tensor]:
    """Return 1 - cos(delta_W, lora_B A) and its gradient in lora_B."""
    times_gram = lora_B @ layer.gram_RR
    norm = (times_gram * lora_B).sum().sqrt()
    cosine = (target * lora_B).sum() / (layer.ideal_norm * norm)
    return 1 - float(cosine), (cosine / norm) * (times_gram / norm) - target / (layer.ideal_norm * norm)


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"Expected {name} to be finite and at least 0, got {value}")
