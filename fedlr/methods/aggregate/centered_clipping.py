"""Centered clipping: average the updates after those that lie far from the centre were drawn towards it."""

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
class CenteredClipping:
    """v <- v + mean_k (x_k - v) min(1, radius / ||x_k - v||), from v = what was broadcast.

    Source: Karimireddy et al. 2021, sec. 4, https://arxiv.org/abs/2012.10333. There v starts at the step of the round
    before, and clients send a momentum, which their proof against attacks that add up over rounds needs; here clients
    send what they trained, and v starts at no step. Distances are of functions (`fedlr.methods.aggregate.geometry`).
    Biased on purpose: a step is shorter where updates are clipped.

    Guarantees: no client moves the result by more than num_iterations * radius / C; no client's gauge changes it; with
    a radius beyond every update it is the mean. Memory grows with the cohort. Post-processing of released updates.

    Args:
        radius: tau, a length of delta_W without its scale and of the head together; null (ours): the median distance
            in each iteration, which less than half of the updates cannot carry away.
        num_iterations: of the line above.

    Raises: InputError for unequal weights; ValueError without updates, or if they do not all hold the same tensors.
    """

    keeps_coordinates_of_one: ClassVar[bool] = True  # where one factor trains (`fedlr.methods.method`)
    name: ClassVar[str] = "centered_clipping"
    resists: ClassVar[bool] = True  # hostile clients (`fedlr.config.robust_rules`)
    compares_products: ClassVar[bool] = True

    radius: float | None = None
    num_iterations: int = 3

    def __post_init__(self) -> None:
        if self.radius is not None:
            in_range(1e-12, 1e12, radius=self.radius)
        in_range(1, 1000, num_iterations=self.num_iterations)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter at the centre."""
        held = held_updates(updates, rule=self.name)
        coefficients = self.coefficients(adapter, held)
        return combined(adapter, held, coefficients, stay=max(0.0, 1.0 - sum(coefficients)))

    def coefficients(self, adapter: AdapterState, held: Sequence[ClientUpdate]) -> list[float]:
        """Return each update's coefficient at the centre, in ascending client order; what was broadcast has the rest
        to 1."""
        inner_CC = gram(adapter, held)
        return clipped_centre(inner_CC, radius=self.radius, num_iterations=self.num_iterations).tolist()


def clipped_centre(gram_CC: Tensor, *, radius: float | None, num_iterations: int) -> Tensor:
    """Return the coefficients c of v = sum_k c_k x_k, (C,), from inner products alone; their sum is at most 1.

    >>> gram = torch.diag(torch.tensor([1.0, 1.0, 16.0], dtype=torch.float64))
    >>> (12 * clipped_centre(gram, radius=1.0, num_iterations=1)).round(decimals=9).tolist()
    [4.0, 4.0, 1.0]
    """
    num_clients = len(gram_CC)
    found_C = torch.zeros(num_clients, dtype=torch.float64)
    for _ in range(num_iterations):
        distances_C = distances_from(gram_CC, found_C)
        bound = float(distances_C.quantile(0.5)) if radius is None else radius
        shares_C = torch.where(distances_C > bound, bound / distances_C, 1.0) / num_clients
        found_C = found_C * (1.0 - shares_C.sum()) + shares_C
    return found_C
