"""Correlated noise of DP-FTRL: its sensitivity in the worst pattern of participations, and that it is what was proven.

Mutants killed: a strategy that is not normalised, or has a band more than is accounted; noise of another recursion, of
one tensor only, of another scale, that forgets what was before, or begins anew after a crash (`MUTANTS`, `WRONG`).
"""

import itertools
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

import fedlr.privacy.client_sum
import fedlr.privacy.correlated
from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.client_statement import client_statement
from fedlr.privacy.correlated import CorrelatedNoise, best_bands, square_root_bands, sum_noise
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.rounds.client_unit import ClientUnit
from fedlr.rounds.cohorts import cyclic_cohort
from fedlr.streams import OsRandomness, SeededRandomness, ServerRandomness
from tests.training.small_models import mutant

A, B = Slot("layer", "lora_A"), Slot("layer", "lora_B")
SENT = {A: torch.full((2, 3), 0.5), B: torch.full((4, 2), -1.0)}
NUM_VALUES, NUM_ROUNDS, BANDS = 14, 9, 3
MECHANISM = Mechanism(1.5, 0.7, 1.0, 4.0, separation=3, bands=BANDS)


def strategy(column: np.ndarray, size: int) -> np.ndarray:
    """Return the lower triangular matrix of a first column."""
    found = np.zeros((size, size))
    for t, j in itertools.product(range(size), range(len(column))):
        if t >= j:
            found[t, t - j] = column[j]
    return found


def largest_move(matrix: np.ndarray, separation: int, most: int) -> float:
    """Return how far a client moves `matrix @ x`, over all patterns of participation and all signs of its updates.

    The norm is convex in each update, so on a line its worst are the ends, 1 and -1; a matrix without negative entries
    is moved most where updates of any dimension point the same way, which is on a line too.
    """
    worst, rounds = 0.0, range(len(matrix))
    for number in range(1, most + 1):
        for pattern in itertools.combinations(rounds, number):
            if all(later - earlier >= separation for earlier, later in itertools.pairwise(pattern)):
                for signs in itertools.product((1, -1), repeat=number):
                    worst = max(worst, float(np.linalg.norm(matrix[:, list(pattern)] @ np.array(signs))))
    return worst


