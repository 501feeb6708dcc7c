"""Updates that hostile clients make up: each attack is a function of what the colluders see, after its paper.

They know everything that is sent in the round, honest updates included, and move together: the strongest adversary that
these papers consider. A *move* is what an update adds to what was broadcast, by tensor. Legend: C clients of the round,
f of them hostile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlr.adapters.state import Slot

Move = Mapping[Slot, Tensor]


@dataclass(frozen=True)
class Seen:
    """What the hostile clients of a round know: moves in float64, by client in ascending order."""

    broadcast: Mapping[Slot, Tensor]  # of the trained block
    own: Sequence[Move]  # what they trained themselves, f of them
    honest: Sequence[Move]  # C - f
    generator: np.random.Generator

    @property
    def mean(self) -> Move:
        """The mean of the honest moves."""
        return {slot: torch.stack([move[slot] for move in self.honest]).mean(dim=0) for slot in self.broadcast}


@dataclass(frozen=True)
class SignFlip:
    """Send what was trained, turned round and `scale` times as long (Li et al. 2019, RSA, sec. 5,
    https://arxiv.org/abs/1811.03761)."""

    scale: float = 1.0

    def __call__(self, seen: Seen) -> list[Move]:
        """Return a move for each hostile client."""
        return [{slot: -self.scale * tensor for slot, tensor in move.items()} for move in seen.own]


@dataclass(frozen=True)
class GaussianNoise:
    """Send noise, `ratio` times as long as honest moves are in that tensor (Blanchard et al. 2017, sec. 5, the Gaussian
    attack, https://arxiv.org/abs/1703.02757)."""

    ratio: float = 10.0

    def __call__(self, seen: Seen) -> list[Move]:
        """Return a move for each hostile client."""
        usual = {s: torch.stack([move[s] for move in seen.honest]).square().mean().sqrt() for s in seen.broadcast}
        return [
            {
                s: self.ratio * usual[s] * torch.from_numpy(seen.generator.standard_normal(t.shape))
                for s, t in own.items()
            }
            for own in seen.own
        ]


@dataclass(frozen=True)
class LittleIsEnough:
    """Send, of every number, the honest mean less z standard deviations: as far as honest clients go, all on one side
    (Baruch et al. 2019, algorithm 3, https://arxiv.org/abs/1902.06156).

    Args:
        z: null: their z_max, the largest at which a majority still has supporters: of C and f, and nothing in small
            cohorts.
    """

    z: float | None = 1.5

    def __call__(self, seen: Seen) -> list[Move]:
        """Return the same move for each hostile client."""
        z = largest_z(len(seen.honest) + len(seen.own), len(seen.own)) if self.z is None else self.z
        moves = {slot: torch.stack([move[slot] for move in seen.honest]) for slot in seen.broadcast}
        sent = {slot: m.mean(dim=0) - z * m.std(dim=0, correction=0) for slot, m in moves.items()}
        return [sent] * len(seen.own)


def largest_z(num_clients: int, num_bad: int) -> float:
    """Return z with Phi(z) = (C - f - s) / (C - f), s = floor(C / 2 + 1) - f the supporters that are needed.

    >>> round(largest_z(50, 24), 4)
    1.4261
    """
    supporters = num_clients // 2 + 1 - num_bad
    share = (num_clients - num_bad - supporters) / (num_clients - num_bad)
    inside = torch.tensor(min(max(share, 1e-9), 1 - 1e-9), dtype=torch.float64)
    return float(torch.special.ndtri(inside))


@dataclass(frozen=True)
class InnerProduct:
    """Send -epsilon times the honest mean: the aggregate turns against it, or a rule of distances finds it near
    (Xie et al. 2020, sec. 4, https://arxiv.org/abs/1903.03936)."""

    epsilon: float = 0.5

    def __call__(self, seen: Seen) -> list[Move]:
        """Return the same move for each hostile client."""
        return [{slot: -self.epsilon * tensor for slot, tensor in seen.mean.items()}] * len(seen.own)


@dataclass(frozen=True)
class ModelReplacement:
    """Send what was trained (on whatever rows), C / f times as long, so that the mean is the colluders' own model
    (Bagdasaryan et al. 2020, sec. 4.2, https://arxiv.org/abs/1807.00459)."""

    def __call__(self, seen: Seen) -> list[Move]:
        """Return a move for each hostile client."""
        boost = (len(seen.honest) + len(seen.own)) / len(seen.own)
        return [{slot: boost * tensor for slot, tensor in move.items()} for move in seen.own]


@dataclass(frozen=True)
class OtherGauge:
    """Send (-B, -A) of what was trained: the same products, and poison for a mean of factors. Ours
    (`fedlr.rounds.outlying`); where one factor trains it sends -B alone, which is no other gauge."""

    def __call__(self, seen: Seen) -> list[Move]:
        """Return a move for each hostile client."""
        return [
            {
                slot: tensor if slot.role == "head" else -tensor - 2 * seen.broadcast[slot].double()
                for slot, tensor in move.items()
            }
            for move in seen.own
        ]
