"""Several runs side by side: one line a run, the same numbers in the page and in the terminal.

Mutants this file kills: runs of another learning rate, size or budget share an arm; a place or a name splits one; an
arm of one seed has an interval; a repeated run counts twice; the largest epsilon of an arm is averaged away.
"""

import json
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.runs.report import comparison_table, write_comparison, write_report
from fedlr.runs.report.comparison import differences
from fedlr.runs.report.comparison_arms import arms_of
from fedlr.runs.report.comparison_pictures import final_scores
from fedlr.runs.report.run_files import read_run
from fedlr.runs.report.wording import bytes_text, epsilon_text, percent
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


@pytest.fixture(scope="module")
def page(run_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_comparison(run_dirs, tmp_path_factory.mktemp("page") / "comparison.html").read_text(encoding="utf-8")


def test_table_has_one_aligned_line_a_run(run_dirs: list[Path]) -> None:
    header, *rows = comparison_table(run_dirs).partition("\n\n")[0].splitlines()
    assert len(rows) == len(run_dirs)
    assert header.split()[:3] == ["method", "privacy", "seed"]
    assert len({len(row) for row in (header, *rows)}) == 1


def test_table_and_page_show_the_numbers_of_the_files(run_dirs: list[Path], page: str) -> None:
    text = comparison_table(run_dirs)
    for run_dir in run_dirs:
        summary = json.loads((run_dir / "summary.json").read_text())
        shown = [percent(summary["start_accuracy"]), percent(summary["final_accuracy"])]
        shown += [epsilon_text(summary["epsilon_max"]), bytes_text(summary["bytes_up"])]
        assert all(number in text and f">{number}<" in page for number in shown)


def test_comparison_has_its_pictures_and_fetches_nothing(page: str) -> None:
    assert set(drawings(page)) == {"final-accuracy", "accuracy-runs", "costs"}
    assert fetched(page) == []
    assert "<b>fedit" not in page and "&lt;b&gt;fedit" in page


def test_order_of_the_directories_changes_nothing(run_dirs: list[Path], page: str, tmp_path: Path) -> None:
    assert write_comparison(run_dirs[::-1], tmp_path / "two.html").read_text(encoding="utf-8") == page
    assert comparison_table(run_dirs) == comparison_table(run_dirs[::-1])


def test_runs_of_unlike_size_are_compared_with_a_warning(run_dirs: list[Path], tmp_path: Path) -> None:
    longer = write_run(tmp_path / "longer", num_rounds=6)
    assert any("do not share num_rounds: 4, 6" in text for text in told([run_dirs[0], longer]))


def test_runs_with_unlike_budgets_are_unlike_groups(run_dirs: list[Path], tmp_path: Path) -> None:
    stricter = write_run(tmp_path / "stricter", privacy="dp", num_rounds=4, budget=2.0)
    text = comparison_table([run_dirs[0], stricter])
    assert "dp, ε ≤ 6" in text and "dp, ε ≤ 2" in text


def test_run_without_a_seed_is_compared_too(run_dirs: list[Path], tmp_path: Path) -> None:
    unseeded = write_run(tmp_path / "unseeded", num_rounds=6, change={"seed": None})
    page = write_comparison([*run_dirs, unseeded], tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Seeds: none, 1, 2." in page and "do not share num_rounds: 4, 6" in page
    assert "seed none" in write_report(unseeded).read_text(encoding="utf-8")


def arms_text(run_dirs: list[Path]) -> list[str]:
    """Return the lines of arms: below the runs, after an empty line."""
    return comparison_table(run_dirs).partition("\n\n")[2].splitlines()[1:]


def told(run_dirs: list[Path]) -> list[str]:
    return differences([read_run(run_dir) for run_dir in run_dirs])


def accuracy_picture(run_dirs: list[Path]) -> tuple[int, str]:
    """Return how many intervals are drawn, and the caption."""
    picture = final_scores(arms_of([read_run(run_dir) for run_dir in run_dirs]))
    assert picture.svg
    return picture.svg.count("stroke-width: 4"), picture.caption


def configured(run_dir: Path, text: str) -> Path:
    """Add lines to the configuration of a run."""
    with (run_dir / "config.yaml").open("a", encoding="utf-8") as file:
        file.write(text)
    return run_dir


def test_runs_that_differ_only_in_seed_are_one_arm_with_an_interval(run_dirs: list[Path], page: str) -> None:
    assert len(arms_text(run_dirs)) == len(run_dirs) // 2
    assert all("\u00b1" in line and line.split("±")[0].split()[-2] == "2" for line in arms_text(run_dirs))
    assert drawings(page)["final-accuracy"].count("stroke-width: 4") == len(run_dirs) // 2
    assert "No interval" not in page and drawings(page)["final-accuracy"].count("n = 2") == len(run_dirs) // 2


def test_one_seed_has_no_interval_and_the_page_says_so(run_dirs: list[Path]) -> None:
    number, caption = accuracy_picture(run_dirs[:3])  # two seeds of one arm, one of another
    assert number == 1 and "No interval is drawn where there is one seed: fedsvd, none." in caption
    alone = [run_dirs[0], run_dirs[2]]
    number, caption = accuracy_picture(alone)
    assert number == 0 and "one seed: in all of them." in caption
    assert "±" not in comparison_table(alone) and arms_text(alone) == []


def test_another_setting_is_another_arm_that_names_it(tmp_path: Path) -> None:
    runs = []
    for lr in (0.5, 1.0):
        for seed in (1, 2):
            folder = write_run(tmp_path / f"{lr}-{seed}", num_rounds=3, seed=seed)
            runs.append(
                configured(folder, f"trainer:\n  optimizer:\n    lr: {lr}\ntracking:\n  output_dir: {folder}\n")
            )
    arms = arms_of([read_run(run) for run in runs])
    assert [arm.label for arm in arms] == [f"fedsvd (trainer.optimizer.lr={lr})" for lr in (0.5, 1.0)]
    assert [arm.num_seeds for arm in arms] == [2, 2]


def test_settings_that_say_where_a_run_is_written_do_not_split_an_arm(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", num_rounds=3, seed=seed) for seed in (1, 2)]
    configured(runs[0], "tracking:\n  output_dir: elsewhere\nruntime:\n  num_workers: 7\n  cache_dir: here\n")
    (runs[1] / "config.yaml").write_text((runs[1] / "config.yaml").read_text().replace("sentiment_hospitals", "other"))
    assert [arm.num_seeds for arm in arms_of([read_run(run) for run in runs])] == [2]


def test_a_run_that_was_repeated_counts_once_and_runs_without_a_seed_each(tmp_path: Path) -> None:
    again = [write_run(tmp_path / f"{n}", num_rounds=3, seed=seed) for n, seed in enumerate((1, 1, 2))]
    (arm,) = arms_of([read_run(run) for run in again])
    once = arms_of([read_run(run) for run in again[1:]])[0]
    assert arm.num_seeds == 2 and len(arm.runs) == 3
    assert arm.interval(lambda run: run.summary.final_score) == once.interval(lambda run: run.summary.final_score)
    drawn = [write_run(tmp_path / f"none-{n}", num_rounds=3, change={"seed": None}) for n in range(3)]
    assert [one.num_seeds for one in arms_of([read_run(run) for run in drawn])] == [3]


def test_the_epsilon_of_an_arm_is_the_largest_of_its_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{s}", num_rounds=3, seed=s, change={"epsilon_max": 2.0 + s}) for s in (1, 2)]
    (line,) = arms_text(runs)
    assert epsilon_text(4.0) in line.split()


def test_arms_of_unlike_length_are_not_averaged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{n}", num_rounds=n, seed=n) for n in (3, 4)]
    assert [arm.label for arm in arms_of([read_run(run) for run in runs])] == [
        "fedsvd (num_rounds=3)",
        "fedsvd (num_rounds=4)",
    ]


def test_runs_of_unlike_code_are_compared_with_a_warning(run_dirs: list[Path], tmp_path: Path) -> None:
    newer = write_run(tmp_path / "newer", num_rounds=4)
    (newer / "versions.json").write_text((newer / "versions.json").read_text().replace("4be1a3c", "5cf2b4d"))
    assert told([run_dirs[0], newer])[-1] == "These runs do not share the version of git: 4be1a3c, 5cf2b4d."
    assert told(run_dirs) == []


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        comparison_table([])
    with pytest.raises(InputError, match=r"summary\.json|config\.yaml"):
        comparison_table([tmp_path])
