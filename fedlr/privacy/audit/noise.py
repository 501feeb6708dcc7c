"""Is it Gaussian noise of its scale, and is each vector of it drawn anew? P-values under the hypothesis that it is.

The tests of scale and of angles are exact for Gaussian noise, whatever the number of draws; only that of the shape
(Kolmogorov and Smirnov) relies on its limit. Legend: K vectors, V numbers in each.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


def root_mean_square(noise: Floats) -> float:
    """Return the standard deviation of noise whose mean is known to be zero.

    >>> root_mean_square(np.array([3.0, -3.0]))
    3.0
    """
    return float(np.sqrt(np.mean(np.square(noise))))


def scale_p_value(noise: Floats, *, std: float) -> float:
    """Return the two-sided probability of a sum of squares as far out as this one: of N draws it is chi-squared.

    >>> draws = np.random.default_rng(0).standard_normal(40_000)
    >>> scale_p_value(draws, std=1.0) > 0.01, scale_p_value(0.97 * draws, std=1.0) < 1e-10
    (True, True)
    """
    if std == 0:
        return float(not noise.any())
    found = float(np.square(noise / std).sum())
    law = stats.chi2(noise.size)
    return float(min(1.0, 2 * min(law.cdf(found), law.sf(found))))


def normal_p_value(noise: Floats, *, std: float) -> float:
    """Return the p-value of a Kolmogorov-Smirnov test against N(0, std^2)."""
    if std == 0:
        return float(not noise.any())
    return float(stats.kstest(noise.ravel() / std, "norm").pvalue)


def largest_correlation(vectors: Floats) -> tuple[float, float]:
    """Return the largest absolute cosine of two of K vectors, and its p-value over all pairs.

    Between independent Gaussian vectors of V numbers cos^2 is Beta(1/2, (V - 1) / 2), whatever their scales. Vectors
    that are all zero have no direction and are left out: the test of scale finds them.

    Args:
        vectors: (K, V), one a row.

    >>> apart = np.random.default_rng(0).standard_normal((5, 100))
    >>> largest_correlation(apart)[1] > 0.01, largest_correlation(np.vstack([apart, 2 * apart[:1]]))[1] < 1e-10
    (True, True)
    """
    norms = np.linalg.norm(vectors, axis=1)
    vectors = vectors[norms > 0] / norms[norms > 0, None]
    num, size = vectors.shape
    if num < 2 or size < 2:
        return 0.0, 1.0
    cosines = np.abs(vectors @ vectors.T)
    np.fill_diagonal(cosines, 0.0)
    largest = min(1.0, float(cosines.max()))
    tail = float(stats.beta.sf(largest**2, 0.5, (size - 1) / 2))
    return largest, min(1.0, num * (num - 1) / 2 * tail)


def shared_part_p_value(vectors: Floats, *, std: float) -> float:
    """Return the p-value of the scale of the sum of K independent vectors: a small part that all share adds up in it.

    >>> generator = np.random.default_rng(0)
    >>> apart, shared = generator.standard_normal((80, 500)), generator.standard_normal(500)
    >>> shared_part_p_value(apart, std=1.0) > 0.01, shared_part_p_value(apart + 0.2 * shared, std=1.04**0.5) < 1e-10
    (True, True)
    """
    return scale_p_value(vectors.sum(axis=0) / np.sqrt(len(vectors)), std=std)
