"""Epsilon of a list of events, and the noise that a budget asks for: all of it computed by dp-accounting.

Unit: one training example of one client. Relation: add or remove one example. A client's events are all its
steps of all rounds; adaptive composition covers that each start model depends on earlier releases. The order
does not matter. The list itself must not depend on releases: events that were chosen after some are a filter's
business (fedlr.privacy.filter).

"pld" adds privacy loss distributions, rounded so that epsilon is an upper bound (Koskela et al. 2020;
Doroshenko et al. 2022). "rdp" is Renyi accounting (Mironov 2017): faster, and 10 to 20 % looser.
"""

import logging
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import dp_accounting

from fedlr.errors import InputError
from fedlr.errors.ranges import MOST_STEPS, AccountantName, require_delta
from fedlr.privacy.mechanism import PrivacyBudget, require_sample_rate
from fedlr.privacy.noise_hints import hint_of, keep_hint
from fedlr.privacy.renyi import epsilon_and_order, is_supported
from fedlr.privacy.sampling import PoissonSampler

Events = Sequence[tuple[dp_accounting.DpEvent, int]]
Accountant = Any  # of dp-accounting, whose questions are not those of its base class
T = TypeVar("T")

GRID = 1000  # a calibrated noise_multiplier is a multiple of 1 / GRID
MOST_GUESSES = 60  # of a search; it doubles from 1 to GRID * 2^20 in 30
COARSE = 3e-2  # interval of a loss distribution that is only asked how large epsilon is
NEAR = 4.0  # times the budget, or a part of it, that the Renyi bound of a hint may be


def epsilon(events: Events, delta: float, *, accountant: AccountantName = "pld") -> float:
    """Return the epsilon, at this delta, of everything in the list together.

    Args:
        events: (event, how many times) in any order; the same event may occur more than once.
        delta: below 1 and not too small for the accountant, for the whole list and not for each event.
        accountant: "pld" or "rdp".

    Returns:
        An upper bound: 0.0 for no event, `inf` where an event has no noise. Results are cached.

    Raises:
        InputError: an event or accountant is not supported, delta is outside its range, or there are more than
            `MOST_STEPS` of one event.

    >>> round(epsilon([(PoissonSampler(0.032).dp_event(1.0), 500)], 1e-5), 3)
    4.605
    >>> epsilon([(PoissonSampler(0.032).dp_event(0.0), 1)], 1e-5)
    inf
    """
    require_delta(delta, accountant)
    return _epsilon(_merged(events), float(delta), accountant)


def spent_delta(events: Events, epsilon: float) -> float:
    """Return the delta, at this epsilon, of everything in the list together, by loss distributions.

    >>> round(spent_delta([(PoissonSampler(0.032).dp_event(1.0), 500)], 4.605) * 1e5, 2)
    1.0
    """
    merged = _merged(events)
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=_interval(merged, delta=1e-5))
    return _composed(accountant, merged, lambda found: float(found.get_delta(epsilon)))


def renyi_epsilon(events: Events, delta: float, *, order: float) -> float:
    """Return the epsilon, at this delta, of the sum of Renyi divergences of one order (Canonne et al. 2020)."""
    accountant = dp_accounting.rdp.RdpAccountant(orders=[order])
    return _composed(accountant, _merged(events), lambda found: float(found.get_epsilon(delta)))


def composed_renyi(event: dp_accounting.DpEvent, delta: float) -> float:
    """Return the epsilon of one event, at this delta, by Renyi accounting over all orders."""
    return _composed(dp_accounting.rdp.RdpAccountant(), [(event, 1)], lambda found: float(found.get_epsilon(delta)))


