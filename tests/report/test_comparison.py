"""Several runs side by side: one line a run, the same numbers in the page and in the terminal."""

import json
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.report import comparison_table, write_comparison, write_report
from fedlr.report.wording import bytes_text, epsilon_text, percent
from tests.report.run_directory import write_run
from tests.report.test_report_page import drawings, fetched


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / f"{method}-{privacy}-{seed}", method=method, privacy=privacy, seed=seed, num_rounds=4)
        for method in ("fedsvd", "ffa_lora", "<b>fedit</b>")
        for privacy in ("dp", "none")
        for seed in (1, 2)
    ]


def test_table_has_one_aligned_line_a_run(run_dirs: list[Path]) -> None:
    header, *rows = comparison_table(run_dirs).splitlines()
    assert len(rows) == len(run_dirs)
    assert header.split()[:3] == ["method", "privacy", "seed"]
    assert len({len(row) for row in (header, *rows)}) == 1


def test_table_and_page_show_the_numbers_of_the_files(run_dirs: list[Path], tmp_path: Path) -> None:
    text = comparison_table(run_dirs)
    page = write_comparison(run_dirs, tmp_path / "comparison.html").read_text(encoding="utf-8")
    for run_dir in run_dirs:
        summary = json.loads((run_dir / "summary.json").read_text())
        shown = [percent(summary["start_accuracy"]), percent(summary["final_accuracy"])]
        shown += [epsilon_text(summary["epsilon_max"]), bytes_text(summary["bytes_up"])]
        assert all(number in text and f">{number}<" in page for number in shown)


def test_comparison_has_both_pictures_and_fetches_nothing(run_dirs: list[Path], tmp_path: Path) -> None:
    page = write_comparison(run_dirs, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert set(drawings(page)) == {"final-accuracy", "accuracy-runs"}
    assert fetched(page) == []
    assert "<b>fedit" not in page and "&lt;b&gt;fedit" in page


def test_order_of_the_directories_changes_nothing(run_dirs: list[Path], tmp_path: Path) -> None:
    forwards = write_comparison(run_dirs, tmp_path / "one.html").read_bytes()
    assert write_comparison(run_dirs[::-1], tmp_path / "two.html").read_bytes() == forwards
    assert comparison_table(run_dirs) == comparison_table(run_dirs[::-1])


def test_runs_of_unlike_size_are_compared_with_a_warning(run_dirs: list[Path], tmp_path: Path) -> None:
    longer = write_run(tmp_path / "longer", num_rounds=6)
    page = write_comparison([run_dirs[0], longer], tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "do not share num_rounds: 4, 6" in page


def test_runs_with_unlike_budgets_are_unlike_groups(run_dirs: list[Path], tmp_path: Path) -> None:
    stricter = write_run(tmp_path / "stricter", privacy="dp", num_rounds=4, budget=2.0)
    text = comparison_table([run_dirs[0], stricter])
    assert "dp, ε ≤ 6" in text and "dp, ε ≤ 2" in text


def test_run_without_a_seed_is_compared_too(run_dirs: list[Path], tmp_path: Path) -> None:
    unseeded = write_run(tmp_path / "unseeded", num_rounds=4, change={"seed": None})
    page = write_comparison([*run_dirs, unseeded], tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Seeds: none, 1, 2." in page
    assert "seed none" in write_report(unseeded).read_text(encoding="utf-8")


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        comparison_table([])
    with pytest.raises(InputError, match=r"summary\.json|config\.yaml"):
        comparison_table([tmp_path])
