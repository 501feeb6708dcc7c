"""The whole curve of a statement: no number of it is below the truth, nor far above, for each relation (R-L8).

Truth lies between two discretisations of dp-accounting's, one rounded down and one rounded up, or is a closed form.

Mutants this file kills: add where removing costs more, replace taken for add or remove, replace doubled by guess or
with twice the clip bound, several rows at the price of one or of so many times one, a Gaussian of the sampled steps by
the central limit, half the mu of a replacement, rounding down.
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
    from_mixture_gaussian_mechanism,
)
from scipy.stats import norm

from fedlr.privacy import mixtures
from fedlr.privacy.filter import Event
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.mixtures import Mixture, loss_of_mixtures
from fedlr.privacy.profile import LEAST_DELTA, gaussian_delta, gaussian_epsilon, gaussian_mu, is_same_profile, profile
from fedlr.privacy.statement import privacy_statement, recompute
from tests.privacy.ledger_rows import MECHANISM, new_ledger

NEIGHBOURS = dp_accounting.NeighboringRelation
SAMPLED = [(0.032, 1.0, 100), (0.3, 1.5, 20), (0.9, 4.0, 30)]
DELTA = 1e-5

Found = Callable[[Event, int, bool], float]  # of one event so many times, replaced or not: epsilon at DELTA


def ours(event: Event, count: int, replaced: bool) -> float:
    return float(loss_of_mixtures([(event, count)], replaced=replaced, interval=8e-3).get_epsilon_for_delta(DELTA))


@lru_cache
def truth(event: Event, count: int, replaced: bool, *, interval: float = 8e-3) -> tuple[float, float]:
    """Return a lower and an upper bound by dp-accounting alone."""
    relation = NEIGHBOURS.REPLACE_ONE if replaced else NEIGHBOURS.ADD_OR_REMOVE_ONE
    ends = [
        from_gaussian_mechanism(
            event.noise_multiplier,
            pessimistic_estimate=is_upper,
            value_discretization_interval=interval,
            sampling_prob=event.sample_rate,
            neighboring_relation=relation,
        )
        .self_compose(count)
        .get_epsilon_for_delta(DELTA)
        for is_upper in (False, True)
    ]
    return float(ends[0]), float(ends[1])


def check(found: Found) -> None:
    """Raise AssertionError unless both relations have an epsilon that is neither below the truth nor far above."""
    for q, sigma, count in SAMPLED:
        for replaced in (False, True):
            low, high = truth(Event(q, sigma), count, replaced)
            assert low <= found(Event(q, sigma), count, replaced) <= 1.005 * high, (q, sigma, count, replaced)


def only_added(event: Event, count: int, replaced: bool) -> float:
    more = mixtures._discretised(Mixture(np.ones(1), np.zeros(1)), mixtures.drawn(event, sign=-1.0), interval=8e-3)
    return float(PrivacyLossDistribution(more).self_compose(count).get_epsilon_for_delta(DELTA))


def test_each_relation_has_its_own_epsilon_between_dp_accountings_bounds() -> None:
    check(ours)


@pytest.mark.parametrize(
    "mutant",
    [
        only_added,
        lambda event, count, replaced: ours(event, count, False),
        lambda event, count, replaced: ours(event, count, True),
        lambda event, count, replaced: (1 + replaced) * ours(event, count, False),
        lambda event, count, replaced: ours(
            Event(event.sample_rate, event.noise_multiplier / (1 + replaced)), count, False
        ),
        lambda event, count, replaced: ours(event, count, replaced) * 0.99,
    ],
    ids=["only added", "replace as remove", "remove as replace", "doubled", "twice the bound", "rounded down"],
)
def test_another_relation_in_its_place_is_found(mutant: Found) -> None:
    with pytest.raises(AssertionError):
        check(mutant)


def test_several_rows_have_the_epsilon_of_a_binomial_number_of_them() -> None:
    """Against dp-accounting's own mixtures; at the price of one, or of so many times one, it would be found."""
    event, count = Event(0.2, 2.0, rows=3), 4
    mixture = event.dp_event()
    assert isinstance(mixture, dp_accounting.dp_event.MixtureOfGaussiansDpEvent)
    low, high = (
        float(
            from_mixture_gaussian_mechanism(
                mixture.standard_deviation,
                mixture.sensitivities,
                mixture.sampling_probs,
                pessimistic_estimate=is_upper,
                value_discretization_interval=4e-2,
                use_connect_dots=is_upper,
            )
            .self_compose(count)
            .get_epsilon_for_delta(DELTA)
        )
        for is_upper in (False, True)
    )
    assert low <= ours(event, count, False) <= high * 1.001
    alone = ours(Event(0.2, 2.0), count, False)
    for wrong in (alone, 3 * alone, ours(Event(0.6, 2.0), count, False)):
        assert not low <= wrong <= high * 1.001
    assert ours(event, count, True) > ours(event, count, False)


def test_a_replaced_person_costs_what_a_brute_force_over_the_line_says() -> None:
    """One step: sup over half lines of P - e^epsilon Q, with 0, 1 or 2 of two rows drawn on each side."""
    event, q, sigma = Event(0.4, 1.3, rows=2), 0.4, 1.3
    weights, x = [(1 - q) ** 2, 2 * q * (1 - q), q**2], np.linspace(-12, 14, 50_001)
    for epsilon in (0.2, 1.0, 2.0):
        p, other = (sum(w * norm.sf(x, sign * j, sigma) for j, w in enumerate(weights)) for sign in (1, -1))
        exact = float(np.max(p - math.exp(epsilon) * other))
        found = float(loss_of_mixtures([(event, 1)], replaced=True, interval=4e-3).get_delta_for_epsilon(epsilon))
        assert exact <= found + 1e-12 <= 1.002 * exact + 1e-9


