"""A run that is scored every few rounds is the same run, and all that reads its lines reads those without a score."""

import json
from pathlib import Path

import pytest

from fedlr.runs.report import write_report
from fedlr.runs.report.comparison import comparison_table, write_comparison
from fedlr.runs.report.run_files import read_run
from fedlr.runs.trackers import numbers
from fedlr.server.view.round_feed import _event
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import experiment, lines

SCORES = ("balanced_accuracy", "macro_f1", "mcc", "auc", "ece", "confusion")


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    words = ("num_rounds=3",)
    return [
        simulate(
            experiment(*words, f"tracking.evaluate_every={every}", f"tracking.output_dir={folder / str(every)}"),
            say=said.append,
        )
        for every, said in ((1, SAID[1]), (2, SAID[2]))
    ]


SAID: dict[int, list[str]] = {1: [], 2: []}


def test_the_start_every_second_round_and_the_last_are_scored_and_nothing_else_changes(run_dirs: list[Path]) -> None:
    whole, every_second = (lines(run_dir / "metrics.jsonl") for run_dir in run_dirs)
    assert [row["accuracy"] is not None for row in every_second] == [True, False, True, True]
    for full, row in zip(whole, every_second, strict=True):
        if row["accuracy"] is None:
            full = {key: value for key, value in full.items() if key not in SCORES} | {"accuracy": None, "loss": None}
        assert row == full
    a, b = (json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) for run_dir in run_dirs)
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_the_terminal_says_what_is_not_scored_and_alarms_nobody(run_dirs: list[Path]) -> None:
    told = [line for line in SAID[2] if line.startswith("  round 1/3")]
    assert len(told) == 1 and all("not scored" in line for line in told)
    assert not any("NOT FINITE" in line or "not finite" in line for line in SAID[2])


def test_report_comparison_tracker_and_live_view_read_lines_without_a_score(run_dirs: list[Path]) -> None:
    run_dir = run_dirs[1]
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "The files disagree" not in page and "not a number" not in page
    found = [row.split()[5:9] for row in comparison_table(run_dirs, metric="macro_f1").splitlines()[-2:]]
    assert found[0] == found[1] != []
    write_comparison(run_dirs, run_dir.parent / "compare.html")
    run = read_run(run_dir)
    assert [state.is_scored for state in run.states] == [True, False, True, True]
    row = lines(run_dir / "metrics.jsonl")[1]
    assert "accuracy" not in numbers(row) and "bytes_up" in numbers(row)
    event = _event(row, {})
    assert not event.HasField("accuracy") and not event.HasField("loss")
