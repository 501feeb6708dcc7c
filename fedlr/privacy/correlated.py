"""Correlated noise of DP-FTRL: what hides a client in one round is partly taken back in the next ones.

The matrix mechanism with a banded Toeplitz strategy (Denisov et al. 2022, https://arxiv.org/abs/2202.08312;
Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153). The sums x_0, x_1, ... of the rounds leave as x + C^-1 z,
z white noise of multiplier sigma and C lower triangular, C[t, t - j] = c_j for j < b, with a first column of norm 1.
Columns are the banded square root of the matrix of all ones below its diagonal (Kalinin and Lampert 2024,
https://arxiv.org/abs/2405.13763): c_j in proportion to binom(2 j, j) / 4^j. A model adds the rounds up, and in such a
sum the noise of C^-1 z is much smaller than that of z.

Why epsilon stands without any secret draw. C (x + C^-1 z) = C x + z, and C has an inverse: what leaves is the Gaussian
mechanism on C x, also where later x are chosen by earlier releases (Denisov et al., theorem 2.1). A client whose
participations are b rounds apart or more moves C x by columns of which no two share a row: by the root of the sum of
their squared norms, at most sqrt(k) clip bounds for k participations. That is k Gaussians of multiplier sigma, and is
accounted as such. Where two participations could lie closer, nothing is proven here: that is refused.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Size, Tensor

from fedlr.adapters.state import Slot
from fedlr.streams import Draws


def square_root_bands(bands: int) -> NDArray[np.float64]:
    """Return the first column of the strategy, (bands,), of norm 1; of one band it is white noise.

    >>> square_root_bands(3).round(3).tolist()
    [0.848, 0.424, 0.318]
    """
    found = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])
    return found / np.linalg.norm(found)


def sum_noise(bands: int, num_rounds: int) -> float:
    """Return the noise in the sum of all rounds so far, its root mean square over rounds, for white noise of size 1.

    >>> [round(sum_noise(bands, 40), 2) for bands in (1, 5, 20)]
    [4.53, 2.57, 2.07]
    """
    impulse = np.zeros(num_rounds)
    impulse[0] = 1.0
    of_sum = np.cumsum(lfilter([1.0], square_root_bands(bands), impulse))
    return math.sqrt(float(np.cumsum(of_sum**2).mean()))


def best_bands(most: int, num_rounds: int) -> int:
    """Return how many bands, `most` at most, leave the least noise in sums of rounds.

    >>> best_bands(4, 40), best_bands(40, 40)
    (4, 28)
    """
    return min(range(1, min(most, num_rounds) + 1), key=lambda bands: sum_noise(bands, num_rounds))


class CorrelatedNoise:
    """Noise of unit multiplier, round by round; a function of the rounds' streams alone.

    Nothing of it is written: with streams that can be drawn again a run that goes on draws the rounds before again, and
    with others it cannot go on.
    """

    def __init__(self, bands: int, white: Callable[[int], Draws], *, is_repeatable: bool) -> None:
        """Start before round 0; `white` returns the stream of a round."""
        self._column, self._white, self._is_repeatable = square_root_bands(bands), white, is_repeatable
        self._next = 0
        self._before: deque[Mapping[Slot, Tensor]] = deque(maxlen=bands - 1)  # the newest first

    def of_round(self, round_index: int, shapes: Mapping[Slot, Size]) -> Mapping[Slot, Tensor]:
        """Return the noise of a round on tensors of these shapes, the same in every round; float64.

        Raises:
            ValueError: rounds were left out or come again and cannot be drawn again, or the shapes are others.
        """
        if round_index != self._next and not self._is_repeatable:
            raise ValueError(f"Expected round {self._next}, whose noise follows from those before, got {round_index}")
        if round_index < self._next:
            self._next = 0
            self._before.clear()
        while self._next < round_index:
            self._draw(shapes)
        return self._draw(shapes)

    def _draw(self, shapes: Mapping[Slot, Size]) -> Mapping[Slot, Tensor]:
        draws, found = self._white(self._next), {}
        for slot, shape in sorted(shapes.items()):
            noise = torch.from_numpy(draws.standard_normal(tuple(shape)))
            for weight, before in zip(self._column[1:].tolist(), self._before, strict=False):
                if before[slot].shape != shape:
                    raise ValueError(f"Expected a tensor of {before[slot].shape} in each round, got {shape} of {slot}")
                noise -= weight * before[slot]
            found[slot] = noise / float(self._column[0])
        self._before.appendleft(found)
        self._next += 1
        return found
