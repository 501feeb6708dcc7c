"""The mechanism of one private step, its budget, and its noise.

One step is the Poisson-subsampled Gaussian mechanism (Abadi et al. 2016, algorithm 1): each example of the
client joins with probability `sample_rate`, its gradient is clipped to norm `max_grad_norm`, the clipped
gradients are summed, noise of standard deviation `noise_multiplier * max_grad_norm` is added to the sum, and
the sum is divided by `divisor`.

Nothing here is computed from data. The divisor is a number of the configuration: dividing by how many
examples were drawn, or held, would let one example move more than its clipped gradient.
"""

import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fedlr.errors import InputError
from fedlr.errors.ranges import (
    LARGEST_DIVISOR,
    LARGEST_GRAD_NORM,
    LARGEST_NOISE_MULTIPLIER,
    LEAST_DIVISOR,
    LEAST_GRAD_NORM,
    LEAST_NOISE_MULTIPLIER,
)
from fedlr.privacy.grid import SENSITIVITY, Grid, ReleaseNoise
from fedlr.streams import Draws


@dataclass(frozen=True)
class PrivacyBudget:
    """What every client may spend on its own examples over the life of its ledger.

    Guarantees: nothing by itself. The unit is one training example of one client, the relation add or remove
        one.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (_is_number(self.epsilon) and 0 < self.epsilon < math.inf):
            raise InputError(f"Expected privacy.epsilon > 0, got {self.epsilon}")
        if not (_is_number(self.delta) and 0 < self.delta < 1):
            raise InputError(f"Expected privacy.delta in (0, 1), got {self.delta}")


@dataclass(frozen=True)
class Mechanism:
    """Public constants of a private step. Two of them decide epsilon: `noise_multiplier` and `sample_rate`.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, in units of `max_grad_norm`. 0 is no
            privacy.
        max_grad_norm: L2 norm to which each example's gradient, over all trained tensors together, is
            clipped.
        sample_rate: probability with which each example joins a step.
        divisor: number by which the noisy sum is divided, usually the expected batch size.
        release_noise: "float": drawn and added in floating point; "grid": on a grid, drawn exactly
            (`fedlr.privacy.grid`). Epsilon is the same.
        separation: of the client unit, rounds from one participation of a client to its next, at least: it is charged
            once in so many.
        bands: of correlated noise (`fedlr.privacy.correlated`), at most `separation`; 1: each round's is its own.
        clip_quantile: of the client unit, the share of clients whose change the bound is to hold
            (`fedlr.privacy.adaptive_clip`), which begins at `max_grad_norm`; 0: the bound is fixed.
        count_noise: standard deviation of the noise on the count behind it; `noise_multiplier` is of both together.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    divisor: float
    release_noise: ReleaseNoise = "float"
    separation: int = 1
    bands: int = 1
    clip_quantile: float = 0.0
    count_noise: float = 0.0

    def __post_init__(self) -> None:
        require_noise_multiplier(self.noise_multiplier)
        require_sample_rate(self.sample_rate)
        _require_within("privacy.max_grad_norm", self.max_grad_norm, LEAST_GRAD_NORM, LARGEST_GRAD_NORM)
        _require_within("divisor", self.divisor, LEAST_DIVISOR, LARGEST_DIVISOR)
        if self.release_noise not in get_args(ReleaseNoise):
            raise InputError(f"Expected privacy.release_noise to be float or grid, got {self.release_noise!r}")
        if not 1 <= self.bands <= self.separation:
            raise InputError(
                f"Expected privacy.bands in [1, {self.separation}], the rounds between two participations of a client, "
                f"got {self.bands}: beyond them nothing is proven"
            )
        if self.separation > 1 and self.sample_rate != 1:
            raise InputError(f"Expected a sample_rate of 1 of clients in a fixed order, got {self.sample_rate}")
        if not (0 <= self.clip_quantile < 1 and (self.clip_quantile > 0) is (self.count_noise > 0)):
            raise InputError(
                f"Expected a clip_quantile in (0, 1) and count_noise > 0, or 0 of both, got {self.clip_quantile} and "
                f"{self.count_noise}"
            )
        if self.clip_quantile and (self.bands > 1 or self.release_noise != "float"):
            raise InputError("Expected bands=1 and release_noise=float with a clip_quantile, got others: no proof")
        if self.bands > 1 and self.release_noise != "float":
            raise InputError("Expected privacy.release_noise=float with correlated noise, got grid: it has no integers")

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum: on a grid it allows for what rounding adds to the sensitivity."""
        of_clip = self.noise_multiplier * self.max_grad_norm
        return of_clip * SENSITIVITY if self.release_noise == "grid" else of_clip

    def constants(self) -> dict[str, Any]:
        """Return the constants by name; what earlier versions did not have only where it is not as it was there."""
        later = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {key: value for key, value in asdict(self).items() if key not in later or later[key] != value}

    def grid(self, num_values: int) -> Grid | None:
        """Return the grid of a sum of so many values; None where noise is floating point, or there is none."""
        if self.release_noise == "float" or self.noise_multiplier == 0:
            return None
        return Grid.of(max_norm=self.max_grad_norm, noise_multiplier=self.noise_multiplier, num_values=num_values)

    def grid_of(self, total: Iterable[Tensor]) -> Grid | None:
        """Return the grid of a sum of these tensors, which reads their shapes alone."""
        return self.grid(sum(tensor.numel() for tensor in total))


def gaussian_noise(shape: tuple[int, ...], *, std: float, generator: Draws) -> Tensor:
    """Draw independent Gaussian noise.

    The numbers are drawn in float64 and rounded once, to float32. They are not on a grid, as `on_grid` is: an observer
    of the last bits of a sum may learn more than epsilon says (Mironov 2012; the privacy statement says so too).

    Args:
        shape: shape of the tensor.
        std: standard deviation, `noise_multiplier * max_grad_norm` for a sum of clipped gradients.
        generator: noise generator of this client, round and step; never the one that sampled the examples.

    Returns:
        Tensor of that shape, float32, on the CPU.

    >>> float(gaussian_noise((100_000,), std=2.0, generator=np.random.default_rng(0)).std().round(decimals=1))
    2.0
    """
    if not (_is_number(std) and 0 <= std < math.inf):
        raise InputError(f"Expected a standard deviation of noise >= 0, got {std}")
    return torch.from_numpy((generator.standard_normal(shape) * std).astype(np.float32))


def on_grid(total: Tensor, grid: Grid, *, generator: Draws) -> Tensor:
    """Return one tensor of a sum, rounded to the grid and noised on it, in the tensor's type and on its device.

    Args:
        total: private sum.
        grid: `Mechanism.grid` of all the sum's values together, which has the scale of the noise.
        generator: of this step's noise.
    """
    released = torch.from_numpy(grid.release(total.double().cpu().numpy(), generator))
    return released.to(device=total.device, dtype=total.dtype)


def check_delta(delta: float, largest_num_examples: int) -> None:
    """Refuse a delta of 1 / n or more: publishing one example in clear would count as private.

    Args:
        delta: the budget's delta.
        largest_num_examples: examples of the largest client. Private unless sizes are public: the error stays
            local.

    Raises:
        InputError: delta is 1 / n or more.
    """
    if delta * largest_num_examples >= 1:
        limit = f"1/{largest_num_examples} = {1 / largest_num_examples:.3g}"
        raise InputError(
            f"Expected privacy.delta below {limit}, as the largest client has that many examples, got {delta}"
        )


def require_noise_multiplier(value: float) -> None:
    """Raise InputError unless the value is 0, or within the two bounds above."""
    least, most = LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
    if not (_is_number(value) and (value == 0 or least <= value <= most)):
        raise InputError(f"Expected privacy.noise_multiplier to be 0 or in [{least:g}, {most:g}], got {value}")


def require_sample_rate(value: float) -> None:
    """Raise InputError unless the value is in (0, 1]."""
    if not (_is_number(value) and 0 < value <= 1):
        raise InputError(f"Expected sample_rate in (0, 1], got {value}")


def _require_within(key: str, value: float, least: float, most: float) -> None:
    if not (_is_number(value) and least <= value <= most):  # so that nan is refused
        raise InputError(f"Expected {key} in [{least:g}, {most:g}], got {value}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
