"""Runs can be compared by another score than accuracy, which is then what every table and picture shows.

Mutants this file kills: a score that only some tables take; a run without it that passes with its accuracy.
"""

import json
import re
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.runs.report import comparison_table, write_comparison
from tests.report.run_directory import write_run


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two methods, two seeds, with a macro-F1 of 0.11 at the start and 0.22 or 0.33 at the end."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for method, final in (("fedsvd", 0.22), ("ffa_lora", 0.33)):
        for seed in (1, 2):
            run = write_run(folder / f"{method}-{seed}", method=method, num_rounds=2, seed=seed, baselines=False)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            told = [{**line, "macro_f1": 0.11 if k < len(lines) - 1 else final} for k, line in enumerate(lines)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
            runs.append(run)
    return runs


def test_every_table_and_picture_shows_the_score(run_dirs: list[Path], tmp_path: Path) -> None:
    text = comparison_table(run_dirs, against="fedsvd", metric="macro_f1")
    runs, arms, pairs = text.split("\n\n")
    assert runs.count("11.0") == 4 and runs.count("22.0") == 2 and runs.count("33.0") == 2
    assert "final macro-F1" in arms and "22.0 ± 0.0" in arms and "accuracy" not in text
    assert "+11.0" in pairs
    page = write_comparison(run_dirs, tmp_path / "page.html", against="fedsvd", metric="macro_f1")
    told = page.read_text(encoding="utf-8")
    assert "Final macro-F1 by method" in told and "Macro-F1 over fedsvd (points)" in told
    assert "Final macro-F1 (%)" in told and "of macro-F1 with" in told and "ccuracy" not in re.sub("<[^>]+>", "", told)


def test_accuracy_is_what_is_compared_by_default(run_dirs: list[Path]) -> None:
    assert comparison_table(run_dirs) == comparison_table(run_dirs, metric="accuracy") != ""
    assert "final accuracy" in comparison_table(run_dirs)


def test_a_score_that_a_run_lacks_or_nobody_knows_is_refused(run_dirs: list[Path]) -> None:
    with pytest.raises(InputError, match="'auc' in every line of .*fedsvd-1.metrics.jsonl.*compare by accuracy"):
        comparison_table(run_dirs, metric="auc")
    with pytest.raises(InputError, match="--metric to be accuracy, balanced_accuracy, macro_f1, auc, got 'f2'"):
        comparison_table(run_dirs, metric="f2")
