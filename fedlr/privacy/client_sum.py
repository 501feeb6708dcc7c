"""The mechanism of the client unit: one noised sum of clipped updates, in place of the clients' own.

Central DP-FedAvg (McMahan, Ramage, Talwar and Zhang 2018, "Learning differentially private recurrent language models",
algorithm 1, https://arxiv.org/abs/1710.06963). A client's update is what it changed, all tensors that it sends taken as
one vector. It is clipped to norm C, the clipped updates are summed, N(0, (z C)^2 I) is added to the sum, and the result
is divided by a constant. Whatever a server does with that (an SVD, an optimizer, momentum) is post-processing.

The sum is over factors as they are sent, not over their products, and the weights are equal. The divisor is a number of
the configuration: dividing by how many updates came would release that number, and shrink the noise when few came.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.privacy.correlated import CorrelatedNoise
from fedlr.privacy.mechanism import Mechanism
from fedlr.streams import Draws

Change = Mapping[Slot, Tensor]
RELEASED = 0  # the id of what is released: no client's


def clipped_change(update: ClientUpdate, sent_down: Mapping[Slot, Tensor], *, max_norm: float) -> dict[Slot, Tensor]:
    """Return what a client changed, scaled so that all of it together has at most `max_norm`; float64.

    A change that is not finite counts as zero, by itself alone.

    >>> slot = Slot("layer", "lora_B")
    >>> update = ClientUpdate(0, {slot: torch.full((2, 2), 4.0)}, weight=1.0, base_round=0)
    >>> clipped_change(update, {slot: torch.ones(2, 2)}, max_norm=1.0)[slot].norm().item()
    1.0
    """
    change = {slot: tensor.double() - sent_down[slot].double() for slot, tensor in sorted(update.tensors.items())}
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
    if not math.isfinite(norm):
        return {slot: torch.zeros_like(tensor) for slot, tensor in change.items()}
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return {slot: tensor * factor for slot, tensor in change.items()}


def clipped_sum(updates: Iterable[ClientUpdate], sent_down: Mapping[Slot, Tensor], *, max_norm: float) -> Change:
    """Return the sum of the clipped changes, float64, in the order of the updates; zeros of nobody.

    Unit: one client. With or without one, the sum differs by at most `max_norm`, in the norm over all tensors. It is
    not private yet, and must not leave.
    """
    total = {slot: torch.zeros_like(tensor, dtype=torch.float64) for slot, tensor in sorted(sent_down.items())}
    for update in updates:
        for slot, change in clipped_change(update, sent_down, max_norm=max_norm).items():
            total[slot] += change
    return total


def released_update(
    updates: Iterable[ClientUpdate],
    sent_down: Mapping[Slot, Tensor],
    mechanism: Mechanism,
    *,
    generator: Draws,
    round_index: int,
    correlated: CorrelatedNoise | None = None,
) -> ClientUpdate:
    """Return the one update that leaves a round: what was broadcast, moved by the noised sum over the divisor.

    Args:
        updates: of the cohort, checked, in a fixed order; none is a release like any other.
        sent_down: every tensor that a client sends, as it was broadcast.
        mechanism: `max_grad_norm` is the bound of a client's change, `divisor` the constant.
        generator: of this round's noise, and of nothing else.
        round_index: which round.
        correlated: noise in place of `generator`'s, exactly where the mechanism has bands.

    Guarantees:
        Unit: one client. Relation: its update counts, or counts as zero. The result is a Gaussian mechanism of noise
        multiplier `mechanism.noise_multiplier` on the sum, and depends on the clients in no other way. With bands all
        rounds together are: one of that multiplier for each participation of a client.
    """
    total = clipped_sum(updates, sent_down, max_norm=mechanism.max_grad_norm)
    std = mechanism.noise_std
    grid = mechanism.grid_of(total.values())
    if (correlated is None) is (mechanism.bands > 1):
        raise ValueError(f"Expected correlated noise exactly with bands, got {correlated} with {mechanism.bands}")
    noises = correlated.of_round(round_index, {s: t.shape for s, t in total.items()}) if correlated else {}
    tensors = {}
    for slot, change in total.items():
        if noises:
            noised = change + noises[slot] * std
        elif grid is None:
            noised = change + torch.from_numpy(generator.standard_normal(tuple(change.shape)) * std)
        else:
            noised = torch.from_numpy(grid.release(change.numpy(), generator))
        mean = noised / mechanism.divisor
        start = sent_down[slot]
        tensors[slot] = (start.double() + mean).to(start.dtype)
    return ClientUpdate(RELEASED, tensors, weight=1.0, base_round=round_index)
