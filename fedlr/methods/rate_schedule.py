"""What a learning rate is multiplied with in each round: a function of the public round number and nothing else.

It reads no rows and no update, so it costs no epsilon, and a device computes the same factor as its server.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CONSTANT = "constant"
# Of t, rounds since the warm-up, of T in all after it, and of w, rounds of warm-up; 1 at t = 0, never 0.
DECAYS: Mapping[str, Callable[[int, int, int], float]] = {
    CONSTANT: lambda t, T, w: 1.0,
    "linear": lambda t, T, w: (T - t) / T,
    "cosine": lambda t, T, w: (1 + math.cos(math.pi * t / T)) / 2,
    "inverse_sqrt": lambda t, T, w: math.sqrt((w + 1) / (w + t + 1)),
}


@dataclass(frozen=True)
class RateSchedule:
    """A warm-up that rises in equal steps, then a decay.

    linear: as Goyal et al. 2017 warm up and Devlin et al. 2019 decay; cosine: Loshchilov and Hutter 2017, without
    restarts; inverse_sqrt: Vaswani et al. 2017, sec. 5.3. A round's factor is never 0: no round is for nothing.

    Args:
        name: one of `DECAYS`.
        warmup_rounds: w, in which the factor rises by 1 / (w + 1) a round, below num_rounds.
        num_rounds: of the run.
    """

    name: str = CONSTANT
    warmup_rounds: int = 0
    num_rounds: int = 1

    @property
    def is_constant(self) -> bool:
        """Whether every round has the whole rate."""
        return self.name == CONSTANT and not self.warmup_rounds

    def factor(self, round_index: int) -> float:
        """Return the factor of a round, from 0.

        >>> [RateSchedule("linear", warmup_rounds=1, num_rounds=5).factor(t) for t in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
        """
        w = self.warmup_rounds
        if round_index < w:
            return _alike((round_index + 1) / (w + 1))
        return _alike(DECAYS[self.name](round_index - w, max(1, self.num_rounds - w), w))

    def factors(self) -> list[float]:
        """Return the factors of all rounds."""
        return [self.factor(round_index) for round_index in range(self.num_rounds)]

    def over(self, num_rounds: int) -> "RateSchedule":
        """Return the schedule of the same form over another number of rounds.

        >>> RateSchedule("cosine", warmup_rounds=2, num_rounds=20).over(10)
        RateSchedule(name='cosine', warmup_rounds=1, num_rounds=10)
        """
        warmup = min(num_rounds - 1, round(self.warmup_rounds * num_rounds / self.num_rounds))
        return RateSchedule(self.name, warmup, num_rounds)


def _alike(factor: float) -> float:
    """Return a factor to twelve digits: the same on machines whose last bits of a cosine differ."""
    return float(f"{factor:.12g}")


def scheduled_accumulation(momentum: float, kicks: Sequence[float], steps: Sequence[float]) -> float:
    """Return the variance that rounds with kicks of these standard deviations leave in a value that moves by
    v <- b v + kick, w <- w + step v.

    >>> scheduled_accumulation(0.5, [1, 1], [1, 1]), scheduled_accumulation(0.0, [1, 0.5], [1, 1])
    (3.25, 1.25)
    """
    reach, total = 0.0, 0.0
    for kick, step in zip(reversed(kicks), reversed(steps), strict=True):
        reach = step + momentum * reach
        total += (kick * reach) ** 2
    return total
