"""What a client has spent when mechanisms were chosen one after the other, by somebody who saw what came before.

Adding up loss distributions bounds a list of events that was fixed beforehand. Whoever chooses the next event after
seeing releases can spend more than every list that he may end with: 1.4 times delta by a choice of two (the test).
Two rules are proven, and each covers the paths that it decides:

*Announced steps of one mechanism*: a prefix of a list fixed beforehand, whoever stops it and why. The accountant of
the ledger bounds it, loss distributions too.

*Everything else*: a Renyi filter of one order. The Renyi divergences of that order of all steps, the announced ones
included, are added up, and no step is allowed whose sum would exceed the epsilon of the budget (Feldman and Zrnic 2021,
theorem 4.3; the epsilon of a sum by Canonne et al. 2020). The order is fixed by the budget and by the first
mechanism, before anything is released: the best of several orders, chosen when the sums are known, is no filter of
that form. Because the sum is a supermartingale's, the epsilon of the order also holds for what was spent so far.

With "rdp" both rules are one: the order is that by which the first mechanism lasts longest, so that it decides about
this mechanism alone as the best of all orders does. With "pld" the two share delta: what the announced steps need of it
at the budget's epsilon is theirs, the rest is the filter's, and by a union over the two kinds of paths all is
(epsilon, delta)-private. Where no end was announced, as in a simulation, nothing is left for another mechanism.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting

from fedlr.errors.ranges import AccountantName
from fedlr.privacy.accountant import Events, epsilon, longest_lasting_order, renyi_epsilon, spent_delta
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler

MARGIN = 1e-3  # of delta, kept back for the rounding of loss distributions (1e-14, measured; delta is 1e-10 at least)


@dataclass(frozen=True)
class Event:
    """What decides the epsilon of a step."""

    sample_rate: float
    noise_multiplier: float
    rows: int = 1  # of one unit that may be drawn: a person's cap

    @classmethod
    def of(cls, mechanism: Mechanism, *, rows: int = 1) -> "Event":
        """Return the event of a mechanism's step, for a unit of so many rows."""
        return cls(mechanism.sample_rate, mechanism.noise_multiplier, rows)

    def dp_event(self) -> dp_accounting.DpEvent:
        """Return the event to account for."""
        return PoissonSampler(self.sample_rate).dp_event(self.noise_multiplier, rows=self.rows)


@dataclass(frozen=True)
class Steps:
    """Steps of one client.

    Args:
        first: event of the first reservation, which fixes the rule.
        announced: how many steps of it were announced, before any was taken, as all that are to come; None: no end.
        totals: (event, steps), sorted, each event once; one that was reserved and not taken has 0 steps.
    """

    first: Event
    announced: int | None
    totals: tuple[tuple[Event, int], ...]

    @property
    def is_announced(self) -> bool:
        """Whether all of it was announced when it began."""
        ((event, count), *others) = self.totals
        return not others and event == self.first and (self.announced is None or count <= self.announced)


@dataclass(frozen=True)
class RenyiFilter:
    """The rule for whatever was not announced: one Renyi order, and its share of delta (0.0: nothing is allowed)."""

    order: float
    delta: float


@lru_cache(maxsize=65536)
def spent(steps: Steps, budget: PrivacyBudget, accountant: AccountantName) -> float:
    """Return the epsilon of steps that were taken.

    Raises:
        InputError: more steps than can be accounted for.
    """
    if steps.is_announced:
        return epsilon(_events(steps), budget.delta, accountant=accountant)
    if steps.first.rows > 1:
        return math.inf
    rule = renyi_filter(steps.first, steps.announced, budget, accountant)
    # Without a share nothing is allowed. What an earlier version allowed is still told for what it is.
    return renyi_epsilon(_events(steps), rule.delta or budget.delta, order=rule.order)


def would_spend(steps: Steps, budget: PrivacyBudget, accountant: AccountantName) -> float:
    """Return what `spent` will be after steps that are not yet allowed; `inf` where no filter covers them.

    Raises:
        InputError: more steps than can be accounted for.
    """
    if not steps.is_announced and not renyi_filter(steps.first, steps.announced, budget, accountant).delta:
        return math.inf
    return spent(steps, budget, accountant)


@lru_cache(maxsize=1024)
def renyi_filter(first: Event, announced: int | None, budget: PrivacyBudget, accountant: AccountantName) -> RenyiFilter:
    """Return the filter that the first mechanism, its announced steps and the budget fix."""
    if first.rows > 1:
        return RenyiFilter(1.0, 0.0)  # no Renyi divergence of a mixture is at hand: nothing else is allowed
    event, share = first.dp_event(), budget.delta
    if accountant == "pld":
        used = budget.delta if announced is None else spent_delta([(event, announced)], budget.epsilon)
        share = budget.delta * (1 - MARGIN) - used
        share = share if share > MARGIN * budget.delta else 0.0
    usable = PrivacyBudget(budget.epsilon, share or budget.delta)
    return RenyiFilter(longest_lasting_order(event, usable), share)


def _events(steps: Steps) -> Events:
    return [(event.dp_event(), count) for event, count in steps.totals]
