"""Loss distributions of two mixtures of Gaussians: what several rows, or a person's, do to a sampled step.

Of k rows as many are drawn as a Binomial(k, q) says, and j of them move the sum by at most j times the clip bound. The
pair that dominates all others has them point the same way: a mixture with means 0, 1, ..., k against N(0) where they
are removed (Ganesh 2024), against means 0, -1, ..., -k where k others take their place. Of a test that N(0) passes with
chance Phi(z), N(g) with ||g|| <= j passes at most Phi(z + j / sigma) and at least Phi(z - j / sigma), and half spaces
reach all of these bounds at once, so one line of numbers is enough.

The hockey-stick divergence has a closed form, as the loss grows along that line. It is discretised pessimistically and
composed by dp-accounting (Doroshenko et al. 2022), which has the first pair only, and needs minutes for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, identity
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp

from fedlr.privacy.filter import Event

REACH = 10.0  # standard deviations beyond the last mean: the mass outside, below 1e-23, counts as a loss without end
MOST_POINTS = 40_000  # of one step's distribution, times its means
NUM_BRACKETS, HALVINGS = 1000, 27

Array = NDArray[np.float64]
Totals = Sequence[tuple[Event, int]]


@dataclass(frozen=True)
class Mixture:
    """Weights and means of Gaussians with standard deviation 1."""

    weights: Array
    means: Array

    def log_density(self, x: Array) -> Array:
        """Return the logarithm of the density over that of N(0)."""
        terms = self.means * x[:, None] - self.means**2 / 2
        return np.asarray(logsumexp(terms, axis=1, b=self.weights))

    def above(self, x: Array) -> Array:
        """Return the chance of more than x."""
        return np.exp(self.log_above(x))

    def log_above(self, x: Array) -> Array:
        """Return its logarithm."""
        return np.asarray(logsumexp(log_ndtr(self.means - x[:, None]), axis=1, b=self.weights))


def drawn(event: Event, *, sign: float) -> Mixture:
    """Return what the rows of one unit add to a step, in standard deviations of its noise."""
    q = event.sample_rate
    weights = np.array([math.comb(event.rows, j) * q**j * (1 - q) ** (event.rows - j) for j in range(event.rows + 1)])
    counts = np.arange(event.rows + 1, dtype=np.float64)
    kept = weights > 0
    return Mixture(weights[kept], sign * counts[kept] / event.noise_multiplier)


def loss_of_mixtures(totals: Totals, *, replaced: bool, interval: float) -> PrivacyLossDistribution:
    """Return the loss distribution of steps for a unit of `event.rows` rows; epsilon from it is an upper bound.

    Args:
        totals: (event, how many), the noise above 0.
        replaced: whether the unit's rows are replaced by as many others; False: added or removed.
        interval: of the grid of losses, at least; a coarser one is taken where a step's losses reach far.
    """
    nothing = Mixture(np.ones(1), np.zeros(1))
    pairs = []
    for event, count in totals:
        more, less = drawn(event, sign=1.0), drawn(event, sign=-1.0)
        pairs.append((count, [(more, less)] if replaced else [(more, nothing), (nothing, less)]))
    spans = [span for _, both in pairs for pair in both for span in [_span(*pair)]]
    most = MOST_POINTS / max(1 + event.rows for event, _ in totals)
    interval = max([interval, *((high - low) / most for low, high in spans)])
    total = identity(value_discretization_interval=interval)
    for count, both in pairs:
        pmfs = [_discretised(*pair, interval=interval) for pair in both]
        total = total.compose(PrivacyLossDistribution(*pmfs).self_compose(count))
    return total


def _loss(p: Mixture, q: Mixture, x: Array) -> Array:
    return p.log_density(x) - q.log_density(x)


def _span(p: Mixture, q: Mixture) -> tuple[float, float]:
    """Return the losses between which nearly all mass of p lies."""
    ends = np.array([q.means.min() - REACH, p.means.max() + REACH])
    low, high = _loss(p, q, ends)
    return float(low), float(high)


def _discretised(p: Mixture, q: Mixture, *, interval: float) -> pld_pmf.PLDPmf:
    low, high = _span(p, q)
    first, last = math.floor(low / interval), max(1, math.ceil(high / interval))
    losses = np.arange(first, last + 1, dtype=np.float64) * interval
    at = _where(p, q, losses)
    delta = p.above(at) - np.exp(np.minimum(0.0, losses + q.log_above(at)))
    # What rounding could take away is given back: of numbers of order 1, a few units in the last place.
    delta = np.clip(np.minimum.accumulate(delta + 4e-16), 0.0, 1.0)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, delta)


def _where(p: Mixture, q: Mixture, losses: Array) -> Array:
    """Return the points where the loss, which grows, has these values; far out where it never has.

    Found to 1e-9: divergence is the largest over all points, so an error of the point counts by its square.
    """
    table = np.linspace(q.means.min() - 2 * REACH, p.means.max() + 2 * REACH, NUM_BRACKETS)
    found = np.searchsorted(_loss(p, q, table), losses).clip(1, NUM_BRACKETS - 1)
    low, high = table[found - 1], table[found]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_below = _loss(p, q, middle) < losses
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return np.asarray((low + high) / 2)
