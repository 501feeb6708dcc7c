"""R-A3: a one-run audit of whole clients, through the rounds of a federation (Steinke, Nasr and Jagielski 2023).

Each of `NUM_CANARIES` clients changes the model in a direction of its own, far beyond the clip bound, and is put in by
a fair coin. The auditor sees the released model alone and guesses the coins by its inner products with the directions.
What so many right guesses refute must lie below the epsilon in the server's ledger.

Mutants killed: noise off; noise on the divisor's scale but not the sum's; a clip eight times as wide; clips that were
forgotten. Four times as wide is not seen (0.96 of 1.0), nor half the noise: `test_client_sum.py` measures those.
Seeded: the coins and the noise are always the same, so nothing is left to chance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedlr.privacy.client_sum
import fedlr.rounds.client_unit
from fedlr.adapters.state import ClientUpdate
from fedlr.privacy.accountant import calibrate_noise_multiplier
from fedlr.privacy.audit.one_run import epsilon_lower_bound, num_correct
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.rounds.client_unit import EVERYBODY, ClientUnit
from fedlr.rounds.round import Dropout, RoundRequest, run_round
from fedlr.streams import SeededRandomness
from tests.simulations.small_runs import federation
from tests.training.small_models import mutant

NUM_CANARIES, GUESSES, EPSILON, DELTA = 200, 100, 1.0, 1e-5
FAR = 50.0  # times the clip bound
WORDS = ("privacy=client", "privacy.client_epsilon=20", "privacy.accountant=rdp", "method=fedavg")


class Canaries:
    """Clients whose changes are the rows of a matrix, over all tensors that are sent."""

    def __init__(self, directions: NDArray[np.float64]) -> None:
        self._directions = directions

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        sent = {s: t for s, t in sorted(task.broadcast.items()) if s.role in task.block or s in task.block}
        for client in cohort:
            tensors, at = {}, 0
            for slot, tensor in sent.items():
                piece = torch.from_numpy(self._directions[client, at : at + tensor.numel()]).reshape(tensor.shape)
                tensors[slot], at = (tensor.double() + FAR * piece).to(tensor.dtype), at + tensor.numel()
            yield ClientUpdate(client, tensors, 1.0, task.round_index)


def audited(folder: Path, *, noise: float | None = None) -> tuple[float, float]:
    """Return the lower bound that one round refutes, and the epsilon of its ledger."""
    f, draws = federation(*WORDS), np.random.default_rng(0)
    budget = PrivacyBudget(EPSILON, DELTA)
    sigma = calibrate_noise_multiplier(budget, sample_rate=1.0, num_steps=1)
    ledger = PrivacyLedger.create(folder / "l.jsonl", budget, dataset_id="x", randomness="seeded", unit="client")
    unit = ClientUnit(
        Mechanism(sigma, 1.0, 1.0, NUM_CANARIES / 2), ledger, randomness=SeededRandomness(1), cohort_size=NUM_CANARIES
    )
    if noise is not None:
        unit._mechanism = replace(unit._mechanism, noise_multiplier=noise * sigma)
        unit.charge = lambda *_: None  # type: ignore[method-assign]
    task = f.request(0)
    slots = sorted(s for s in task.broadcast if s.role in task.block or s in task.block)
    size = sum(task.broadcast[s].numel() for s in slots)
    directions = np.linalg.qr(draws.standard_normal((size, NUM_CANARIES)))[0].T
    coins = draws.random(NUM_CANARIES) < 0.5
    after, _ = run_round(
        f.start, np.flatnonzero(coins).tolist(), pool=Canaries(directions), method=f.method, client_unit=unit
    )
    moved = [after.adapter.tensors[s].double() - f.start.adapter.tensors[s].double() for s in slots]
    scores = directions @ torch.cat([t.flatten() for t in moved]).numpy()
    right = num_correct(scores, coins, num_in=GUESSES // 2, num_out=GUESSES // 2)
    found = epsilon_lower_bound(right, num_guesses=GUESSES, num_canaries=NUM_CANARIES, delta=DELTA)
    return found, EPSILON if noise is not None else ledger.spent_all([EVERYBODY])[EVERYBODY]


def test_what_a_round_of_canary_clients_refutes_lies_below_the_ledger(tmp_path: Path) -> None:
    found, accounted = audited(tmp_path)
    assert 0.9 < accounted <= EPSILON and found <= accounted


def test_without_noise_the_bound_is_three_times_what_is_accounted(tmp_path: Path) -> None:
    found, accounted = audited(tmp_path, noise=0.0)
    assert found >= 3 * accounted


Broken = Callable[[], ModuleType]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("std = mechanism.noise_std", "std = mechanism.noise_std / mechanism.divisor"),
        ("factor = min(1.0, max_norm / norm)", "factor = min(1.0, 8 * max_norm / norm)"),
        ("factor = min(1.0, max_norm / norm)", "factor = min(1.0, max_norm)"),
    ],
)
def test_faults_that_a_round_can_have_are_seen(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutant(fedlr.privacy.client_sum, (old, new))
    monkeypatch.setattr(fedlr.rounds.client_unit, "released_update", broken.released_update)
    found, accounted = audited(tmp_path)
    assert found > accounted
