"""Noise on a grid: a sum is rounded to multiples of a spacing, and moved by a rounded Gaussian, drawn exactly.

A Gaussian that is drawn and added in floating point has gaps that depend on what it is added to, and its last bits can
tell more than epsilon says (Mironov 2012; Holohan and Braghin 2021). Here every sum s is first rounded to the grid
g Z, and what is added is g times an integer.

Why epsilon stands. Let X be a real Gaussian of standard deviation sigma D, drawn for each coordinate. As round(s) is on
the grid, round(s) + g round(X / g) = g round((round(s) + X) / g): what leaves is the Gaussian mechanism on round(s),
and then a rounding, which is post-processing. So whatever holds for a Gaussian of multiplier sigma and sensitivity D
holds here: subsampled or not, composed, by any accountant. So nothing of a discrete Gaussian's own is needed (Canonne,
Kamath and Steinke 2020). Two things are left to show:

- *Sensitivity.* Rounding moves each coordinate by at most g / 2, so that of two sums which differ by C at most the
  rounded ones differ by C + g sqrt(V) at most, with V coordinates. The spacing is a power of two that makes the second
  part at most `ROUNDING` C. Sums are added up in float32, whose rounding of other rows' parts a row can change: for
  that as much again is allowed, 40 times what was ever measured, which is no proof. D is 1 + 2 `ROUNDING` times C.
- *The integer* round(X / g) is drawn exactly. A uniform number is drawn by its first 64 bits; where they leave open, by
  the error bound of the float64 inverse, which integer it is, more bits are drawn and the distribution function is
  computed in as many, until it is decided. How often that happens is seen in the time it takes.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np
from mpmath import mp, mpf, ncdf
from numpy.typing import NDArray
from scipy.special import ndtri

from fedlr.errors import InputError
from fedlr.streams import CHUNK, Draws

ReleaseNoise = Literal["float", "grid"]
ROUNDING = 2.0**-11  # of the clip bound: by how much rounding to the grid may raise the sensitivity
SENSITIVITY = 1 + 2 * ROUNDING  # of a sum on the grid, in clip bounds
MOST_SPACINGS = 2.0**34  # of one standard deviation: beyond it most integers would be left open by 64 bits
INVERSE_ERROR = 1e-14  # of the float64 inverse, in standard deviations and as part of itself; 2e-15 was measured
MILLS = 1.26  # more than (1 - F(x)) / f(x) of a normal number x >= 0


@dataclass(frozen=True)
class Grid:
    """Where sums are rounded to, and how wide the noise on them is."""

    spacing: float
    spacings: float  # in one standard deviation of the noise

    @classmethod
    def of(cls, *, max_norm: float, noise_multiplier: float, num_values: int) -> "Grid":
        """Return the grid of a sum of `num_values` coordinates, of parts that were clipped to `max_norm`.

        Public: nothing here is computed from data.

        Raises:
            InputError: so much noise is more than 2^34 spacings wide.

        >>> Grid.of(max_norm=1.0, noise_multiplier=1.0, num_values=4)
        Grid(spacing=0.000244140625, spacings=4100.000000000004)
        """
        _, exponent = math.frexp(ROUNDING * max_norm / math.sqrt(num_values))
        spacing = math.ldexp(1.0, exponent - 1)  # the largest power of two that is not above
        # Rounded upwards, by more than the products lose.
        spacings = noise_multiplier * SENSITIVITY * max_norm / spacing * (1 + 2.0**-50)
        if spacings > MOST_SPACINGS:
            raise InputError(
                f"Expected noise of at most 2^34 spacings of the grid, got {spacings:.3g} for {num_values} values at "
                f"noise_multiplier={noise_multiplier:g}; lower it, or set privacy.release_noise=float"
            )
        return cls(spacing, spacings)

    def release(self, total: NDArray[np.float64], draws: Draws) -> NDArray[np.float64]:
        """Return a sum on the grid with noise on it; float64, every value a multiple of the spacing."""
        units = np.rint(total / self.spacing)
        units += rounded_normals(units.size, spacings=self.spacings, draws=draws).reshape(units.shape)
        return units * self.spacing


def rounded_normals(count: int, *, spacings: float, draws: Draws) -> NDArray[np.int64]:
    """Return independent integers, each a real normal number of standard deviation `spacings`, rounded.

    Exact: an integer has the probability that the normal distribution gives to what rounds to it.
    """
    found = np.empty(count, dtype=np.int64)
    for start in range(0, count, CHUNK):
        part = found[start : start + CHUNK]
        part[:] = _of_words(np.frombuffer(draws.bytes(8 * part.size), dtype="<u8"), spacings=spacings, draws=draws)
    return found


def _of_words(words: NDArray[np.uint64], *, spacings: float, draws: Draws) -> NDArray[np.int64]:
    """Return the integers of uniform numbers that begin with these bits: 63 of a tail's probability, and the sign."""
    tails = (words >> np.uint64(1)) * 2.0**-64 + 2.0**-65
    normals = -ndtri(tails)
    sizes = normals * spacings
    nearest = np.rint(sizes)
    # The bits to come move the tail by 2^-65, and so the number by MILLS / tail of that at most.
    errors = spacings * (INVERSE_ERROR * (1 + normals) + MILLS * 2.0**-64 / tails)
    is_open = np.abs(sizes - nearest) + errors > 0.5
    is_open |= words < 2  # of the last tail nothing bounds the number
    for place in np.flatnonzero(is_open):
        known = _interval(float(sizes[place]), float(errors[place]), is_last=bool(words[place] < 2))
        nearest[place] = _decided(int(words[place]) >> 1, *known, spacings=spacings, draws=draws)
    signed: NDArray[np.int64] = np.where(words & np.uint64(1), nearest, -nearest).astype(np.int64)
    return signed


def _interval(size: float, error: float, *, is_last: bool) -> tuple[int, int]:
    """Return the least and the largest integer that a size may round to; of the last tail the largest is a guess."""
    least = max(0, math.floor(size - error) - 1)
    return least, least + 1 if is_last else math.ceil(size + error) + 1


def _decided(bits: int, least: int, most: int, *, spacings: float, draws: Draws) -> int:
    """Return the integer of a tail that begins with these 64 bits; draw more of them until it is known."""
    length = 64

    def is_beyond(integer: int) -> bool:
        """Return whether the tail is that of a larger integer."""
        nonlocal bits, length
        while True:
            with mp.workprec(length + 64):
                boundary = ncdf(-(mpf(integer) + mpf(1) / 2) / mpf(spacings)) * mpf(2) ** length
                # One more on each side than the tail's bits leave open, for the rounding of the distribution function.
                if bits + 2 <= boundary:
                    return True
                if bits - 1 >= boundary:
                    return False
            bits = bits << 64 | int.from_bytes(draws.bytes(8), "little")
            length += 64

    while is_beyond(most):
        least, most = most + 1, 2 * most + 1
    return least + bisect_left(range(least, most), True, key=lambda integer: not is_beyond(integer))
