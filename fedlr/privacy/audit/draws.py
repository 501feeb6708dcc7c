"""Are batches drawn as the accountant assumes, each row by itself with one probability? Exact p-values if they are.

Legend: K draws of a batch, N rows to draw from.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedlr.privacy.audit.finding import worst_of


def count_p_values(
    counts: NDArray[np.int64] | np.int64, *, num: int, probability: NDArray[np.float64] | float
) -> list[float]:
    """Return for each count the two-sided p-value under Binomial(num, probability).

    >>> [round(p, 3) for p in count_p_values(np.array([5, 0, 10]), num=10, probability=0.5)]
    [1.0, 0.002, 0.002]
    """
    low = stats.binom.cdf(counts, num, probability)
    high = stats.binom.sf(counts - 1, num, probability)
    return [float(p) for p in np.minimum(1.0, 2 * np.minimum(low, high)).ravel()]


def sizes_p_value(sizes: NDArray[np.int64], *, num_rows: int, sample_rate: float) -> float:
    """Return the p-value of K sizes of batches under Binomial(N, sample_rate), over all thresholds of a size.

    How many of K sizes reach a threshold is binomial itself, so a cap, a least size or another spread shows at some
    threshold, with no appeal to a limit.

    Args:
        sizes: (K,).

    >>> sizes = np.random.default_rng(0).binomial(20, 0.2, 600)
    >>> sizes_p_value(sizes, num_rows=20, sample_rate=0.2) > 0.01
    True
    >>> sizes_p_value(np.minimum(sizes, 4), num_rows=20, sample_rate=0.2) < 1e-10
    True
    """
    thresholds = np.arange(1, num_rows + 1)
    reached = (sizes[:, None] >= thresholds).sum(axis=0)
    chance = stats.binom.sf(thresholds - 1, num_rows, sample_rate)
    too_large = float(not np.any((sizes > num_rows) | (sizes < 0)))
    return min(too_large, worst_of(count_p_values(reached, num=len(sizes), probability=chance)))


def independence_p_value(joined: NDArray[np.bool_], *, sample_rate: float) -> float:
    """Return the p-value of who joined which draw, if all N x K decisions are independent coins of one probability.

    The count of all, each row's over the draws, each pair of rows' joint count, and each pair of draws' overlap are
    binomial.

    Args:
        joined: (K, N), whether a row is in a draw.

    >>> coins = np.random.default_rng(0).random((200, 100)) < 0.2
    >>> independence_p_value(coins, sample_rate=0.2) > 0.01
    True
    >>> independence_p_value(np.repeat(coins[:100], 2, axis=0), sample_rate=0.2) < 1e-10  # each draw made twice
    True
    """
    counts = joined.astype(np.int64)
    num_draws, num_rows = counts.shape
    rows = counts.sum(axis=0)
    pairs = (counts.T @ counts)[np.triu_indices(num_rows, 1)]
    overlaps = (counts @ counts.T)[np.triu_indices(num_draws, 1)]
    return worst_of(
        [
            *count_p_values(rows.sum(), num=joined.size, probability=sample_rate),
            worst_of(count_p_values(rows, num=num_draws, probability=sample_rate)),
            worst_of(count_p_values(pairs, num=num_draws, probability=sample_rate**2)),
            worst_of(count_p_values(overlaps, num=num_rows, probability=sample_rate**2)),
        ]
    )
