"""The whole privacy curve of a list of steps: epsilon at several deltas, for each relation, and the Gaussian above it.

One pair of numbers, epsilon at one delta, is a point of a curve. Every number here is an upper bound, rounded up, of a
list of steps that was fixed beforehand (`fedlr.privacy.filter`); losses are rounded up.

*Replace one*: P is (1-q) N(0) + q N(g), Q is (1-q) N(0) + q N(g'), with ||g||, ||g'|| <= C, whatever else was drawn. Of
a test that N(0) passes with chance c, N(g) passes at most Phi(z + 1/sigma) and N(g') at least Phi(z - 1/sigma), with
c = Phi(z), by Neyman and Pearson. Both are reached at once by a half space where g' = -g, so this pair dominates all
others, and dominating pairs compose, adaptively too (Zhu, Dong and Wang 2022, theorem 10). dp-accounting has the same
pair; `fedlr.privacy.mixtures` computes it in a hundredth of the time, several rows at once among them.

*mu* (Gaussian differential privacy, Dong, Roth and Su 2022): steps without sampling are together one Gaussian mechanism
with mu = sqrt(sum of 1 / sigma^2), and with sampling at least as private as that, because the curve of a mixture with
"nothing was drawn" lies below (joint convexity). No smaller mu bounds the whole curve of sampled steps: if every one of
T draws has the row, with chance q^T, the loss is that Gaussian's, and decides the far tail. Above a delta that is
named, a smaller one bounds it; that is not mu-GDP, and is said beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from fedlr.privacy.accountant import epsilon
from fedlr.privacy.filter import Event, Steps
from fedlr.privacy.mixtures import loss_of_mixtures

DELTAS = (1e-4, 1e-6, 1e-8)  # besides the budget's
LEAST_DELTA = 1e-10  # of the bound by a smaller Gaussian; no loss distribution is asked for less
SEVERAL = (2, 4, 8)
NUM_POINTS = 800
RELATIONS = {"add_or_remove": 1.0, "replace": 2.0}  # by how many clip bounds one unit moves a sum
EXACT = "without sampling the steps are together one Gaussian mechanism with this mu, and rho = mu^2 / 2"
DOMINATED = (
    "an upper bound: the Gaussian mechanism that would be there if every step drew the unit; its far tail is that of "
    "the sampled steps too, so no smaller mu bounds the whole curve, and no smaller rho = mu^2 / 2 is claimed"
)
NOT_FIXED = (
    "mechanisms were chosen one after the other: the filter proves its one Renyi order at the budget's delta, and no "
    "loss distribution bounds what was chosen after releases"
)
INFINITE = "epsilon is infinite"
PARTIAL = (
    "epsilon at every delta from delta_at_least on is at most that of a Gaussian mechanism with this mu; not mu-GDP"
)
BOUNDS = ("epsilon", "mu", "rho")  # of which the last digits depend on how a processor rounds
Totals = tuple[tuple[Event, int], ...]


def profile(totals: Totals, delta: float, *, known: float = math.inf) -> dict[str, Any]:
    """Return the curve of all these steps together, in values that JSON can hold.

    Args:
        totals: (event, how many), of a list that was fixed beforehand; all with noise.
        delta: of the budget; the curve is told at a few others too.
        known: another upper bound of epsilon at this delta (add or remove), as a ledger's accountant computes it.

    Returns:
        `add_or_remove` and `replace` (one unit), each with `epsilon` at several deltas, `mu` and `rho` (zCDP) with
        their meaning; `several`: add or remove k units at once. What is not known is null.

    >>> whole = profile(((Event(1.0, 20.0), 50),), 1e-5)
    >>> whole["add_or_remove"]["mu"], whole["replace"]["mu"]
    (0.353554, 0.707107)
    """
    found: dict[str, Any] = {name: _relation(totals, delta, name) for name in RELATIONS}
    for point in found["add_or_remove"]["epsilon"]:
        if point["delta"] == delta and known < point["epsilon"]:
            point["epsilon"] = _upward(known)
    if all(event.rows == 1 for event, _ in totals):
        found["several"] = [{"count": k, "delta": delta, "epsilon": _of_several(totals, delta, k)} for k in SEVERAL]
    return found


def profile_of(steps: Steps | None, delta: float, *, known: float) -> dict[str, Any] | None:
    """Return the curve of one client's steps, or in a word why none is stated; None where it took no step.

    Args:
        steps: of its ledger.
        delta: of the budget.
        known: its epsilon, by the ledger's own rule.
    """
    totals = tuple(item for item in steps.totals if item[1]) if steps is not None else ()
    if steps is None or not totals:
        return None
    if not math.isfinite(known):
        return {"not_stated": INFINITE}
    return profile(totals, delta, known=known) if steps.is_announced else {"not_stated": NOT_FIXED}


def is_same_profile(told: Any, found: Any) -> bool:
    """Return whether a stated curve is the computed one, but for what another processor or library rounds otherwise.

    Guarantees: no bound is told that is more than 1e-6 and a ten-thousandth below the computed one.
    """
    if isinstance(found, dict):
        if not isinstance(told, dict) or told.keys() != found.keys():
            return False
        return all(
            _is_near(told[key], value) if key in BOUNDS and type(value) is float else is_same_profile(told[key], value)
            for key, value in found.items()
        )
    if isinstance(found, list):
        same = isinstance(told, list) and len(told) == len(found)
        return same and all(is_same_profile(*pair) for pair in zip(told, found, strict=True))
    return type(told) is type(found) and bool(told == found)


def _is_near(told: Any, found: float) -> bool:
    return type(told) in (int, float) and abs(told - found) <= 1e-6 + 1e-4 * abs(found)


def gaussian_mu(totals: Totals, *, shift: float = 1.0) -> float:
    """Return the mu of the Gaussian mechanism that the steps are, or would be without sampling."""
    return shift * math.sqrt(math.fsum(count * (event.rows / event.noise_multiplier) ** 2 for event, count in totals))


def gaussian_delta(mu: float, epsilon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return delta at each epsilon of the Gaussian mechanism with this mu (Balle and Wang 2018, theorem 8).

    >>> float(gaussian_delta(1.0, np.array([1.0])).round(6)[0])
    0.126937
    """
    tail = np.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))
    return np.asarray(np.maximum(0.0, ndtr(-epsilon / mu + mu / 2) - tail))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at a delta of the Gaussian mechanism with this mu; never less, by the end of a bisection.

    >>> round(gaussian_epsilon(1.0, 0.126937), 4)
    1.0
    """
    low, high = 0.0, 1.0
    while gaussian_delta(mu, np.array([high]))[0] > delta:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, np.array([middle]))[0] <= delta else (middle, high)
    return high


def _relation(totals: Totals, delta: float, name: str) -> dict[str, Any]:
    is_sampled = any(event.sample_rate < 1 for event, _ in totals)
    mu = gaussian_mu(totals, shift=RELATIONS[name])
    deltas = sorted({delta, *DELTAS}, reverse=True)
    bounds = {"mu": _upward(mu), "rho": _upward(mu**2 / 2), "mu_means": DOMINATED if is_sampled else EXACT}
    if not is_sampled:
        return {"epsilon": [{"delta": one, "epsilon": _upward(gaussian_epsilon(mu, one))} for one in deltas], **bounds}
    found = _losses(totals, delta, replaced=name == "replace")
    with np.errstate(over="ignore", invalid="ignore"):  # e^epsilon beyond 709: then no smaller mu is found
        return _sampled(found, mu, deltas, bounds)


def _sampled(
    found: PrivacyLossDistribution, mu: float, deltas: Sequence[float], bounds: dict[str, Any]
) -> dict[str, Any]:
    smaller = _mu_above(found.get_delta_for_epsilon, found.get_epsilon_for_delta(LEAST_DELTA), most=mu)
    return {
        "epsilon": [{"delta": one, "epsilon": _json(found.get_epsilon_for_delta(one))} for one in deltas],
        **bounds,
        "partly": {"mu": _upward(smaller), "delta_at_least": LEAST_DELTA, "means": PARTIAL},
    }


def _of_several(totals: Totals, delta: float, rows: int) -> float | None:
    """Return epsilon of adding or removing several units at once: as many are drawn as a binomial says."""
    if all(event.sample_rate == 1 for event, _ in totals):
        return _upward(gaussian_epsilon(gaussian_mu(totals, shift=rows), delta))
    together = tuple((replace(event, rows=rows), count) for event, count in totals)
    return _json(_losses(together, delta, replaced=False).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _losses(totals: Totals, delta: float, *, replaced: bool) -> PrivacyLossDistribution:
    return loss_of_mixtures(totals, replaced=replaced, interval=_interval(totals, delta))


def _interval(totals: Totals, delta: float) -> float:
    """Return a grid on which rounding up adds about a thousandth: errors of steps add up as their losses do."""
    alone = [(replace(event, rows=1).dp_event(), count) for event, count in totals]
    bound = epsilon(alone, delta, accountant="rdp")
    bound = max(1e-3, bound) if math.isfinite(bound) else 1.0
    return 1.5e-2 * bound / math.sqrt(sum(count for _, count in totals))


def _mu_above(delta_at: Callable[[Any], Any], most_epsilon: float, *, most: float) -> float:
    """Return a mu whose curve is above another from epsilon 0 to `most_epsilon`, between the points looked at too.

    Both curves fall: where one is at a point no higher than the other is at the next, it is not above it in between.
    """
    if not math.isfinite(most_epsilon) or most_epsilon <= 0:
        return most
    points = np.linspace(0.0, most_epsilon, NUM_POINTS)
    wanted = np.minimum(np.asarray(delta_at(points))[:-1], 1 - 1e-12)  # above is rounding of the distribution
    low, high = 0.0, most
    if not np.all(gaussian_delta(high, points[1:]) >= wanted):
        return most
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if np.all(gaussian_delta(middle, points[1:]) >= wanted):
            high = middle
        else:
            low = middle
    return high


def _upward(value: float) -> float:
    return math.ceil(value * 1e6) / 1e6


def _json(value: float) -> float | None:
    return _upward(float(value)) if math.isfinite(value) else None
