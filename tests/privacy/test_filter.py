"""Mechanisms that are chosen after releases stay within the budget, whichever are chosen (R-P16).

The attack: client 0 takes some steps, an observer of their privacy loss chooses what comes next, among all that the
ledger would allow. Every path alone may be within epsilon at delta; what counts is the delta of the whole: the mean
over the first loss of the worst choice. All losses here have closed forms, so no accountant judges itself.

Mutants this file kills (`MUTANTS`): loss distributions added up over chosen events, which was the rule once; a filter
that takes all of delta although announced steps have theirs; an announcement that a second mechanism may change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr

from fedlr.privacy import charges, filter
from fedlr.privacy.accountant import epsilon, renyi_epsilon, spent_delta
from fedlr.privacy.charges import Charge, Charges, Header, read_ledger
from fedlr.privacy.filter import Event, Steps, renyi_filter
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import privacy_statement

BUDGET = PrivacyBudget(2.0, 1e-5)
HEADER = Header.of(BUDGET, dataset_id="reviews", randomness="os", accountant="pld")
LOSSES = 40_001  # points of the integral
Delta = Callable[[np.ndarray], np.ndarray]  # of epsilons, also below 0


def gaussian(noise_multiplier: float) -> Mechanism:
    return Mechanism(noise_multiplier, max_grad_norm=1.0, sample_rate=1.0, divisor=8.0)


FIRST, WIDE = gaussian(20.0), gaussian(9.0)
RARE = Mechanism(0.15, max_grad_norm=1.0, sample_rate=7e-6, divisor=8.0)  # almost never says anything, and then all
TAKEN, ANNOUNCED = 25, 40


def delta_of_gaussian(noise_multiplier: float, steps: int) -> Delta:
    """Balle and Wang 2018: steps of a Gaussian mechanism are one, of mu = sqrt(steps) / sigma."""
    mu = max(np.sqrt(steps) / noise_multiplier, 1e-12)
    return lambda e: ndtr(mu / 2 - e / mu) - np.exp(e) * ndtr(-mu / 2 - e / mu)


def delta_of_rare(e: np.ndarray) -> np.ndarray:
    """One subsampled step: the loss grows with what is seen, so the worst event is all above a threshold."""
    q, sigma = RARE.sample_rate, RARE.noise_multiplier
    inner = (np.exp(e) - 1 + q) / q
    seen = 0.5 + sigma**2 * np.log(np.maximum(inner, 1e-300))
    above = lambda mean: ndtr((mean - seen) / sigma)  # noqa: E731
    return np.where(inner <= 0, 1 - np.exp(e), (1 - q) * above(0.0) + q * above(1.0) - np.exp(e) * above(0.0))


def adaptive_delta(choices: list[Delta], taken: int) -> float:
    """Delta at the budget's epsilon of everything, when the choice is made after the first steps."""
    mu = np.sqrt(taken) / FIRST.noise_multiplier
    loss, width = np.linspace(mu**2 / 2 - 12 * mu, mu**2 / 2 + 12 * mu, LOSSES, retstep=True)
    density = np.exp(-(((loss - mu**2 / 2) / mu) ** 2) / 2) / (mu * np.sqrt(2 * np.pi))
    worst = np.max([choice(BUDGET.epsilon - loss) for choice in choices], axis=0)
    return float(np.sum(density * worst) * width)


def most_steps(book: Charges, mechanism: Mechanism) -> int:
    """The most steps that the ledger would still allow."""
    low, high = 0, 400
    while low < high:
        middle = (low + high + 1) // 2
        fits = book.epsilon_with(0, HEADER, Charge(mechanism, middle)) <= BUDGET.epsilon
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def after_first(path: Path, *, announced: int | None = ANNOUNCED, accountant: Any = "pld") -> PrivacyLedger:
    ledger = PrivacyLedger.create(path, BUDGET, dataset_id="reviews", randomness="os", accountant=accountant)
    assert ledger.reserve(0, FIRST, TAKEN, [0], None, announced) == {0: None}
    return ledger


def whole_is_within_budget(path: Path) -> float:
    """The check that mutants fail; what it returns says that there was something to choose."""
    after_first(path)
    _, book, _ = read_ledger(path)
    more, wide = most_steps(book, FIRST), most_steps(book, WIDE)
    choices = [delta_of_gaussian(FIRST.noise_multiplier, more), delta_of_gaussian(WIDE.noise_multiplier, wide)]
    if book.epsilon_with(0, HEADER, Charge(RARE, 1)) <= BUDGET.epsilon:
        choices.append(delta_of_rare)
    found = adaptive_delta(choices, TAKEN)
    assert found <= BUDGET.delta, f"delta is {found:.3g} where {BUDGET.delta:g} was promised"
    assert more > 0 and wide > 0
    return found


def test_what_is_chosen_after_releases_stays_within_the_budget(tmp_path: Path) -> None:
    assert whole_is_within_budget(tmp_path / "ledger.jsonl") > 0.01 * BUDGET.delta


def test_the_integral_agrees_with_the_accountant_on_one_path() -> None:
    found = adaptive_delta([delta_of_gaussian(20.0, 15)], TAKEN)
    events = [(PoissonSampler(1.0).dp_event(20.0), TAKEN + 15)]
    assert found == pytest.approx(spent_delta(events, BUDGET.epsilon), rel=1e-2)