@lru_cache(maxsize=1024)
def longest_lasting_order(event: dp_accounting.DpEvent, budget: PrivacyBudget) -> float:
    """Return the Renyi order by which the most repetitions of an event stay within a budget.

    >>> longest_lasting_order(PoissonSampler(0.05).dp_event(0.643), PrivacyBudget(6.0, 1e-5))
    3.0
    """

    def spent(count: int) -> float:
        return _renyi([(event, count)], budget.delta)[0]

    most = 1
    while most < MOST_STEPS and spent(most) <= budget.epsilon:
        most = min(2 * most, MOST_STEPS)
    affordable = range(most // 2 + 1, most + 1)  # half of it was, and `most` is not, unless it is the end
    most = most // 2 + bisect_right(affordable, budget.epsilon, key=spent)
    return _renyi([(event, max(1, most))], budget.delta)[1]


def _merged(events: Events) -> tuple[tuple[dp_accounting.DpEvent, int], ...]:
    totals: Counter[dp_accounting.DpEvent] = Counter()
    for event, count in events:
        if count < 0:
            raise InputError(f"Expected a count of events >= 0, got {count} of {event}")
        totals[event] += count
        if totals[event] > MOST_STEPS:
            raise InputError(f"Expected at most {MOST_STEPS} private steps, got {totals[event]} of {event}")
    return tuple(sorted(((event, count) for event, count in totals.items() if count), key=repr))


@lru_cache(maxsize=1024)
def calibrate_noise_multiplier(
    budget: PrivacyBudget, *, sample_rate: float, num_steps: int, accountant: AccountantName = "pld", rows: int = 1
) -> float:
    """Return the least noise multiplier, in thousandths, with which `num_steps` steps stay within the budget.

    Args:
        budget: what one client may spend.
        sample_rate: probability with which an example joins a step.
        num_steps: all steps a client is allowed, over all rounds it may take part in; not those it is
            expected to take.
        accountant: "pld" or "rdp"; of several rows "pld".
        rows: of one person, whose epsilon the budget is; 1: of one example.

    Guarantees:
        `epsilon` of these steps with the returned value is at most `budget.epsilon`, without any tolerance.

    Raises:
        InputError: an argument is out of range, or no noise reaches so small an epsilon under this
            accountant.

    >>> calibrate_noise_multiplier(PrivacyBudget(6.0, 1e-5), sample_rate=0.05, num_steps=60)
    0.725
    """
    require_delta(budget.delta, accountant)
    require_sample_rate(sample_rate)
    if num_steps < 1:
        raise InputError(f"Expected at least 1 private step to calibrate the noise for, got {num_steps}")
    if num_steps > MOST_STEPS:
        raise InputError(f"Expected at most {MOST_STEPS} private steps to calibrate the noise for, got {num_steps}")
    sampler = PoissonSampler(sample_rate)

    def spent(grid_index: int) -> float:
        event = sampler.dp_event(grid_index / GRID, rows=rows)
        return epsilon([(event, num_steps)], budget.delta, accountant=accountant)

    question = (budget, sample_rate, num_steps, accountant)
    kept = hint_of(question) if rows == 1 else None
    if (
        kept is not None
        and _is_near(kept, budget, sampler=sampler, num_steps=num_steps)
        and spent(kept) <= budget.epsilon
    ):
        return kept / GRID
    # The search is coarse, so its answer is only where to look: [low, high] grows until low fails and high
    # passes.
    high = _search(budget, sampler=sampler, num_steps=num_steps, accountant=accountant, rows=rows)
    low, stride = high - 1, 1
    while spent(high) > budget.epsilon:
        low, high, stride = high, high + stride, 2 * stride
    while low > 0 and spent(low) <= budget.epsilon:
        low, high, stride = max(0, low - stride), low, 2 * stride
    passing = range(low + 1, high)
    least = low + 1 + bisect_left(passing, True, key=lambda index: spent(index) <= budget.epsilon)
    if rows == 1:
        keep_hint(question, least)
    return least / GRID


def _is_near(grid_index: int, budget: PrivacyBudget, *, sampler: PoissonSampler, num_steps: int) -> bool:
    """Return whether a Renyi bound of the epsilon lies about where the budget does: far from there a loss distribution
    can take gigabytes."""
    spent = epsilon([(sampler.dp_event(grid_index / GRID), num_steps)], budget.delta, accountant="rdp")
    return budget.epsilon / NEAR <= spent <= budget.epsilon * NEAR


@lru_cache(maxsize=65536)
def _epsilon(events: tuple[tuple[dp_accounting.DpEvent, int], ...], delta: float, accountant: AccountantName) -> float:
    if not events:
        return 0.0
    if accountant == "rdp":
        return _renyi(events, delta)[0]
    interval = _interval(events, delta=delta)
    if interval is None:
        return math.inf
    return _composed(
        dp_accounting.pld.PLDAccountant(value_discretization_interval=interval),
        events,
        lambda a: float(a.get_epsilon(delta)),
    )


def _interval(events: tuple[tuple[dp_accounting.DpEvent, int], ...], *, delta: float) -> float | None:
    """Return the interval of a loss distribution; None where epsilon is infinite."""
    renyi = dp_accounting.rdp.RdpAccountant()
    if not all(renyi.supports(event) for event, _ in events):
        return _interval_of_mixtures(events, delta=delta)
    # Any moderate size keeps the usual interval.
    bound, _ = _renyi(events, delta)
    if not math.isfinite(bound):
        return None
    bound = bound or 1.0  # 0 may be an underflow of the Renyi bound: the loss distribution decides
    # A loss distribution has about epsilon / interval points, and its rounding up costs about one interval.
    # The usual 1e-4 took 9 GB at an epsilon of 10^5 and doubled one of 10^-3 (measured): both ends scale with
    # the answer.
    return max(min(1e-4, 1e-3 * bound), 1e-6 * bound)


def _interval_of_mixtures(events: tuple[tuple[dp_accounting.DpEvent, int], ...], *, delta: float) -> float | None:
    """Return the interval for mixtures of Gaussians, each point of whose loss distribution is found by search.

    They took minutes at the usual 1e-4 (measured); at 5e-4 of the answer, which a coarse one gives, seconds, and
    epsilon, still an upper bound, was larger by 2e-5 of itself.
    """
    coarse = dp_accounting.pld.PLDAccountant(value_discretization_interval=COARSE)
    bound = _composed(coarse, events, lambda a: float(a.get_epsilon(delta)))
    return max(1e-5, min(1e-2, 1e-3 * bound)) if math.isfinite(bound) else None


def _renyi(events: Events, delta: float) -> tuple[float, float]:
    """Return the epsilon of Renyi accounting, and the order that gives it."""
    if not all(is_supported(event) for event, _ in events):
        accountant = dp_accounting.rdp.RdpAccountant()
        found = _composed(accountant, events, lambda a: tuple(a.get_epsilon_and_optimal_order(delta)))
        return float(found[0]), float(found[1])
    with _without_order_warnings():
        return epsilon_and_order(events, delta)


def _composed(accountant: Accountant, events: Events, answer: Callable[[Accountant], T]) -> T:
    try:
        with _without_order_warnings():
            for event, count in events:
                accountant.compose(event, count)
            return answer(accountant)
    except dp_accounting.UnsupportedEventError as error:
        raise InputError(f"Expected an event with a known epsilon for add/remove one example, got {error}") from error


def _search(
    budget: PrivacyBudget, *, sampler: PoissonSampler, num_steps: int, accountant: AccountantName, rows: int
) -> int:
    """Return a grid index near the answer, by a loss distribution ten times coarser and ten times faster.

    Epsilon falls with the noise about as a power of it, so that a secant through the last two points, in logarithms,
    is there in four or five: each of them is a second of work at a small sample rate.
    """

    def fresh() -> dp_accounting.PrivacyAccountant:
        interval = max((1e-3 if rows == 1 else 1e-2) * min(1.0, budget.epsilon), 1e-6 * budget.epsilon)
        return dp_accounting.pld.PLDAccountant(value_discretization_interval=interval)

    def excess(grid_index: int) -> float:
        """Return the logarithm of epsilon over the budget's."""
        event = dp_accounting.SelfComposedDpEvent(sampler.dp_event(grid_index / GRID, rows=rows), num_steps)
        if accountant == "rdp":
            found, _ = _renyi([(event, 1)], budget.delta)
        else:
            found = _composed(fresh(), [(event, 1)], lambda a: float(a.get_epsilon(budget.delta)))
        return math.log(max(found, 1e-12) / budget.epsilon)

    # Start near the central limit's answer: a distribution of far too little noise is slow to compute.
    typical = rows * sampler.sample_rate * math.sqrt(2 * num_steps * math.log(1 / budget.delta)) / budget.epsilon
    least, most = 1, GRID * 2**20
    here = min(most, round(GRID * max(1.0, typical)))
    found = {here: excess(here)}
    slope = -1.0
    for _ in range(MOST_GUESSES):
        # No more than by half or double: beyond, the power is another one.
        factor = min(2.0, max(0.5, math.exp(max(-2.0, min(2.0, -found[here] / slope)))))
        there = min(most, max(least, round(here * factor)))
        if there in found:
            break
        found[there] = excess(there)
        if math.isfinite(found[there]) and math.isfinite(found[here]) and found[there] != found[here]:
            slope = min(-0.1, (found[there] - found[here]) / math.log(there / here))
        here = there
    if here == most and found[here] > 0:
        raise InputError(
            f"Expected a budget that some noise can meet, got epsilon={budget.epsilon} at "
            f"delta={budget.delta}, which {accountant!r} cannot certify for {num_steps} steps; "
            "raise epsilon or use 'pld'"
        )
    return here


@contextmanager
def _without_order_warnings() -> Iterator[None]:
    """Mute one message: a Renyi order that did not converge is left out, which can only raise epsilon."""

    def keep(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
