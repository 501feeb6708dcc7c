"""RFA: the geometric median of the updates as functions, by the smoothed Weiszfeld algorithm."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate
from fedlr.errors import in_range
from fedlr.methods.aggregate.geometry import combined, distances_from, gram
from fedlr.methods.aggregate.held import held_updates


@dataclass(frozen=True)
class GeometricMedian:
    """Find z that minimises sum_k w_k ||z - x_k||: a mean in which far updates count less.

    Source: Pillutla et al. 2022 (RFA), algorithm 2, https://arxiv.org/abs/1912.13445: coefficients
    w_k / max(nu, ||z - x_k||), until they settle. They run 3 iterations, because each is a secure sum there; here one
    costs C^2 numbers, so it is run to its end. Their nu is a length, 1e-6; ours that share of the median length of the
    updates, whatever their unit. Distances are of functions (`fedlr.methods.aggregate.geometry`). Biased on purpose.

    Guarantees: with less than half of the *weight* hostile, z stays within a constant times the spread of the honest
    updates; no client's gauge changes it; one update, or updates that are all the same, give that. Memory grows with
    the cohort. Post-processing of released updates. Weights may differ: a client of more weight has more say.

    Args:
        smoothing: nu, as above.
        num_iterations: at most.

    Raises: ValueError without updates, for weights without a positive sum, or if they do not all hold the same tensors.
    """

    keeps_coordinates_of_one: ClassVar[bool] = True  # where one factor trains (`fedlr.methods.method`)
    name: ClassVar[str] = "geometric_median"
    resists: ClassVar[bool] = True  # hostile clients (`fedlr.config.robust_rules`)
    compares_products: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True

    smoothing: float = 1e-6
    num_iterations: int = 1000

    def __post_init__(self) -> None:
        in_range(1e-12, 1.0, smoothing=self.smoothing)
        in_range(1, 10**6, num_iterations=self.num_iterations)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter at the geometric median."""
        held = held_updates(updates, rule=self.name, takes_weights=True)
        return combined(adapter, held, self.coefficients(adapter, held))

    def coefficients(self, adapter: AdapterState, held: Sequence[ClientUpdate]) -> list[float]:
        """Return each update's coefficient in the geometric median, in ascending client order; their sum is 1."""
        weights_C = torch.tensor([update.weight for update in held], dtype=torch.float64)
        inner_CC = gram(adapter, held)
        return weiszfeld(inner_CC, weights_C, smoothing=self.smoothing, num_iterations=self.num_iterations).tolist()


def weiszfeld(gram_CC: Tensor, weights_C: Tensor, *, smoothing: float, num_iterations: int) -> Tensor:
    """Return the coefficients of the geometric median, (C,), of sum 1, from inner products alone.

    Raises: ValueError for weights that are negative, or without a positive, finite sum.
    """
    total = float(weights_C.sum())
    if not (weights_C >= 0).all() or not 0 < total < float("inf"):
        raise ValueError(f"Expected non-negative weights of a positive, finite sum, got a sum of {total}")
    found_C = weights_C / total
    least = smoothing * float(gram_CC.diagonal().clamp_min(0.0).sqrt().median())
    if least == 0:  # most did not move at all
        least = 1e-100
    for _ in range(num_iterations):
        pull_C = weights_C / distances_from(gram_CC, found_C).clamp_min(least)
        before_C, found_C = found_C, pull_C / pull_C.sum()
        if float((found_C - before_C).abs().max()) <= 1e-12:
            break
    return found_C