def added_up(steps: Steps, budget: PrivacyBudget, accountant: Any) -> float:
    return epsilon(filter._events(steps), budget.delta, accountant="pld")


def test_loss_distributions_added_up_over_chosen_events_exceed_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charges, "would_spend", added_up)
    with pytest.raises(AssertionError, match="was promised"):
        whole_is_within_budget(tmp_path / "ledger.jsonl")


def shares_fit(announced: int | None) -> None:
    """What announced steps need of delta, and what the filter has, is delta together."""
    first = Event.of(FIRST)
    rule = renyi_filter(first, announced, BUDGET, "pld")
    event = PoissonSampler(1.0).dp_event(20.0)
    used = BUDGET.delta if announced is None else min(BUDGET.delta, spent_delta([(event, announced)], BUDGET.epsilon))
    assert rule.delta + used <= BUDGET.delta


@pytest.mark.parametrize("announced", [None, 1, 40, 120, 130, 5_000])
def test_announced_steps_and_the_filter_share_delta(announced: int | None) -> None:
    shares_fit(announced)


def test_a_filter_that_takes_all_of_delta_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter, "spent_delta", lambda events, epsilon: 0.0)
    renyi_filter.cache_clear()
    with pytest.raises(AssertionError):
        shares_fit(130)
    renyi_filter.cache_clear()


def test_without_an_announced_end_a_second_mechanism_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """As in a simulation, and in a ledger from before: all of delta is the first mechanism's."""
    ledger = after_first(tmp_path / "ledger.jsonl", announced=None)
    answer = ledger.reserve(1, WIDE, 1, [0])[0]
    assert answer is not None and answer.epsilon_if_trained == float("inf") and answer.reason == "budget_exhausted"
    assert ledger.reserve(1, FIRST, 50, [0]) == {0: None}


def test_one_mechanism_is_decided_as_it_always_was(tmp_path: Path) -> None:
    """By loss distributions to the last step, where its end is announced or never; and by the best order with rdp."""
    event = PoissonSampler(1.0).dp_event(20.0)
    for accountant, announced in (("pld", None), ("pld", 200), ("rdp", None), ("rdp", 3)):
        header = Header.of(BUDGET, dataset_id="reviews", randomness="os", accountant=accountant)  # type: ignore[arg-type]
        book = Charges({0: {0: Charge(FIRST, 3, announced_steps=announced)}})
        fits = [book.epsilon_with(0, header, Charge(FIRST, steps)) <= BUDGET.epsilon for steps in range(60, 130, 3)]
        costs = [epsilon([(event, 3 + steps)], BUDGET.delta, accountant=accountant) for steps in range(60, 130, 3)]  # type: ignore[arg-type]
        assert fits == [cost <= BUDGET.epsilon for cost in costs] and {*fits} == {True, False}


def test_what_is_announced_later_changes_no_rule(tmp_path: Path) -> None:
    """A second announcement would move delta from what was promised to what is chosen."""
    ledger = after_first(tmp_path / "ledger.jsonl")
    assert ledger.reserve(1, WIDE, 1, [0], None, 1_000) == {0: None}
    _, book, _ = read_ledger(tmp_path / "ledger.jsonl")
    rule = renyi_filter(Event.of(FIRST), ANNOUNCED, BUDGET, "pld")
    events = [(PoissonSampler(1.0).dp_event(20.0), TAKEN), (PoissonSampler(1.0).dp_event(9.0), 1)]
    assert book.epsilon(0, HEADER) == renyi_epsilon(events, rule.delta, order=rule.order)


def test_a_mechanism_that_was_met_counts_even_if_no_step_was_taken(tmp_path: Path) -> None:
    ledger = after_first(tmp_path / "ledger.jsonl")
    before = ledger.spent(0)
    ledger.reserve(1, WIDE, 1, [0])
    ledger.settle(1, 0, 0)
    assert ledger.spent(0) > before, "the choice was there"


def test_the_statement_says_by_which_rule(tmp_path: Path) -> None:
    ledger = after_first(tmp_path / "ledger.jsonl")
    assert "announced" in privacy_statement(ledger.path, [0, 1])["accountant"]["composition"]
    ledger.reserve(1, WIDE, 1, [0])
    stated = privacy_statement(ledger.path, [0, 1])
    assert "Feldman and Zrnic" in stated["accountant"]["composition"] and "order" in stated["accountant"]["composition"]


def test_a_ledger_of_two_mechanisms_from_before_is_told_by_the_filter_and_goes_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = after_first(tmp_path / "ledger.jsonl", announced=None)
    with monkeypatch.context() as patch:
        patch.setattr(charges, "would_spend", added_up)
        assert ledger.reserve(1, WIDE, 15, [0]) == {0: None}
    rule = renyi_filter(Event.of(FIRST), None, BUDGET, "pld")
    events = [(PoissonSampler(1.0).dp_event(20.0), TAKEN), (PoissonSampler(1.0).dp_event(9.0), 15)]
    assert ledger.spent(0) == renyi_epsilon(events, BUDGET.delta, order=rule.order) > epsilon(events, BUDGET.delta)
    for mechanism in (FIRST, WIDE):
        assert ledger.reserve(2, mechanism, 1, [0])[0] is not None
