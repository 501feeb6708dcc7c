"""A clip bound that follows a quantile: the change and the count together are one Gaussian, of the noise in the ledger.

Mutants killed: the model's noise not raised for the count (z' = z), or raised for a count that costs less than it does;
a count without noise, or with the model's; noise for the first bound in a later round; a mean over those who came; a
change that is no number and is left out of the count, or counts as within.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy import adaptive_clip
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.adaptive_clip import RATE, adaptive_update, bound_of, count_noise, next_bound, sum_multiplier, sums
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.rounds.client_unit import ClientUnit
from fedlr.rounds.round import run_round
from fedlr.runs.units import client_mechanism, loud_count_notes
from fedlr.simulations.simulate import simulate
from fedlr.streams import Draws, SeededRandomness
from tests.simulations.small_runs import SMALL, experiment, federation
from tests.training.small_models import mutant

A, B = Slot("a", "lora_B"), Slot("b", "lora_B")
DOWN = {A: torch.ones(3, 2), B: torch.zeros(2, 2)}
CLIENT = ("privacy=client", "privacy.client_epsilon=20", "privacy.accountant=rdp", "privacy.client_clip_quantile=0.5")


def adaptive(noise: float, cohort: float = 100.0, quantile: float = 0.5) -> Mechanism:
    return Mechanism(noise, 1.0, 1.0, cohort, clip_quantile=quantile, count_noise=count_noise(noise, cohort))


def moved_by(*moves: float) -> list[ClientUpdate]:
    return [ClientUpdate(k, {s: t + x for s, t in DOWN.items()}, 1.0, 0) for k, x in enumerate(moves)]


@pytest.mark.parametrize("cohort", [4.0, 20.0, 1000.0])
@pytest.mark.parametrize("noise", [0.3, 1.0, 8.0, 60.0])
def test_both_sums_together_cost_what_the_ledger_has_by_dp_accounting(noise: float, cohort: float) -> None:
    mechanism = adaptive(noise, cohort)
    of_sum, of_count = sum_multiplier(mechanism), mechanism.count_noise / 0.5
    both = [(dp_accounting.GaussianDpEvent(of_sum), 10), (dp_accounting.GaussianDpEvent(of_count), 10)]
    apart = dp_accounting.rdp.RdpAccountant()
    for event, count in both:
        apart.compose(event, count)
    charged = epsilon([(PoissonSampler(1.0).dp_event(noise), 10)], 1e-5, accountant="rdp")
    assert charged == pytest.approx(apart.get_epsilon(1e-5), rel=1e-9)
    assert 1 < of_sum / noise < 1.02  # what the model pays


def worst_move(mechanism: Mechanism, without: Sequence[ClientUpdate], joined: Sequence[ClientUpdate]) -> float:
    """How far one client moves both sums, each in units of the noise it has, together."""
    (first, count), (second, other) = (sums(u, DOWN, max_norm=0.7) for u in (without, joined))
    apart = math.sqrt(sum(float((first[s] - second[s]).square().sum()) for s in DOWN))
    return math.hypot(apart / (0.7 * sum_multiplier(mechanism)), (count - other) / mechanism.count_noise)


@pytest.mark.parametrize("last", [0.0, 0.05, 0.2, -5.0, 1e30, math.inf, math.nan])
def test_one_client_moves_both_by_no_more_than_one_over_the_noise_multiplier(last: float) -> None:
    mechanism = adaptive(1.3, 20.0)
    some = moved_by(0.1, 3.0, -0.2, last)
    assert worst_move(mechanism, some[:3], some) <= (1 + 1e-9) / mechanism.noise_multiplier
    if abs(last) == 5.0:
        assert worst_move(mechanism, some[:3], some) == pytest.approx(1 / mechanism.noise_multiplier)
        for old, new in (
            ("return float((z**-2 - times**-2) ** -0.5)", "return z"),
            ("mechanism.count_noise / COUNT_SENSITIVITY", "mechanism.count_noise * 4"),
        ):
            wrong = mutant(adaptive_clip, (old, new)).sum_multiplier(mechanism)
            assert math.hypot(1 / wrong, 0.5 / mechanism.count_noise) > 1.005 / mechanism.noise_multiplier


class Noise:
    """The same standard normal numbers again and again, in place of noise."""

    def __init__(self, value: float) -> None:
        self.value = value

    def standard_normal(self, size: int | tuple[int, ...], /) -> np.ndarray:
        return np.full(size, self.value)


Rule = Callable[..., tuple[ClientUpdate, float]]


def is_right(rule: Rule) -> bool:
    """Whether what leaves is both sums, each with its own noise, and nothing else."""
    mechanism, updates = adaptive(2.0, 10.0, quantile=0.7), moved_by(0.05, 0.1, 5.0, math.nan)
    total, halves = sums(updates, DOWN, max_norm=0.7)
    for noise in (0.0, 1.0, -2.0):
        draws: Draws = Noise(noise)  # type: ignore[assignment]
        found, bound = rule(updates, DOWN, mechanism, max_norm=0.7, generator=draws, round_index=3)
        std = sum_multiplier(mechanism) * 0.7
        expected = {s: DOWN[s] + ((total[s] + noise * std) / 10.0).float() for s in DOWN}
        share = (halves + noise * mechanism.count_noise) / 10.0 + 0.5
        if not all(torch.allclose(found.tensors[s], expected[s], atol=1e-6) for s in DOWN):
            return False
        if bound != pytest.approx(0.7 * math.exp(-RATE * (share - 0.7))):
            return False
    return True


def test_what_leaves_is_two_noised_sums_and_the_bound_is_made_of_them() -> None:
    assert sums(moved_by(0.05, 0.1, 5.0, math.nan), DOWN, max_norm=0.7)[1] == 0.0  # two within, and two not
    assert is_right(adaptive_update)
    total, halves = sums(moved_by(0.05, 0.1), DOWN, max_norm=0.7)
    assert halves == 1.0 and torch.allclose(total[A], torch.full((3, 2), 0.15, dtype=torch.float64), atol=1e-6)
    for old, new in (
        ("* mechanism.count_noise", "* 0"),
        ("* mechanism.count_noise", "* std"),
        ("std = sum_multiplier(mechanism) * max_norm", "std = mechanism.noise_multiplier * max_norm"),
        ("std = sum_multiplier(mechanism) * max_norm", "std = sum_multiplier(mechanism) * mechanism.max_grad_norm"),
        ("/ mechanism.divisor).to", "/ len(list(updates))).to"),
    ):
        assert not is_right(mutant(adaptive_clip, (old, new)).adaptive_update), new
    for old, new in (("else -COUNT_SENSITIVITY", "else 0.0"), ("if norm <= max_norm", "if not norm > max_norm")):
        wrong = mutant(adaptive_clip, (old, new)).sums
        assert wrong(moved_by(0.05, 5.0, 5.0, math.nan), DOWN, max_norm=0.7)[1] != -1.0


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.02, 30.0])
def test_the_bound_comes_to_the_quantile_of_the_norms(quantile: float, start: float) -> None:
    """With little noise; norms are 1, 2, ..., 100 tenths. Seeded."""
    mechanism, draws = adaptive(0.05, 100.0, quantile), np.random.default_rng(0)
    norms, bound = np.arange(1, 101) / 10, start
    for _ in range(120):
        halves = float((np.where(norms <= bound, 0.5, -0.5)).sum() + draws.standard_normal() * mechanism.count_noise)
        bound = next_bound(bound, halves, mechanism)
    assert abs((norms <= bound).mean() - quantile) < 0.1


def test_extremes_stay_in_the_range_of_a_bound() -> None:
    mechanism = adaptive(50.0, 4.0)
    assert next_bound(1e-6, 1e9, mechanism) == 1e-6 and next_bound(1e6, -1e9, mechanism) == 1e6


def test_a_run_follows_the_norms_is_charged_as_ever_and_goes_on_with_its_bound(tmp_path: Path) -> None:
    from tests.simulations.test_client_unit import Pool  # clients of known moves

    f = federation(*CLIENT, "method=fedavg")
    assert f.client_mechanism is not None and f.client_mechanism.clip_quantile == 0.5
    fixed = client_mechanism(experiment(*CLIENT[:-1]))[1]
    assert fixed is not None and fixed.noise_multiplier == f.client_mechanism.noise_multiplier  # the same epsilon

    def unit(name: str) -> ClientUnit:
        budget = PrivacyBudget(1e6, 0.1)
        ledger = PrivacyLedger.create(
            tmp_path / name, budget, dataset_id="x", randomness="seeded", accountant="rdp", unit="client"
        )
        quiet = Mechanism(0.05, 1.0, 1.0, 4.0, clip_quantile=0.5, count_noise=0.1)
        return ClientUnit(quiet, ledger, randomness=SeededRandomness(0), cohort_size=4)

    for method in ("fedavg", "fedsvd", "fedadam", "fedavgm"):
        g = federation(*CLIENT, f"method={method}")
        states, one = [g.start], unit(method)
        for _ in range(4):
            after, _ = run_round(states[-1], (0, 1, 2, 3), pool=Pool([1e-6] * 4), method=g.method, client_unit=one)
            states.append(after)
        bounds = [bound_of(s.adapter, f.client_mechanism) for s in states]
        assert bounds[0] == f.client_mechanism.max_grad_norm and bounds == sorted(bounds, reverse=True)
        again, _ = run_round(states[2], (0, 1, 2, 3), pool=Pool([1e-6] * 4), method=g.method, client_unit=one)
        assert bound_of(again.adapter, f.client_mechanism) == bounds[3]  # a round that comes again has its own bound
        assert len(read_ledger(tmp_path / method)[1].of(0)) == 4


def test_a_run_states_its_mechanism_and_says_where_a_count_is_mostly_noise(tmp_path: Path) -> None:
    said: list[str] = []
    run_dir = simulate(experiment(*CLIENT, f"tracking.output_dir={tmp_path}"), say=said.append)
    assert recompute(run_dir) == json.loads((run_dir / "privacy.json").read_text())
    (told,) = json.loads((run_dir / "privacy.json").read_text())["mechanisms"]
    assert told["clip_quantile"] == 0.5 and told["count_noise"] == pytest.approx(2.6 * told["noise_multiplier"])
    assert any("follows noise" in line for line in said)
    assert loud_count_notes(adaptive(1.0, 100.0)) == loud_count_notes(None) == ()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["privacy.client_clip_quantile=0.5"], "with privacy.unit=example"),
        ([*CLIENT, "privacy.release_noise=grid"], "privacy.release_noise=grid"),
        ([*CLIENT, "cohort=cyclic", "cohort_size=2", "privacy.mechanism=dp_ftrl"], "privacy.mechanism=dp_ftrl"),
        ([*CLIENT, "privacy.client_clip_quantile=1"], "client_clip_quantile"),
    ],
)
def test_where_there_is_no_proof_it_is_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        compose_experiment([*SMALL, *words])


def test_mechanisms_that_cannot_be_are_refused() -> None:
    for more in ({"clip_quantile": 0.5}, {"count_noise": 1.0}, {"clip_quantile": 1.0, "count_noise": 1.0}):
        with pytest.raises(InputError, match="clip_quantile"):
            Mechanism(1.0, 1.0, 1.0, 4.0, **more)
    with pytest.raises(InputError, match="no proof"):
        Mechanism(1.0, 1.0, 1.0, 4.0, separation=4, bands=2, clip_quantile=0.5, count_noise=3.0)
    with pytest.raises(InputError, match="count_noise above 2"):
        sum_multiplier(Mechanism(4.0, 1.0, 1.0, 4.0, clip_quantile=0.5, count_noise=1.0))
    assert sum_multiplier(Mechanism(0.0, 1.0, 1.0, 4.0, clip_quantile=0.5, count_noise=1.0)) == 0.0
    assert adaptive_clip.COUNT_SENSITIVITY == 0.5
