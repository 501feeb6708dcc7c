"""The table of a paper: its numbers are those of the runs, and bold is said only where the seeds say it.

Mutants this file kills: the highest mean in bold whatever the seeds say; the standard deviation of a population;
unpaired intervals; no correction for the number of rows; seeds of the best that others lack; a name with an underscore
that LaTeX refuses; a rate found for each budget that splits a row in two.
"""

import csv as csv_module
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from scipy import stats

from fedlr.errors import InputError
from fedlr.runs.report import PaperFiles
from fedlr.runs.report.comparison_arms import t_quantile
from fedlr.runs.report.paper_files import csv, escaped, latex
from fedlr.runs.report.paper_table import PaperTable, difference, is_best, paper_table
from fedlr.runs.report.run_files import read_run
from fedlr.tasks.evaluation import ACCURACY, Metric
from tests.report.run_directory import write_run

BASE = (0.62, 0.70, 0.66, 0.74, 0.68)
GRID = {
    ("fedsvd", 6.0): BASE,
    ("ffa_lora", 6.0): tuple(one - 0.02 - 0.001 * k for k, one in enumerate(BASE)),
    ("lora_fair", 6.0): tuple(one - 0.03 + 0.002 * k for k, one in enumerate(BASE)),
    ("fedsvd", None): BASE,
    ("ffa_lora", None): tuple(one + (-1) ** k * 0.01 for k, one in enumerate(BASE)),
}


def runs_of(root: Path, grid: Mapping[tuple[str, float | None], Sequence[float]], *, asked: str = "") -> list[Path]:
    """Write a run for each method, budget and seed."""
    folders = []
    for (method, budget), accuracies in grid.items():
        for seed, accuracy in enumerate(accuracies):
            folder = root / f"{method}-{budget}-{seed}"
            private = {"privacy": "dp", "budget": budget} if budget else {"privacy": "none"}
            change = {"final_accuracy": accuracy, "adapter_sha256": folder.name}
            write_run(folder, method=method, seed=seed, num_rounds=2, baselines=False, change=change, **private)
            config = (folder / "config.yaml").read_text()
            lr = f"trainer:\n  lr: {budget or 64}\n"  # as found for each budget
            (folder / "config.yaml").write_text(f"{config}data:\n  path: a/re_views.csv\n  num_test: 0.2\n{lr}")
            if asked:
                (folder / "asked.yaml").write_text(f"{config}{asked}")
            folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return runs_of(tmp_path_factory.mktemp("runs"), GRID, asked="trainer:\n  lr: auto\n")


@pytest.fixture(scope="module")
def table(folders: list[Path]) -> PaperTable:
    return paper_table([read_run(folder) for folder in folders])


def rows(text: str) -> list[list[str]]:
    """The cells of a LaTeX table by row, its header included."""
    inside = text.partition("\\toprule")[2].partition("\\bottomrule")[0].replace("\\midrule", "")
    return [[cell.strip() for cell in line.split("&")] for line in inside.split("\\\\") if line.strip()]


def test_a_cell_is_mean_and_deviation_of_the_seeds_and_a_row_one_method(table: PaperTable) -> None:
    header, *body = rows(latex(table))
    assert header == ["", "$\\varepsilon \\le 6$", "no privacy"]
    assert [row[0] for row in body] == ["fedsvd", "ffa\\_lora", "lora\\_fair"], "not a row for each rate that was found"
    assert body[0][2] == f"68.0 $\\pm$ {100 * stdev(BASE):.1f}" == "68.0 $\\pm$ 4.5"
    assert body[2] == ["lora\\_fair", "65.4 $\\pm$ 4.7", "--"]


def test_bold_is_the_best_of_a_column_only_where_the_seeds_say_so(table: PaperTable) -> None:
    bold = [[("textbf" in cell) for cell in row[1:]] for row in rows(latex(table))[1:]]
    assert bold == [[True, False], [False, False], [False, False]]
    one, other = GRID["fedsvd", None], GRID["ffa_lora", None]
    assert sum(other) > sum(one), "the mean alone would be bold"


def seeded(values: Sequence[float]) -> dict[int | str, float]:
    return dict(enumerate(values))


def test_the_best_needs_pairs_seeds_and_all_rows() -> None:
    one = seeded(BASE)
    near, far = seeded([x - 0.01 for x in BASE]), seeded([x - 0.02 for x in BASE])
    noisy = seeded([x + sign * 0.05 - 0.001 for x, sign in zip(BASE, (1, -1, 1, -1, 0), strict=True)])
    assert is_best(one, [near, far]) and not is_best(one, [near, noisy])
    assert not is_best(one, []), "there is nothing to be better than"
    assert not is_best({0: 0.9}, [{0: 0.1}]), "one seed tells nothing"
    assert not is_best(one, [{seed: x for seed, x in far.items() if seed != 4}]), "a seed is missing"
    assert not is_best(one, [{seed + 5: x for seed, x in enumerate(far.values())}]), "these are no pairs"
    unpaired = stats.ttest_ind(list(one.values()), list(near.values())).confidence_interval(0.95)
    assert unpaired.low < 0, "the pairs tell, not the means"