def test_without_sampling_all_is_the_closed_form_of_one_gaussian() -> None:
    found = profile(((Event(1.0, 20.0), 50), (Event(1.0, 10.0), 2)), DELTA)
    mu = math.sqrt(50 / 400 + 2 / 100)
    for name, shift in (("add_or_remove", 1), ("replace", 2)):
        told = found[name]
        assert 0 <= told["mu"] - shift * mu <= 1e-6 and "partly" not in told
        assert -1e-12 <= told["rho"] - (shift * mu) ** 2 / 2 <= 1.1e-6
        for point in told["epsilon"]:
            at = point["epsilon"]
            assert gaussian_delta(shift * mu, np.array([at]))[0] <= point["delta"]
            assert gaussian_delta(shift * mu, np.array([at - 2e-6]))[0] > point["delta"], "rounded up, by no more"
            theirs = from_gaussian_mechanism(
                1 / (shift * mu), value_discretization_interval=1e-3
            ).get_epsilon_for_delta(point["delta"])
            assert at == pytest.approx(theirs, abs=2e-3)
    assert [row["epsilon"] for row in found["several"]] == [
        math.ceil(gaussian_epsilon(k * mu, DELTA) * 1e6) / 1e6 for k in (2, 4, 8)
    ]


@pytest.mark.parametrize(("q", "sigma", "count"), SAMPLED)
def test_the_gaussian_above_a_sampled_curve_is_above_it(q: float, sigma: float, count: int) -> None:
    """The smaller mu only where it is said to be: further out it is not, and no central limit's is anywhere near."""
    totals = ((Event(q, sigma), count),)
    theirs = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-2).self_compose(count)
    told = profile(totals, DELTA)["add_or_remove"]
    mu, partly = told["mu"], told["partly"]["mu"]
    assert partly < mu == math.ceil(gaussian_mu(totals) * 1e6) / 1e6
    for delta in (0.3, 0.1, 1e-3, 1e-6, LEAST_DELTA):
        spent = float(theirs.get_epsilon_for_delta(delta))
        assert spent <= gaussian_epsilon(partly, delta) + 2e-2 <= gaussian_epsilon(mu, delta) + 2e-2
    central_limit = q * math.sqrt(count * math.expm1(sigma**-2))
    if q < 0.9:
        assert float(theirs.get_epsilon_for_delta(LEAST_DELTA)) > gaussian_epsilon(central_limit, LEAST_DELTA)


def test_the_headline_is_never_below_the_curve_at_its_own_delta() -> None:
    totals = ((Event(0.05, 0.725), 60),)
    (point,) = (p for p in profile(totals, DELTA, known=5.9923)["add_or_remove"]["epsilon"] if p["delta"] == DELTA)
    assert point["epsilon"] == 5.9923, "the ledger's accountant is an upper bound too"


def test_a_statement_tells_the_curve_of_who_spent_most_or_why_there_is_none(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger.jsonl")
    assert "profile" not in privacy_statement(ledger.path, range(3)), "nobody took a step"
    ledger.reserve(0, MECHANISM, 4, [0, 1])
    ledger.reserve(1, MECHANISM, 4, [0])
    stated = privacy_statement(ledger.path, range(3))
    assert stated["profile"] == profile(((Event.of(MECHANISM), 8),), 1e-5, known=stated["epsilon"]["maximum"])
    another = Mechanism(**{**MECHANISM.__dict__, "noise_multiplier": 30.0})
    assert ledger.reserve(2, another, 2, [0]) == {0: None}
    assert "chosen one after the other" in privacy_statement(ledger.path, range(3))["profile"]["not_stated"]


def test_a_statement_of_before_is_checked_without_the_curve_and_a_wrong_curve_is_found(tmp_path: Path) -> None:
    ledger, path = new_ledger(tmp_path / "ledger.jsonl"), tmp_path / "privacy.json"
    ledger.reserve(0, MECHANISM, 4, [0])
    stated = privacy_statement(ledger.path, [0])
    older = {key: value for key, value in stated.items() if key != "profile"}
    path.write_text(json.dumps(older))
    assert recompute(tmp_path) == older
    stated["profile"]["replace"]["mu"] /= 2
    path.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="other values of profile"):
        recompute(tmp_path)
    stated["profile"]["replace"]["mu"] *= 2
    for factor, is_taken in ((1 - 1e-5, True), (1 + 1e-5, True), (1 - 2e-4, False), (math.nan, False)):
        rounded = json.loads(json.dumps(stated))
        rounded["profile"]["several"][0]["epsilon"] *= factor  # as another processor may round
        path.write_text(json.dumps(rounded))
        if is_taken:
            assert recompute(tmp_path) == rounded
        else:
            with pytest.raises(ValueError, match="other values of profile"):
                recompute(tmp_path)
    for other in ({**stated["profile"], "several": None}, {**stated["profile"], "more": 1}, [], {}):
        assert not is_same_profile(other, stated["profile"])
