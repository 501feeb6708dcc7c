"""The number of trials follows its law, and the epsilon of choosing the best is Papernot and Steinke's.

Mutants killed: the epsilon of one trial, where the true divergence of a choice is known; a number of trials that is its
mean, one more, cut off at the top, or of the other law.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import yaml
from scipy.stats import geom, norm, poisson

from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.earlier import earlier_run, with_earlier
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import no_privacy_statement
from fedlr.privacy.trials import Law, Trials, with_trials

NUM_DRAWS = 4000
FALSE_ALARM = 1e-10  # of each check of a law


@pytest.mark.parametrize("law", ["geometric", "poisson"])
@pytest.mark.parametrize(("rate", "noise", "steps"), [(1.0, 2.0, 1), (0.032, 1.0, 500), (0.05, 0.8, 60)])
@pytest.mark.parametrize("mean", [1.0, 10.0])
def test_epsilon_is_that_of_dp_accountings_event_for_twelve_settings(
    law: Law, rate: float, noise: float, steps: int, mean: float
) -> None:
    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    trial = dp_accounting.SelfComposedDpEvent(sampled, steps)
    shape = {"geometric": 1.0, "poisson": np.inf}[law]
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.dp_event.RepeatAndSelectDpEvent(trial, mean, shape))
    found = Trials(mean, law).epsilon([(PoissonSampler(rate).dp_event(noise), steps)], 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)
    assert found >= epsilon([(sampled, steps)], 1e-5, accountant="rdp")  # more than of one


def test_the_bound_is_the_papers() -> None:
    """Theorem 2 of Papernot and Steinke (2022) for a geometric number, eta = 1, of one Gaussian, on other orders."""
    sigma, mean, delta = 4.0, 5.0, 1e-6
    orders = np.linspace(1.01, 400, 40_000)
    rdp = orders / (2 * sigma**2)
    other = np.min((1 - 1 / orders) * rdp + math.log(mean) / orders)
    chosen = rdp + 2 * other + math.log(mean) / (orders - 1)
    by_hand = np.min(chosen + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1))
    found = Trials(mean).epsilon([(PoissonSampler(1.0).dp_event(sigma), 1)], delta)
    assert found == pytest.approx(by_hand, rel=0.02) and found >= by_hand - 1e-9


def delta_of_choice(sigma: float, law: Law, mean: float, epsilon: float) -> float:
    """The true delta, at an epsilon, of the largest of K draws of N(0 or 1, sigma^2), by integration.

    The distribution function of the largest is the probability generating function of K at that of one draw.
    """
    grid = np.linspace(-9 * sigma, 9 * sigma + 1, 400_001)

    def mass(shift: float) -> np.ndarray:
        one = norm.cdf((grid - shift) / sigma)
        p = 1 / mean
        of_best = p * one / (1 - (1 - p) * one) if law == "geometric" else np.exp(mean * (one - 1))
        return np.diff(of_best)

    with_row, without = mass(1.0), mass(0.0)
    both = (with_row - math.exp(epsilon) * without, without - math.exp(epsilon) * with_row)
    return max(float(np.maximum(0, one).sum()) for one in both)


@pytest.mark.parametrize("law", ["geometric", "poisson"])
def test_no_choice_of_the_largest_noised_number_spends_more_and_of_one_trial_is_claimed_too_little(law: Law) -> None:
    sigma, mean, delta = 2.0, 10.0, 1e-5
    events = [(PoissonSampler(1.0).dp_event(sigma), 1)]
    claimed = Trials(mean, law).epsilon(events, delta)
    assert delta_of_choice(sigma, law, mean, claimed) <= delta
    of_one = epsilon(events, delta)  # the mutant: as if nothing had been chosen
    assert delta_of_choice(sigma, law, mean, of_one) > 2 * delta


def law_holds(draw: Callable[[np.random.Generator], int], law: Law, mean: float) -> bool:
    """Whether each of the first 40 numbers comes up as often as it should, by binomial tails."""
    draws = np.random.default_rng(0)
    found = np.bincount([draw(draws) for _ in range(NUM_DRAWS)], minlength=41)[:41]
    expected = geom.pmf(range(41), 1 / mean) if law == "geometric" else poisson.pmf(range(41), mean)
    least = -norm.ppf(FALSE_ALARM / 82)
    spread = np.sqrt(NUM_DRAWS * expected * (1 - expected)) + 1
    return bool((np.abs(found - NUM_DRAWS * expected) < least * spread).all())


@pytest.mark.parametrize("law", ["geometric", "poisson"])
def test_the_number_of_trials_follows_its_law(law: Law) -> None:
    trials, other = Trials(5.0, law), Trials(5.0, "poisson" if law == "geometric" else "geometric")
    assert law_holds(trials.draw, law, 5.0)
    mutants: list[Callable[[np.random.Generator], int]] = [
        lambda draws: 5,
        lambda draws: trials.draw(draws) + 1,
        lambda draws: min(trials.draw(draws), 7),
        other.draw,
    ]
    assert not any(law_holds(wrong, law, 5.0) for wrong in mutants)


def test_what_cannot_be_is_refused() -> None:
    for mean in (0.5, 1e9, math.nan):
        with pytest.raises(InputError, match="privacy.trials"):
            Trials(mean)
    with pytest.raises(InputError, match="trials_law"):
        Trials(2.0, "uniform")  # type: ignore[arg-type]


def test_a_statement_has_the_epsilon_of_the_choice_and_none_where_the_ledger_has_more_than_a_trial(
    tmp_path: Path,
) -> None:
    mechanism = Mechanism(1.0, 1.0, 0.1, 4.0)
    ledger = PrivacyLedger.create(
        tmp_path / "ledger.jsonl", PrivacyBudget(50.0, 1e-5), dataset_id="d", randomness="seeded"
    )
    for round_index in range(2):
        assert ledger.reserve(round_index, mechanism, 3, [0, 1]) == {0: None, 1: None}
    config = {"num_rounds": 4, "trainer": {"num_steps": 3}, "privacy": {"trials": 5, "trials_law": "poisson"}}

    def written(tree: object) -> None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    written(config)
    told = with_trials({"statement": "One."}, tmp_path)
    event = PoissonSampler(0.1).dp_event(1.0)
    assert told["trials"]["epsilon"] == Trials(5.0, "poisson").epsilon([(event, 12)], 1e-5)  # of all announced rounds
    assert told["trials"]["num_steps"] == 12 and "best of a random number of trials (poisson" in told["statement"]
    json.dumps(told)
    written({**config, "num_rounds": 1})
    with pytest.raises(InputError, match="at most 3 steps of one mechanism"):
        with_trials({"statement": "One."}, tmp_path)
    written({**config, "privacy": {"trials": None}})
    assert with_trials({"statement": "One."}, tmp_path) == {"statement": "One."}
    written({**config, "privacy": {"trials": "many"}})
    with pytest.raises(InputError, match="configuration of a run"):
        with_trials({"statement": "One."}, tmp_path)


def test_who_starts_from_a_chosen_run_and_who_chooses_after_a_start_counts_the_choice() -> None:
    one = {**no_privacy_statement(3), "differential_privacy": True, "for_release": True, "delta": 1e-5}
    one = {**one, "epsilon": {"maximum": 5.13}}
    chosen = {**one, "trials": {"epsilon": 8.96}}
    assert earlier_run(chosen)["epsilon"] == 8.96
    for first, second, total in ((chosen, one, 14.09), (one, chosen, 14.09), (chosen, chosen, 17.92)):
        both = with_earlier(second, earlier_run(first))
        assert both["started_from"]["epsilon_sum"] == pytest.approx(total)
        assert earlier_run(both)["epsilon"] == pytest.approx(total)


def test_an_event_without_a_renyi_bound_is_refused() -> None:
    with pytest.raises(InputError, match="known epsilon"):
        Trials(2.0).epsilon([(PoissonSampler(0.1).dp_event(1.0, rows=3), 1)], 1e-5)
