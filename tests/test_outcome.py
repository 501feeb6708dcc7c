"""What came of a run: a round without a usable update is told, a run for nothing is an error, all files written.

Mutants: a run whose every update is rejected counts as done; a product that stays zero counts as moved; a loss that is
not finite in the lines of JSON.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedlr.runs.outcome as outcome
from fedlr.adapters.state import AdapterState, Slot
from fedlr.errors import InputError
from fedlr.rounds.round import ServerState
from fedlr.runs.recorder import metrics_row
from fedlr.simulations import cli
from fedlr.simulations.simulate import simulate
from fedlr.tasks.evaluation import Evaluation
from tests.simulations.small_runs import RUN_FILES, experiment, lines

TINY = ("experiment=tiny", "data.num_examples=120", "data.num_test=24", "num_clients=4", "cohort_size=3")


@pytest.mark.parametrize(
    ("wrong", "fragments"),
    [
        (
            ["trainer.optimizer.lr=1e6", "trainer.divisor=1e-6", "trainer.check_parity=false"],
            ["none in 1 rounds (3 too_large)", "lower trainer.optimizer.lr"],
        ),
        (["trainer.sample_rate=1e-7", "privacy=none"], ["got 3 that leave it as it was", "raise trainer.optimizer.lr"]),
    ],
    ids=str,
)
def test_a_run_for_nothing_is_an_error_after_all_is_written(
    wrong: list[str], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [*TINY, "num_rounds=1", f"tracking.output_dir={tmp_path}", *wrong]
    assert cli.simulate(typed) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and all(fragment in told.err for fragment in fragments), told.err
    (run,) = (tmp_path / "tiny").iterdir()
    ledger = set() if "privacy=none" in wrong else {"ledger.jsonl"}
    assert str(run) in told.err and {path.name for path in run.iterdir()} == RUN_FILES | ledger
    assert json.loads((run / "summary.json").read_text())["problem"] in told.err
    assert "Nothing was learnt" in (run / "report.html").read_text()
    assert cli.statement([str(run)]) == 0, "what was spent stays stated"


def test_a_round_without_a_usable_update_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    # the budget lasts for one round of a client, and all are asked in both
    budget = ("privacy.noise_multiplier=1.0", "privacy.epsilon=3.5", "cohort_size=4", "privacy.max_participations=2")
    run = simulate(experiment(f"tracking.output_dir={tmp_path}", *budget), say=said.append)
    rows = lines(run / "metrics.jsonl")
    assert [row["reasons"] for row in rows] == [{}, {}, {"budget_exhausted": 4}]
    assert [row["num_trained"] for row in rows] == [0, 4, 0]
    assert any("without an update: 4 budget_exhausted" in line for line in said)
    assert any("NO USABLE UPDATE in round 2" in line for line in said)
    assert not any("NO USABLE UPDATE in round 1" in line for line in said)
    assert "Round 2 had no usable update" in (run / "report.html").read_text()


def test_baselines_that_learn_nothing_are_told_too(tmp_path: Path) -> None:
    said: list[str] = []
    wrong = (
        "trainer.optimizer.lr=1e6",
        "trainer.divisor=1e-6",
        "trainer.check_parity=false",
        "tracking.run_alone=true",
        "num_rounds=1",
    )
    with pytest.raises(InputError, match="at least one update"):
        simulate(experiment(f"tracking.output_dir={tmp_path}", *wrong), say=said.append)
    assert any("NO USABLE UPDATE of 4 clients alone" in line for line in said)


def state(lora_B: float, lora_A: float = 1.0, head: float = 0.0) -> AdapterState:
    slots = {("x", "lora_A"): lora_A, ("x", "lora_B"): lora_B, ("h", "head"): head}
    return AdapterState({Slot(*slot): torch.full((2, 2), value) for slot, value in slots.items()}, scale=1.0)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (state(0.0), state(0.0), False),
        (state(0.0), state(0.0, lora_A=5.0), False),  # another basis of nothing
        (state(0.0), state(1.0), True),
        (state(1.0), state(1.0), False),
        (state(1.0), state(1.0, lora_A=5.0), True),
        (state(1.0), state(0.0), True),
        (state(0.0), state(0.0, head=1.0), True),
    ],
)
def test_a_model_has_moved_where_it_computes_with_other_numbers(
    before: AdapterState, after: AdapterState, moved: bool
) -> None:
    assert outcome.has_moved(before, after) is moved


def rows_of(*trained: int, loss: float | None = 0.5) -> list[dict]:
    return [{"num_trained": n, "reasons": {}, "loss": loss} for n in (0, *trained)]


@pytest.mark.parametrize(
    ("end", "rows", "fragment"),
    [
        (state(1.0), rows_of(2, 0), None),
        (state(0.0), rows_of(), None),  # no round was run yet
        (state(0.0), rows_of(0, 0), "at least one update"),
        (state(0.0), rows_of(2, 2), "updates that change the model"),
        (state(1.0), rows_of(2, loss=None), "outputs are finite"),
    ],
)
def test_a_run_for_nothing_has_its_reason(end: AdapterState, rows: list[dict], fragment: str | None) -> None:
    found = outcome.problem_of(state(0.0), end, rows)
    assert found is None if fragment is None else fragment in str(found)
    assert fragment != "updates that change the model" or outcome.problem_of(state(0.0), end, rows, keeps=True) is None


def test_a_loss_that_is_not_finite_is_null_and_valid_json() -> None:
    for loss in (math.nan, math.inf):
        row = metrics_row(ServerState(state(0.0)), Evaluation(0.5, loss), spent=[], evaluate_s=0.1)
        assert json.loads(json.dumps(row, allow_nan=False))["loss"] is None


def says_problems(problem_of: Callable[..., str | None]) -> None:
    assert problem_of(state(0.0), state(0.0, lora_A=5.0), rows_of(2)) is not None
    assert problem_of(state(0.0), state(0.0), rows_of(0)) is not None


def test_the_check_rejects_its_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    says_problems(outcome.problem_of)
    with pytest.raises(AssertionError):
        says_problems(lambda start, end, rows: None)
    monkeypatch.setattr(outcome, "has_moved", lambda before, after: before.fingerprint() != after.fingerprint())
    with pytest.raises(AssertionError):
        says_problems(outcome.problem_of)
