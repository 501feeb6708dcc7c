"""The epsilon of a few Renyi orders is dp-accounting's own over all of them, to the bit, and so is the order.

Mutants this file kills (`MUTANTS`): a bound from an order that is no whole number, where dp-accounting's divergence is
too large; a divergence at order 1 that is too large; a bound of twice the divergence; repetitions that are not counted.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import dp_accounting
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

from fedlr.privacy import renyi


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Mute what dp-accounting says of orders that did not converge."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    yield
    logging.getLogger("absl").setLevel(logging.WARNING)


def of_all_orders(events: renyi.Events, delta: float) -> tuple[float, float]:
    accountant = dp_accounting.rdp.RdpAccountant()
    for event, count in events:
        accountant.compose(event, count)
    found, order = accountant.get_epsilon_and_optimal_order(delta)
    return float(found), float(order)


def sampled(sample_rate: float, noise_multiplier: float) -> DpEvent:
    return PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))


def drawn(draw: random.Random) -> tuple[list[tuple[DpEvent, int]], float]:
    """Return events of any size, and a delta."""
    events: list[tuple[DpEvent, int]] = []
    for _ in range(draw.choice([1, 1, 2])):
        event = sampled(draw.choice([1.0, 10 ** draw.uniform(-4, 0)]), 10 ** draw.uniform(-1, 3))
        event = draw.choice([event, event, SelfComposedDpEvent(event, 7), GaussianDpEvent(2.0)])
        events.append((event, int(10 ** draw.uniform(0, 6))))
    return events, 10 ** draw.uniform(-12, -1)


CASES = [drawn(random.Random(number)) for number in range(30)] + [
    ([(sampled(0.18, 6.8), 7_000_000)], 1e-4),  # dp-accounting's divergence falls from order 1.1 to 2
    ([(sampled(0.04, 8.6), 311)], 0.066),  # several orders give 0: the first counts
    ([(sampled(0.05, 1.0), 60)], 1e-5),
    ([(SelfComposedDpEvent(sampled(0.0165, 0.65), 25), 161_452), (sampled(0.108, 12.9), 95_780)], 2e-10),
    ([(sampled(0.05, 0.0), 1)], 1e-5),
]


def agree() -> None:
    for events, delta in CASES:
        assert renyi.epsilon_and_order(events, delta) == of_all_orders(events, delta), (events, delta)


def test_a_few_orders_give_what_all_give_to_the_bit() -> None:
    agree()


def test_few_orders_are_evaluated() -> None:
    tried: list[float] = []

    def divergence(order: float) -> float:
        tried.append(order)
        return 60 * renyi.divergence_of(sampled(0.05, 1.0), order)

    renyi.search(divergence, 1e-5, orders=renyi.default_orders(), at_order_one=0.0, slack=0.0)
    assert len(tried) == len(set(tried)) < len(renyi.default_orders()) / 3


def test_what_is_neither_gaussian_nor_sampled_is_not_supported() -> None:
    assert renyi.is_supported(GaussianDpEvent(1.0)) and renyi.is_supported(SelfComposedDpEvent(sampled(0.1, 1.0), 3))
    assert not renyi.is_supported(dp_accounting.dp_event.MixtureOfGaussiansDpEvent(1.0, (0.0, 1.0), (0.5, 0.5)))
    assert not renyi.is_supported(SelfComposedDpEvent(dp_accounting.NoOpDpEvent(), 3))


class Whole(float):
    """An order that says it is a whole number."""

    def is_integer(self) -> bool:
        return True


def not_counted(event: DpEvent, count: int) -> tuple[DpEvent, int]:
    return (event.event if isinstance(event, SelfComposedDpEvent) else event), count


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "bounds from all orders": ("default_orders", lambda: tuple(map(Whole, dp_accounting.rdp.RdpAccountant().orders))),
    "too much at order 1": ("least_divergence", lambda event: 1.0),
    "a bound of twice the divergence": (
        "least_epsilon",
        lambda order, divergence, delta, real=renyi.least_epsilon: real(order, 2 * divergence, delta),
    ),
    "repetitions once": ("_single", not_counted),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_bound_that_is_none_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(renyi, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        agree()
