"""Epsilon by Renyi accounting, from the few orders that can give the least of it.

dp-accounting evaluates 156 orders of an event, 0.3 s, and takes the order of the least epsilon. A Renyi divergence
never falls with its order (van Erven and Harremoes 2014, theorem 3), so that what it is at one order bounds epsilon at
all larger ones from below. Orders that this rules out are not evaluated: some twenty are, by dp-accounting, and the
answer is its answer to the bit. Bounds come from whole orders alone: at others dp-accounting computes an upper bound of
the divergence (no sign of its series is negative), which may be larger than the divergence at a larger order.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import dp_accounting
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

Events = Sequence[tuple[DpEvent, int]]

# What a computed divergence of a whole order may lie off the true one by: of itself, and for each event (seen: 1e-14).
RELATIVE_ERROR = 1e-9
ERROR_OF_EVENT = 1e-11


def is_supported(event: DpEvent) -> bool:
    """Return whether an event is a Gaussian one, of a Poisson sample or not, or one of these many times.

    >>> is_supported(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)))
    True
    """
    single, _ = _single(event, 1)
    sampled = single.event if isinstance(single, PoissonSampledDpEvent) else single
    return isinstance(sampled, GaussianDpEvent)


def epsilon_and_order(events: Events, delta: float) -> tuple[float, float]:
    """Return the least epsilon of everything in the list together, and the order that gives it.

    Args:
        events: (event, how many times), each `is_supported`.
        delta: above 0, for the whole list.

    Returns:
        What `RdpAccountant.get_epsilon_and_optimal_order` returns for these events, to the bit.

    >>> epsilon_and_order([(dp_accounting.GaussianDpEvent(4.0), 2)], 1e-5)
    (1.478121967952188, 13.0)
    """
    orders = default_orders()
    single = [_single(event, count) for event, count in events]
    at_order_one = sum(count * least_divergence(event) for event, count in single)
    slack = ERROR_OF_EVENT * sum(count for _, count in single)

    def divergence(order: float) -> float:
        total = 0.0
        for event, count in single:
            total += count * divergence_of(event, order)
        return total

    found = search(divergence, delta, orders=orders, at_order_one=at_order_one, slack=slack)
    known = sorted(found)
    epsilon, order = dp_accounting.rdp.compute_epsilon(known, [found[order] for order in known], delta)
    return float(epsilon), float(order)


def search(
    divergence: Callable[[float], float], delta: float, *, orders: Sequence[float], at_order_one: float, slack: float
) -> dict[float, float]:
    """Evaluate orders, by halves, until no other can give a smaller epsilon, or one as small.

    Args:
        divergence: of an order.
        delta: of epsilon.
        orders: in ascending order, above 1.
        at_order_one: no more than the divergence at order 1.
        slack: what a divergence may be off by, beside `RELATIVE_ERROR`.

    Returns:
        Divergences by order.
    """
    found: dict[float, float] = {}
    best = math.inf
    gaps = [(tuple(orders), at_order_one)]
    while gaps:
        inside, reached = gaps.pop()
        at_least = max(0.0, reached * (1 - RELATIVE_ERROR) - slack)
        able = [order for order in inside if least_epsilon(order, at_least, delta) <= best]
        if not able:
            continue
        whole = [order for order in inside if able[0] <= order <= able[-1] and order.is_integer()]
        tried = [whole[len(whole) // 2]] if whole else able
        for order in tried:
            found[order] = divergence(order)
            best = min(best, dp_accounting.rdp.compute_epsilon([order], [found[order]], delta)[0])
        if whole:
            middle = tried[0]
            gaps.append((tuple(order for order in inside if order > middle), found[middle]))
            gaps.append((tuple(order for order in inside if order < middle), reached))
    return found


def least_epsilon(order: float, divergence: float, delta: float) -> float:
    """Return no more than the epsilon of an order whose divergence is at least this one (Canonne et al. 2020).

    May be negative, where dp-accounting compares negative ones.
    """
    if order <= 1.01:
        return -math.inf
    bound = divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
    # Of a divergence so small, epsilon may be 0 for another reason.
    return min(bound, 0.0) if delta**2 + math.expm1(-divergence) > 0 else bound


def least_divergence(event: DpEvent) -> float:
    """Return no more than the divergence of a single event at order 1: twice its total variation squared (Pinsker)."""
    sample_rate, gaussian = 1.0, event
    if isinstance(event, PoissonSampledDpEvent):
        sample_rate, gaussian = event.sampling_probability, event.event
    shift = math.erf(1 / (math.sqrt(8) * gaussian.noise_multiplier)) if gaussian.noise_multiplier else 1.0
    return 2.0 * (sample_rate * shift) ** 2


@lru_cache(maxsize=65536)
def divergence_of(event: DpEvent, order: float) -> float:
    """Return the Renyi divergence of one event at one order, by dp-accounting."""
    accountant = RdpAccountant(orders=[order])
    accountant.compose(event)
    return float(accountant.rdp[0])


@cache
def default_orders() -> tuple[float, ...]:
    """Return the orders of dp-accounting."""
    return tuple(float(order) for order in RdpAccountant().orders)


def _single(event: DpEvent, count: int) -> tuple[DpEvent, int]:
    """Return an event that is not itself a repetition, and how often it happens."""
    return _single(event.event, event.count * count) if isinstance(event, SelfComposedDpEvent) else (event, count)
