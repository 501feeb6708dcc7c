"""Samplers: the object that chooses a step's examples also says which event is accounted for it.

An accountant that assumes Poisson draws while the code shuffles understates epsilon by four times and more
(Chua et al. 2024). Tying the two together makes that mistake an error instead of a number.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedlr.errors import InputError
from fedlr.privacy.mechanism import require_noise_multiplier, require_sample_rate
from fedlr.streams import Draws


class UnsupportedSampling(InputError):
    """The way of sampling has no accounted event, so no epsilon may be stated for it."""


class Sampler(Protocol):
    """Chooses the examples of one step, and names the event that a Gaussian release of their sum is."""

    def draw(self, num_examples: int, generator: Draws) -> NDArray[np.int64]:
        """Return the chosen indices in ascending order, each in [0, num_examples)."""
        ...

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Return the event to account for one step."""
        ...


@dataclass(frozen=True)
class PoissonSampler:
    """Every example joins independently with the same probability (Abadi et al. 2016; Balle et al. 2018).

    Guarantees: the batch is never capped, padded or drawn again. It may be empty, or hold everything, and an
        empty batch is a step like any other: it is noised, sent and accounted. What was drawn is secret and
        stays on the device.
    """

    sample_rate: float

    def __post_init__(self) -> None:
        require_sample_rate(self.sample_rate)

    def draw(self, num_examples: int, generator: Draws) -> NDArray[np.int64]:
        """Return the indices of the examples that join.

        >>> PoissonSampler(1.0).draw(3, np.random.default_rng(0)).tolist()
        [0, 1, 2]
        """
        joins = generator.random(num_examples) < self.sample_rate  # one uniform number each, in [0, 1)
        return np.flatnonzero(joins).astype(np.int64)

    def dp_event(self, noise_multiplier: float, *, rows: int = 1) -> dp_accounting.DpEvent:
        """Return the event of one step; add or remove one example, or `rows` of them at once.

        Of one it is the Poisson-subsampled Gaussian. Of k, as many join as a Binomial(k, sample_rate) says, and j of
        them move the sum of clipped gradients by at most j times the clip bound. The worst case is that they all point
        the same way: a mixture of Gaussians whose means are 0, 1, ..., k (Ganesh 2024, "Tight group-level DP guarantees
        for DP-SGD with sampling via mixture of Gaussians mechanisms", https://arxiv.org/abs/2401.10294).
        """
        require_noise_multiplier(noise_multiplier)
        if rows > 1 and self.sample_rate < 1:
            chances = [
                math.comb(rows, drawn) * self.sample_rate**drawn * (1 - self.sample_rate) ** (rows - drawn)
                for drawn in range(rows + 1)
            ]
            kept = [(float(drawn), chance) for drawn, chance in enumerate(chances) if chance > 0]
            return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
                noise_multiplier, *map(tuple, zip(*kept, strict=True))
            )
        noise_multiplier /= rows  # of whole batches all of them move the sum: one Gaussian of k times the sensitivity
        return dp_accounting.PoissonSampledDpEvent(self.sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))


@dataclass(frozen=True)
class ShuffledSampler:
    """A fixed number of examples without replacement: for training without privacy only."""

    batch_size: int

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"Expected batch_size >= 1, got {self.batch_size}")

    def draw(self, num_examples: int, generator: Draws) -> NDArray[np.int64]:
        """Return `batch_size` indices, or all of them where there are fewer."""
        size = min(self.batch_size, num_examples)
        return np.sort(generator.permutation(num_examples)[:size]).astype(np.int64)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Refuse: batches of a fixed size are not Poisson batches.

        Raises:
            UnsupportedSampling: always.
        """
        raise UnsupportedSampling(
            f"Expected Poisson sampling for a private step, got {self}, for which no epsilon can be stated; "
            "use PoissonSampler, or train with privacy=none"
        )
