"""FedProx: a pull back to where the round started, so that clients with unlike data drift less."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint


@dataclass(frozen=True)
class FedProx(ClientRule):
    """Add mu * (theta - theta_start) to the gradient: that of the penalty mu/2 * ||theta - theta_start||^2.

    Source: Li et al. 2020, FedProx, sec. 3.2, https://arxiv.org/abs/1812.06127. There a client solves its penalised
    problem to a gamma of its own; here all take the same number of steps.

    Privacy: theta is a function of noised gradients and theta_start was broadcast, so the penalty needs no clipping and
    no noise. As a part of the loss it would be clipped, example by example, with the rest.

    Guarantees: mu = 0 leaves the gradient as it is, and so does the first step of a round. Under SGD the penalty
    multiplies the distance to the start by 1 - lr * mu a step, so lr * mu belongs below 1; from 2 on it diverges.

    Raises: InputError for a mu that is negative or not finite.
    """

    mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise InputError(f"Expected mu to be finite and at least 0, got {self.mu}")

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the gradient with the penalty's, (C, ...) a slot."""
        return {slot: value + self.mu * (point.values[slot] - point.start[slot]) for slot, value in gradient.items()}
