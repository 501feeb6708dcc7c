"""The report says whether a run learned as summary.json does, and of a run of before it says nothing.

Mutants this file kills: a verdict that is drawn without its advice; numbers of the start in the run's column; a matrix
that is transposed; text of a stranger's file that is not escaped; a broken verdict that fails without a name.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import InputError
from fedlr.runs.report.learned import confusion, did_it_learn
from fedlr.runs.report.run_files import read_run
from fedlr.runs.verdict import HeldOut, Recipe, Result, judge
from tests.report.run_directory import write_run

ROWS = HeldOut({"negative": 40, "neutral": 30, "positive": 30})
MATRIX = ((30, 7, 3), (2, 21, 7), (5, 1, 24))
SCORES = {"balanced_accuracy": 0.75, "macro_f1": 0.7449, "mcc": -0.62, "auc": 0.881, "ece": 0.043}


def told(folder: Path, *, final: float = 0.75, **changes: Any) -> list[str]:
    """Return the section of a run with a verdict and scores."""
    outcome = Result(0.34, final, 1.1, 0.6, 0.4, MATRIX if final == 0.75 else None)
    record = {**judge(ROWS, outcome, Recipe(has_random_head=True, num_rounds=6)).record(), **changes}
    run = write_run(folder, num_rounds=3, change={"verdict": record, "label_names": list(ROWS.label_counts)})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        line |= {name: value if last else 0.25 for name, value in SCORES.items()}
        line |= {"confusion": [list(row) for row in MATRIX] if last else None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return did_it_learn(read_run(run))


def plain(parts: list[str]) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", " ".join(parts)).split())


def test_a_run_that_learned_is_told_without_advice(tmp_path: Path) -> None:
    text = plain(told(tmp_path / "run"))
    assert text.startswith("Learned: it is better than always answering &quot;negative&quot;.")
    assert (
        "What to change" not in text and "epsilon, which is of the rows that clients train on, does not cover" in text
    )
    assert "Balanced accuracy (mean recall) 25.0 % 75.0 %" in text and "Matthews correlation 0.250 −0.620" in text
    assert "Expected calibration error (15 bins) 25.0 % 4.3 %" in text


def test_a_run_that_did_not_is_told_with_what_to_change_first(tmp_path: Path) -> None:
    text = plain(told(tmp_path / "run", final=0.4))
    assert "What to change, the likeliest first: the classification head is random and stays so" in text


def test_a_matrix_has_true_labels_as_rows(tmp_path: Path) -> None:
    svg = confusion(MATRIX, list(ROWS.label_counts)).svg
    assert svg is not None
    numbers = re.findall(r">(\d+)</text>", svg)
    assert numbers == ["30", "7", "3", "2", "21", "7", "5", "1", "24"]
    many = confusion([[3 * (i == j) for j in range(80)] for i in range(80)], []).svg
    assert many is not None and len(many) < 60_000


def test_a_run_of_before_has_no_such_section(tmp_path: Path) -> None:
    assert did_it_learn(read_run(write_run(tmp_path / "run", num_rounds=3))) == []


def test_text_of_a_file_is_escaped(tmp_path: Path) -> None:
    parts = told(tmp_path / "run", why="<script>", advice=["<img src=x>"], majority_label="&")
    assert "<script" not in " ".join(parts) and "<img" not in " ".join(parts)


@pytest.mark.parametrize(
    "wrong", [{"interval": [0.1]}, {"word": 3}, {"advice": "much"}, {"num_rows": -1}, {"why": None}]
)
def test_a_broken_verdict_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        told(tmp_path / "run", **wrong)


@pytest.mark.parametrize("wrong", [[[1, 2]], [[-1]], [], "much", [["a"]]])
def test_a_broken_matrix_is_named(tmp_path: Path, wrong: object) -> None:
    run = write_run(tmp_path / "run", num_rounds=1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(
        json.dumps(lines[0]) + "\n" + json.dumps({**lines[-1], "confusion": wrong}) + "\n"
    )
    with pytest.raises(InputError, match="confusion"):
        read_run(run)
