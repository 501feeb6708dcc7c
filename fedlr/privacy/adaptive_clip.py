"""A clip bound of the client unit that follows a quantile of the updates' norms; the count behind it is accounted.

Andrew, Thakkar, Ramaswamy and McMahan (2021, "Differentially private learning with adaptive clipping", algorithm 1,
https://arxiv.org/abs/1905.03871). Beside its clipped change a client adds b - 1/2 to a second sum, b = 1 where its
change is within the bound C, else 0. Both sums are noised, the model moves by the first, and the next round's bound is

    C <- C exp(-rate (share - quantile)),      share = noised second sum / divisor + 1/2

What it costs. In units of its own noise one client moves the first sum by 1 / z' and the second by 1/2 / s at most, so
both together are one Gaussian of noise multiplier z where z^-2 = z'^-2 + (2 s)^-2 (theorem 1). The ledger has z, so
epsilon is the same as with a fixed bound; the price is z' > z on the model. C of a round is made of earlier releases.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.errors.ranges import LARGEST_GRAD_NORM, LEAST_GRAD_NORM
from fedlr.privacy.client_sum import RELEASED, clipped_change
from fedlr.privacy.mechanism import Mechanism
from fedlr.streams import Draws

RATE = 0.2  # of the bound's logarithm, as in the paper
COUNT_SENSITIVITY = 0.5  # of b - 1/2
SHARE_OF_COHORT = 20  # the paper's noise of the count: a twentieth of the cohort
LEAST_TIMES = 2.6  # or so many times z, so that z' is at most 1.9 % more than z
CLIP = Slot("clip", "max_norm")  # of what a server remembers under this name
NAME = "clip"


def count_noise(noise_multiplier: float, cohort_size: float) -> float:
    """Return the standard deviation of the noise on the count, s.

    >>> count_noise(1.0, 100.0), count_noise(1.0, 20.0)
    (5.0, 2.6)
    """
    return max(cohort_size / SHARE_OF_COHORT, LEAST_TIMES * noise_multiplier)


def sum_multiplier(mechanism: Mechanism) -> float:
    """Return z', the noise multiplier of the sum of changes, such that it and the count together are `mechanism`.

    Raises:
        InputError: the count alone would cost more than both may.

    >>> round(sum_multiplier(Mechanism(1.0, 1.0, 1.0, 100.0, clip_quantile=0.5, count_noise=5.0)), 4)
    1.005
    """
    z, times = mechanism.noise_multiplier, mechanism.count_noise / COUNT_SENSITIVITY
    if z == 0:
        return 0.0
    if not times > z:
        raise InputError(
            f"Expected count_noise above {z / 2:g}, half the noise multiplier, got {mechanism.count_noise:g}"
        )
    return float((z**-2 - times**-2) ** -0.5)


def bound_of(adapter: AdapterState, mechanism: Mechanism) -> float:
    """Return the clip bound of the next round: what the server remembers, at first the mechanism's."""
    kept = adapter.memory.get(NAME)
    return mechanism.max_grad_norm if kept is None else float(kept[CLIP])


def with_bound(adapter: AdapterState, max_norm: float) -> AdapterState:
    """Return an adapter that remembers the bound for the next round."""
    return adapter.remembering(NAME, {CLIP: torch.tensor([max_norm], dtype=torch.float64)})


def next_bound(max_norm: float, noised_halves: float, mechanism: Mechanism) -> float:
    """Return the bound for the next round; a function of what was released alone.

    >>> m = Mechanism(1.0, 1.0, 1.0, 10.0, clip_quantile=0.5, count_noise=5.0)
    >>> [round(next_bound(1.0, halves, m), 3) for halves in (-5.0, 0.0, 5.0)]
    [1.105, 1.0, 0.905]
    """
    share = noised_halves / mechanism.divisor + COUNT_SENSITIVITY
    moved = math.log(max_norm) - RATE * (share - mechanism.clip_quantile)
    return min(LARGEST_GRAD_NORM, max(LEAST_GRAD_NORM, math.exp(max(-700.0, min(700.0, moved)))))


def sums(
    updates: Iterable[ClientUpdate], sent_down: Mapping[Slot, Tensor], *, max_norm: float
) -> tuple[dict[Slot, Tensor], float]:
    """Return the sum of the clipped changes and that of b - 1/2; neither is private yet, and none must leave.

    Unit: one client. With or without one, the first differs by at most `max_norm` and the second by 1/2.
    """
    total = {slot: torch.zeros_like(tensor, dtype=torch.float64) for slot, tensor in sorted(sent_down.items())}
    halves = 0.0
    for update in updates:
        for slot, change in clipped_change(update, sent_down, max_norm=max_norm).items():
            total[slot] += change
        squares = (float((t.double() - sent_down[s].double()).square().sum()) for s, t in update.tensors.items())
        norm = math.sqrt(sum(squares))
        halves += COUNT_SENSITIVITY if norm <= max_norm else -COUNT_SENSITIVITY  # of nan too: it is not within
    return total, halves


def adaptive_update(
    updates: Iterable[ClientUpdate],
    sent_down: Mapping[Slot, Tensor],
    mechanism: Mechanism,
    *,
    max_norm: float,
    generator: Draws,
    round_index: int,
) -> tuple[ClientUpdate, float]:
    """Return the one update that leaves a round, and the bound for the next.

    Args:
        updates: of the cohort, checked, in a fixed order; none is a release like any other.
        sent_down: every tensor that a client sends, as it was broadcast.
        mechanism: `noise_multiplier` of both sums together, `divisor`, `clip_quantile`, `count_noise`.
        max_norm: the bound of this round.
        generator: of this round's noise, and of nothing else.
        round_index: which round.

    Guarantees:
        Unit: one client. Relation: its update counts, or counts as zero. Both results are functions of one Gaussian
        mechanism of noise multiplier `mechanism.noise_multiplier`, and depend on the clients in no other way.
    """
    total, halves = sums(updates, sent_down, max_norm=max_norm)
    std = sum_multiplier(mechanism) * max_norm
    tensors = {}
    for slot, change in total.items():
        noise = torch.from_numpy(generator.standard_normal(tuple(change.shape)))
        start = sent_down[slot]
        tensors[slot] = (start.double() + (change + noise * std) / mechanism.divisor).to(start.dtype)
    halves += float(generator.standard_normal(1)[0]) * mechanism.count_noise
    update = ClientUpdate(RELEASED, tensors, weight=1.0, base_round=round_index)
    return update, next_bound(max_norm, halves, mechanism)