def test_intervals_are_wider_the_more_rows_are_compared() -> None:
    one, other = seeded(BASE), seeded([x - 0.01 * (k + 1) for k, x in enumerate(BASE)])
    alone, of_four = difference(one, other), difference(one, other, num_others=4)
    assert alone.half_width and of_four.half_width
    assert of_four.half_width / alone.half_width == pytest.approx(t_quantile(4, 0.9875) / t_quantile(4, 0.95))
    paired = stats.ttest_rel(list(one.values()), list(other.values())).confidence_interval(0.9875)
    assert of_four.ends == pytest.approx((paired.low, paired.high))


def test_the_caption_says_what_the_numbers_are(table: PaperTable) -> None:
    text = latex(replace(table, metric=replace(ACCURACY, name="macro_f1")))
    for told in (
        "Final macro-F1 in \\%",
        "of re\\_views.csv (data.num\\_test=0.2)",
        "standard deviation over the seeds 0, 1, 2, 3, 4.",
        "budget of each client over the whole run at $\\delta = 10^{-5}$",
        "does not cover the choice of settings",
        "Bold: the mean that is above every other of its column (paired $t$",
    ):
        assert told in text, told
    assert text.startswith("% \\usepackage{booktabs}\n")


def test_a_table_without_a_best_says_so(tmp_path: Path) -> None:
    near = {("fedsvd", 6.0): BASE, ("ffa_lora", 6.0): BASE[::-1]}
    text = latex(paper_table([read_run(folder) for folder in runs_of(tmp_path, near)]))
    assert "Nothing is bold: " in text and "textbf" not in text


def test_braces_and_columns_of_the_table_are_even(table: PaperTable) -> None:
    text = latex(table)
    plain = re.sub(r"\\[{}&%$#_]", "", text)
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    assert {len(row) for row in rows(text)} == {3}
    for start in ("table", "tabular"):
        assert text.count(f"\\begin{{{start}}}") == text.count(f"\\end{{{start}}}") == 1


def test_signs_that_latex_reads_are_written_out() -> None:
    assert escaped("a_b & 5 % $x {y} #1 \\z ~ ^ ε ≤ 6") == (
        "a\\_b \\& 5 \\% \\$x \\{y\\} \\#1 \\textbackslash{}z \\textasciitilde{} \\textasciicircum{} "
        "$\\varepsilon$ $\\le$ 6"
    )


def test_tasks_stand_above_their_budgets(tmp_path: Path) -> None:
    (tmp_path / "mail").mkdir()
    (tmp_path / "film").mkdir()
    found = []
    for name in ("mail", "film"):
        for folder in runs_of(tmp_path / name, {("fedsvd", 6.0): BASE[:2]}):
            config = (folder / "config.yaml").read_text().replace("re_views", name)
            (folder / "config.yaml").write_text(config)
            found.append(read_run(folder))
    header = rows(latex(paper_table(found)))[:2]
    assert header == [["", "data=film", "data=mail"], ["", "$\\varepsilon \\le 6$", "$\\varepsilon \\le 6$"]]


def test_the_csv_has_every_run_with_all_digits(folders: list[Path]) -> None:
    lines = list(csv_module.DictReader(io.StringIO(csv({folder: read_run(folder) for folder in folders}))))
    assert {Path(line["run_dir"]) for line in lines} == set(folders)
    by_dir = {Path(line["run_dir"]): line for line in lines}
    for folder in folders:
        run, line = read_run(folder), by_dir[folder]
        assert (line["method"], int(line["seed"])) == (run.summary.method, run.summary.seed)
        assert float(line["accuracy"]) == run.states[-1].accuracy
        assert (line["epsilon_budget"] == "") == (run.summary.privacy == "none")


def test_files_are_written_and_pictures_stand_alone(folders: list[Path], tmp_path: Path) -> None:
    files = PaperFiles(csv=tmp_path / "runs.csv", latex=tmp_path / "table.tex", svg=tmp_path / "pictures")
    private = [folder for folder in folders if "6.0" in folder.name]
    written = files.write(private, metric="accuracy", against="fedsvd")
    assert [path.name for path in written] == [
        *("final-accuracy.svg", "accuracy-runs.svg", "costs.svg", "paired.svg"),
        *("table.tex", "runs.csv"),
    ]
    for path in written[:4]:
        svg = path.read_text()
        assert ET.fromstring(svg).get("viewBox") and "var(" not in svg and "ffa_lora" in svg
    with pytest.raises(InputError, match=r"Expected --svg to be a folder without such pictures, got .*/final-accuracy"):
        files.write(private, metric="accuracy")


def test_of_a_score_of_which_less_is_better_the_lowest_mean_is_the_best(tmp_path: Path) -> None:
    perplexity = Metric("perplexity", higher_is_better=False, is_share=False)
    grid = {key: scores for key, scores in GRID.items() if key in (("fedsvd", 6.0), ("ffa_lora", 6.0))}
    (column,) = (low := paper_table([read_run(folder) for folder in runs_of(tmp_path, grid)], perplexity)).columns
    assert [label for label, cell in column.cells.items() if cell.is_best] == ["ffa_lora"]
    assert "Final perplexity on" in latex(low) and "0.658" in latex(low)