def check_sensitivity(module: ModuleType) -> None:
    """Fail unless k participations, `bands` rounds apart or more, move the strategy's image by sqrt(k) at most."""
    for bands, most in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        matrix = strategy(module.square_root_bands(bands), NUM_ROUNDS)
        assert (matrix >= 0).all() and matrix.diagonal().min() > 0, "the proof needs both"
        moved = largest_move(matrix, bands, most)
        possible = min(most, -(-NUM_ROUNDS // bands))
        assert moved <= math.sqrt(possible) * (1 + 1e-12), f"{most} participations, {bands} apart, move {moved}"


def test_no_pattern_of_participations_moves_more_than_is_accounted() -> None:
    check_sensitivity(fedlr.privacy.correlated)
    closer = strategy(square_root_bands(4), NUM_ROUNDS)
    assert largest_move(closer, 3, 3) > math.sqrt(3) * 1.01, "what is refused would be wrong"


MUTANTS = {
    "not normalised": ("found / np.linalg.norm(found)", "found"),
    "a band more": ("range(1, bands)", "range(1, bands + 1)"),
    "normalised by its sum of one norm": ("np.linalg.norm(found)", "np.linalg.norm(found, 4)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_a_strategy_that_moves_more_is_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_sensitivity(mutant(fedlr.privacy.correlated, change))


def white(randomness: ServerRandomness, round_index: int) -> np.ndarray:
    draws = randomness.server_noise(round_index=round_index)
    return np.concatenate([draws.standard_normal(tuple(SENT[slot].shape)).ravel() for slot in (A, B)])


def vector(tensors: dict[Slot, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[slot].double().numpy().ravel() for slot in (A, B)])


def noise_of(module: ModuleType, randomness: SeededRandomness) -> CorrelatedNoise:
    def draws(round_index: int) -> np.random.Generator:
        return randomness.server_noise(round_index=round_index)

    found: CorrelatedNoise = module.CorrelatedNoise(BANDS, draws, is_repeatable=True)
    return found


def released(correlated: ModuleType, client_sum: ModuleType, *, cut_at: int = NUM_ROUNDS) -> np.ndarray:
    """Return the noised sums of all rounds; `cut_at` is before which the process ends and another goes on."""
    randomness, found = SeededRandomness(5), []
    noise = noise_of(correlated, randomness)
    for number in range(NUM_ROUNDS):
        if number == cut_at:
            noise = noise_of(correlated, randomness)
        move = {slot: t + 0.01 * number for slot, t in SENT.items()}
        one = client_sum.released_update(
            [ClientUpdate(0, move, 1.0, number)],
            {slot: t.double() for slot, t in SENT.items()},
            MECHANISM,
            generator=randomness.server_noise(round_index=number),
            round_index=number,
            correlated=noise,
        )
        found.append((vector(dict(one.tensors)) - vector(SENT)) * MECHANISM.divisor)
    return np.stack(found)


def sums() -> np.ndarray:
    """Return what one client adds to each round, clipped; the updates above are within the bound."""
    moved = [
        vector({slot: (t + 0.01 * n).double() - t.double() for slot, t in SENT.items()}) for n in range(NUM_ROUNDS)
    ]
    return np.stack(moved)


def check_release(correlated: ModuleType, client_sum: ModuleType) -> None:
    """Fail unless the strategy's image of what leaves is that of the sums and white noise of the accounted scale."""
    matrix = strategy(square_root_bands(BANDS), NUM_ROUNDS)
    noise = np.stack([white(SeededRandomness(5), number) for number in range(NUM_ROUNDS)])
    for cut_at in (NUM_ROUNDS, 1, 5):
        image = matrix @ released(correlated, client_sum, cut_at=cut_at)
        np.testing.assert_allclose(image, matrix @ sums() + 1.5 * 0.7 * noise, atol=1e-9)


def test_what_leaves_is_the_gaussian_mechanism_on_the_strategys_image_also_after_a_crash() -> None:
    check_release(fedlr.privacy.correlated, fedlr.privacy.client_sum)


WRONG = {
    "another sign": ("noise -= weight", "noise += weight"),
    "the oldest first": ("self._before.appendleft(found)", "self._before.append(found)"),
    "not divided": ("noise / float(self._column[0])", "noise"),
    "forgets": ("maxlen=bands - 1", "maxlen=bands - 2"),
    "begins anew after a crash": ("while self._next < round_index:", "while False:"),
    "one stream for all rounds": ("self._white(self._next)", "self._white(0)"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_noise_of_another_recursion_is_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_release(mutant(fedlr.privacy.correlated, change), fedlr.privacy.client_sum)


@pytest.mark.parametrize("change", ["noises[slot]", "noises[slot] * std * (slot.role == 'lora_B')"])
def test_noise_of_another_scale_or_on_one_tensor_is_seen(change: str) -> None:
    with pytest.raises(AssertionError):
        check_release(fedlr.privacy.correlated, mutant(fedlr.privacy.client_sum, ("noises[slot] * std", change)))


def test_noise_that_cannot_be_drawn_again_is_drawn_in_order_or_not_at_all() -> None:
    shapes = {slot: t.shape for slot, t in SENT.items()}
    noise = CorrelatedNoise(2, lambda t: OsRandomness().server_noise(round_index=t), is_repeatable=False)
    noise.of_round(0, shapes)
    for wrong in (0, 2):
        with pytest.raises(ValueError, match="round 1"):
            noise.of_round(wrong, shapes)
    with pytest.raises(ValueError, match="in each round"):
        noise.of_round(1, {**shapes, A: torch.Size([3, 3])})


def test_correlated_noise_is_smaller_in_the_sum_of_rounds() -> None:
    assert sum_noise(1, 40) == pytest.approx(math.sqrt(41 / 2))
    sizes = [sum_noise(bands, 40) for bands in (1, 2, 5, 10)]
    assert sizes == sorted(sizes, reverse=True) and best_bands(5, 40) == 5 and best_bands(9, 1) == 1
    matrix = np.linalg.inv(strategy(square_root_bands(5), 40))
    assert sizes[2] == pytest.approx(np.linalg.norm(np.tril(np.ones((40, 40))) @ matrix) / math.sqrt(40))


def server(path: Path, *, randomness: str = "seeded", epsilon: float = 1e3) -> PrivacyLedger:
    budget = PrivacyBudget(epsilon, 1e-3)
    return PrivacyLedger.create(
        path,
        budget,
        dataset_id="d",
        randomness=randomness,
        accountant="pld",
        unit="client",  # type: ignore[arg-type]
    )


def test_a_client_is_charged_once_in_a_cycle_and_its_epsilon_is_dp_accountings(tmp_path: Path) -> None:
    ledger = server(tmp_path / "server.jsonl")
    unit = ClientUnit(MECHANISM, ledger, randomness=SeededRandomness(5), cohort_size=2)
    spent = []
    for number in range(7):
        unit.charge(number, "what it asks")
        unit.charge(number, "what it asks")  # of a run that was killed
        unit.release([], SENT, round_index=number)
        spent.append(ledger.spent(0))
    assert sorted(read_ledger(ledger.path)[1].of(0)) == [0, 3, 6]
    assert len(set(spent)) == 3 and [spent[n] for n in (0, 3, 6)] == sorted(set(spent))
    expected = PLDAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(1.5), 3)).get_epsilon(1e-3)
    assert spent[-1] == pytest.approx(expected, rel=2e-3)
    told = client_statement(ledger.path, 6)
    assert told["mechanisms"][0]["bands"] == 3 and "DP-FTRL" in told["mechanisms"][0]["name"]
    assert told["amplification"].startswith("none") and "once in 3 rounds" in told["amplification"]
    taken = [cyclic_cohort(number, num_clients=6, cohort_size=2) for number in range(7)]
    assert max(sum(client in cohort for cohort in taken) for client in range(6)) == 3
    assert all(not set(one) & set(other) for k, one in enumerate(taken) for other in taken[k + 1 : k + 3])


def test_a_round_within_a_cycle_needs_the_charge_of_its_first(tmp_path: Path) -> None:
    unit = ClientUnit(MECHANISM, server(tmp_path / "l.jsonl"), randomness=SeededRandomness(5), cohort_size=2)
    with pytest.raises(ValueError, match="charge of round 0"):
        unit.charge(1, "what it asks")


def test_noise_of_the_operating_system_cannot_be_gone_on_with(tmp_path: Path) -> None:
    ledger = server(tmp_path / "l.jsonl", randomness="os")
    ClientUnit(MECHANISM, ledger, randomness=OsRandomness(), cohort_size=2).charge(0, "what it asks")
    with pytest.raises(InputError, match="start the run anew"):
        ClientUnit(MECHANISM, ledger, randomness=OsRandomness(), cohort_size=2)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"bands": 4}, "privacy.bands"),
        ({"bands": 0}, "privacy.bands"),
        ({"sample_rate": 0.5}, "sample_rate"),
        ({"release_noise": "grid"}, "release_noise"),
    ],
)
def test_a_mechanism_without_a_proof_is_refused(bad: dict[str, object], named: str) -> None:
    good: dict[str, object] = {**MECHANISM.constants()}
    with pytest.raises(InputError, match=named):
        Mechanism(**{**good, **bad})  # type: ignore[arg-type]
