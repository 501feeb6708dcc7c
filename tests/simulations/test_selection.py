"""Keep best and early stopping: which model is released, what a run that stops is charged, and what is refused.

Mutant this file kills: a run that stops early and states the epsilon of the rounds that it asked (`charge_the_rest`
that charges nobody).
"""

import json
from pathlib import Path

import pytest

import fedlr.simulations.simulate
from fedlr.errors import InputError
from fedlr.privacy.statement import recompute
from fedlr.runs.report.run_files import read_run
from fedlr.runs.selection import Selection, told
from fedlr.simulations.federation import prepare
from fedlr.simulations.simulate import run_rounds, simulate
from fedlr.tasks.evaluation import ACCURACY, Metric
from tests.simulations.small_runs import experiment, federation, lines, quiet

PERPLEXITY = Metric("perplexity", higher_is_better=False, is_share=False)
VALIDATED = ("data.num_validation=0.3", "adapter.train_head=true")
STOPPING = (*VALIDATED, "release=best", "patience=2", "num_rounds=6", "trainer.optimizer.lr=30")


def row(number: int, score: float | None = None, loss: float = 1.0, name: str = "accuracy") -> dict[str, object]:
    return {"rounds_completed": number} | ({} if score is None else {"validation": {name: score, "loss": loss}})


def test_the_best_is_never_the_start_and_of_equals_that_of_the_lower_loss_then_the_earlier() -> None:
    selection = Selection(ACCURACY, release="best")
    rows = [row(0, 0.9), row(1, 0.5), row(2), row(3, 0.5, 0.8), row(4, 0.5, 0.8)]
    assert selection.released(rows)["rounds_completed"] == 3
    assert Selection(ACCURACY).released(rows)["rounds_completed"] == 4
    assert selection.released(rows[:1])["rounds_completed"] == 0
    falling = [row(1, 9.0, name="perplexity"), row(2, 7.0, name="perplexity"), row(3, 8.0, name="perplexity")]
    assert Selection(PERPLEXITY, release="best").released(falling)["rounds_completed"] == 2
    overflown = [row(1, 0.2), {"rounds_completed": 2, "validation": {"accuracy": None, "loss": None}}]
    assert selection.released(overflown)["rounds_completed"] == 1


def test_patience_counts_scored_rounds_since_the_best() -> None:
    rows = [row(0, 0.9), row(1, 0.5), row(2), row(3, 0.4), row(4), row(5, 0.5)]
    over = [Selection(ACCURACY, patience=2).is_over(rows[:n]) for n in range(1, 7)]
    assert over == [False] * 5 + [True]  # an equal score with an equal loss is no better one
    assert not Selection(ACCURACY).is_over(rows)


def test_the_released_model_is_the_one_of_its_round(tmp_path: Path) -> None:
    words = ("privacy=none", *VALIDATED, "release=best", "trainer.optimizer.lr=30")
    run_dir = simulate(experiment(*words, "num_rounds=4", f"tracking.output_dir={tmp_path}"), say=lambda line: None)
    summary, found = (
        json.loads((run_dir / "summary.json").read_text(encoding="utf-8")),
        lines(run_dir / "metrics.jsonl"),
    )
    number = summary["released"]["rounds_completed"]
    best = max(found[1:], key=lambda line: (line["validation"]["accuracy"], -line["validation"]["loss"]))
    assert 0 < number == best["rounds_completed"] < 4
    assert (summary["final_accuracy"], summary["final_loss"]) == (best["accuracy"], best["loss"])
    f = federation(*words, f"num_rounds={number}")
    (tmp_path / "short").mkdir()
    state, *_ = run_rounds(f, tmp_path / "short", ledger=None, progress=quiet(f.experiment))
    assert summary["adapter_sha256"] == state.adapter.fingerprint()
    assert told(summary["released"]) in (run_dir / "report.html").read_text(encoding="utf-8").lower()
    assert told(summary["released"])[1:] in (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    assert read_run(run_dir).summary.released["model"] == "best"


def epsilon_of(folder: Path, *words: str) -> tuple[float, dict[str, object], dict[str, object]]:
    run_dir = simulate(experiment(*words, f"tracking.output_dir={folder}"), say=lambda line: None)
    summary, statement = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("summary", "privacy"))
    assert recompute(run_dir) == statement and statement["epsilon"]["maximum"] == summary["epsilon_max"]
    return summary["epsilon_max"], summary["released"], statement


def test_a_run_that_stops_early_states_the_epsilon_of_all_announced_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, released, statement = epsilon_of(tmp_path / "whole", *STOPPING, "patience=null", "release=last")
    assert not released["stopped_early"] and "choices" not in statement
    stopped, released, statement = epsilon_of(tmp_path / "stopped", *STOPPING)
    assert released["stopped_early"] and released["num_rounds"] < 6
    assert stopped == whole
    assert "all 6 rounds" in str(statement["choices"]) and "declared public" in str(statement["choices"])
    monkeypatch.setattr(fedlr.simulations.simulate, "charge_the_rest", lambda *args, **options: None)
    mutant, *_ = epsilon_of(tmp_path / "mutant", *STOPPING)
    assert mutant < whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("release=best",), "Expected validation rows with release=best, got none: add data.validation_path"),
        (("patience=2",), "Expected validation rows with patience=2"),
        ((*VALIDATED, "release=best", "data.public=false"), "Expected data.num_validation=null in a private run"),
        ((*VALIDATED, "patience=2"), "Expected patience < 2, the rounds that are scored of num_rounds=2, got 2"),
        ((*VALIDATED, "patience=1", "tracking.evaluate_every=2"), "Expected patience < 1"),
        ((*VALIDATED, "release=best", "method=fedsa_lora"), "Expected release=last for method=fedsa_lora"),
        (("release=best", "runtime=superlink"), "Expected release=last with runtime=superlink, got best"),
        (("release=worst",), "Expected release to be"),
    ],
)
def test_what_no_run_can_choose_by_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        prepare(experiment(*words), seed=0)
    assert message in str(error.value)


def test_where_all_scores_are_of_validation_rows_they_are_scored_once() -> None:
    f = prepare(experiment(*VALIDATED, "release=best", "tracking.evaluate_on=validation"), seed=0)
    assert f.validation is None
    other = prepare(experiment(*VALIDATED, "release=best"), seed=0)
    assert other.validation is not None and len(other.validation) == len(f.test)
