r"""What a paper takes from runs: `runs.csv` for one's own statistics, a LaTeX table, and pictures as SVG files.

pandas writes CSV and LaTeX (booktabs). The caption of the table says what its numbers are: the score, on which rows,
over which seeds, what stands behind the sign, epsilon with its delta and unit, and what bold means.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.runs.report.chosen import how_chosen
from fedlr.runs.report.comparison import pictures, read_runs
from fedlr.runs.report.comparison_arms import arms_of
from fedlr.runs.report.comparison_forest import forest
from fedlr.runs.report.comparison_metric import title_of
from fedlr.runs.report.comparison_pairs import paired_arms
from fedlr.runs.report.paper_table import Cell, Column, PaperTable, paper_table
from fedlr.runs.report.picture import Picture
from fedlr.runs.report.released import released
from fedlr.runs.report.run_files import SCORES, Run, read_run
from fedlr.runs.report.wording import PERCENT, count, epsilon_text, score_text, seed_text, short
from fedlr.tasks.evaluation import Metric

if TYPE_CHECKING:
    import pandas

BEST = "textbf:--rwrap;"  # of pandas' Styler: \textbf{...}
TEST = "(paired $t$ intervals over the seeds, 95\\,\\% for all of a column together, Bonferroni)"
BOLD = f"Bold: the mean that is above every other of its column {TEST}."
NOT_BOLD = f"Nothing is bold: no mean is above every other of its column {TEST}."
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


@dataclass(frozen=True)
class PaperFiles:
    """Which files are wanted, by their path; None: not that one."""

    csv: Path | None = None
    latex: Path | None = None
    svg: Path | None = None  # a folder

    def write(self, run_dirs: Sequence[Path], *, metric: str | None, against: str | None = None) -> list[Path]:
        """Write them from the files of run directories alone, and return what was written.

        Raises:
            InputError: as `fedlr.runs.report.write_comparison`; or a picture of such a name is there already.
        """
        written = []
        runs, by = read_runs(run_dirs, metric)
        if self.svg is not None:
            arms = arms_of(runs)
            pairs = [] if against is None else [forest(paired_arms(runs, against=against), by, against=against)]
            written += write_pictures([*pictures(arms, by), *pairs], self.svg)
        if self.latex is not None:
            write_whole(self.latex, latex(paper_table(runs, by)))
            written.append(self.latex)
        if self.csv is not None:
            write_whole(self.csv, csv({Path(run_dir): read_run(Path(run_dir)) for run_dir in run_dirs}))
            written.append(self.csv)
        return written


# What one epsilon is about, by the privacy of a summary; of both units it is the rows'.
UNIT_OF = {"dp of persons": "person", "dp of clients": "client"}


def csv(runs: Mapping[Path, Run]) -> str:
    """Return a line a run, numbers unrounded, as CSV."""
    import pandas

    folders = {id(run): run_dir for run_dir, run in runs.items()}
    lines = [
        _line(run, label, column, folders[id(run)])
        for column in paper_table(list(runs.values())).columns
        for label, members in column.arms.items()
        for run in members
    ]
    text: str = pandas.DataFrame(lines).to_csv(index=False)
    return text


def latex(table: PaperTable) -> str:
    r"""Return the table as LaTeX, best means bold."""
    styler = _frame(table).style.apply(lambda _: _bold(table), axis=None)
    styler = styler.format_index(escape="latex", axis=0)
    text = styler.to_latex(
        hrules=True,
        column_format="l" + "c" * len(table.columns),
        multicol_align="c",
        position="t",
        position_float="centering",
        caption=caption(table),
        label="tab:fedlr",
    )
    return f"% \\usepackage{{booktabs}}\n{text}"


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write each picture as NAME.svg for print, on nothing and in light colours, and return the paths.

    Raises:
        InputError: a file of such a name is there already.
    """
    paths = {folder / f"{picture.name}.svg": picture.svg for picture in pictures if picture.svg is not None}
    if there := [path for path in paths if path.exists()]:
        raise InputError(f"Expected --svg to be a folder without such pictures, got {there[0]}, which exists")
    make_folder(folder)
    for path, svg in paths.items():
        write_whole(path, for_print(svg))
    return list(paths)


def for_print(svg: str) -> str:
    """Return an inline SVG as a file that every program reads: numbers for its colours, which a page sets by name.

    >>> for_print('<svg viewBox="0 0 9 9"><path style="fill: var(--blue, #0072b2)"/></svg>').splitlines()[1]
    '<svg viewBox="0 0 9 9"><path style="fill: #0072b2"/></svg>'
    """
    return '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"var\(--\w+, ([^)]*)\)", r"\1", svg) + "\n"


def caption(table: PaperTable) -> str:
    """Return what the numbers of a table are, in LaTeX."""
    runs = table.runs
    seeds = list(dict.fromkeys(seed_text(run.summary.seed) for run in sorted(runs, key=_seed)))
    metric = table.metric
    unit = " in \\%" if metric.is_share else ""
    parts = [
        f"Final {title_of(metric)}{unit} on {_split(runs)}; mean $\\pm$ standard deviation over the seeds "
        f"{', '.join(seeds)}."
    ]
    if private := [run for run in runs if run.summary.is_private]:
        deltas = sorted({run.summary.delta for run in private if run.summary.delta is not None})
        largest = max(run.summary.epsilon_max for run in private if run.summary.epsilon_max is not None)
        units = sorted({UNIT_OF.get(run.summary.privacy, "row") for run in private})
        parts.append(
            f"$\\varepsilon$ is the budget of each client over the whole run at $\\delta = "
            f"{', '.join(map(_power, deltas))}$ (add or remove one {' or '.join(units)}; the largest that was spent is "
            f"{epsilon_text(largest)}); it {_covers(private)} the choice of settings{_seeded(private)}."
        )
    parts += [escaped(told) for told in dict.fromkeys(told for run in runs for told in how_chosen(run))]
    has_best = any(cell.is_best for column in table.columns for cell in column.cells.values())
    return " ".join([*parts, BOLD if has_best else NOT_BOLD])


def escaped(text: str) -> str:
    r"""Return plain text as LaTeX shows it.

    >>> escaped("data=a_b & 5 %")
    'data=a\\_b \\& 5 \\%'
    """
    plain = "".join(SPECIAL.get(sign, sign) for sign in text)
    return plain.replace("ε", r"$\varepsilon$").replace("≤", r"$\le$").replace("\u00a0", "~")


def _frame(table: PaperTable) -> "pandas.DataFrame":
    import pandas

    values = [[_cell(column.cells.get(label), table.metric) for column in table.columns] for label in table.labels]
    tasks, budgets = [escaped(column.task) for column in table.columns], [_budget(column) for column in table.columns]
    header = pandas.MultiIndex.from_arrays([tasks, budgets]) if any(tasks) else pandas.Index(budgets)
    return pandas.DataFrame(values, index=list(table.labels), columns=header)


def _bold(table: PaperTable) -> "pandas.DataFrame":
    found = _frame(table)
    best = [[BEST if _is_best(column.cells.get(label)) else "" for column in table.columns] for label in table.labels]
    found.iloc[:, :] = best
    return found


def _is_best(cell: Cell | None) -> bool:
    return cell is not None and cell.is_best


def _cell(cell: Cell | None, metric: Metric) -> str:
    if cell is None:
        return "--"
    mean, *sd = (score_text(metric, x).removesuffix(PERCENT) for x in (cell.mean, cell.sd) if x is not None)
    return mean + "".join(f" $\\pm$ {one}" for one in sd)


def _budget(column: Column) -> str:
    run = column.runs[0]
    if not run.summary.is_private or run.budget_epsilon is None:
        return "no privacy" if not run.summary.is_private else escaped(column.privacy)
    if run.statement.get("trials"):  # the budget is that of one trial
        return f"$\\varepsilon \\le {epsilon_text(run.summary.epsilon_max)}$"
    return f"$\\varepsilon \\le {short(run.budget_epsilon)}$"


def _power(delta: float) -> str:
    """Return a delta in mathematics.

    >>> _power(1e-05), _power(0.002)
    ('10^{-5}', '2 \\\\cdot 10^{-3}')
    """
    mantissa, _, exponent = f"{delta:e}".partition("e")
    number = short(float(mantissa))
    factor = "" if number == "1" else rf"{number} \cdot "
    return f"{factor}10^{{{int(exponent)}}}"


def _covers(private: Sequence[Run]) -> str:
    """Say whether the epsilons are of a choice among trials, too."""
    num_chosen = sum(bool(run.statement.get("trials")) for run in private)
    return (
        "covers" if num_chosen == len(private) else f"covers in {num_chosen} runs" if num_chosen else "does not cover"
    )


def _seeded(private: Sequence[Run]) -> str:
    """Say that noise of a seed hides nothing from whoever has the seed."""
    kinds = [run.statement.get("randomness") for run in private]
    seeded = any(isinstance(kind, dict) and kind.get("kind") == "seeded" for kind in kinds)
    return ", and noise was drawn from the seeds: a simulation of privacy" if seeded else ""


def _split(runs: Sequence[Run]) -> str:
    """Say on how many rows a score is, and how they were held out."""
    return escaped("; ".join(dict.fromkeys(map(_held_out, runs))))


def _held_out(run: Run) -> str:
    parsed = yaml.safe_load(run.config)
    data = parsed.get("data") if isinstance(parsed, dict) else None
    section = data if isinstance(data, dict) else {}
    rows = count(run.summary.verdict.num_rows, "held-out row") if run.summary.verdict else "the held-out rows"
    source = str(section.get("path") or section.get("_target_") or "")
    of = f" of {Path(source).name}" if source else ""
    ways = [f"data.{key}={section[key]}" for key in ("num_test", "test_path", "test_split") if section.get(key)]
    return f"{rows}{of}" + (f" ({ways[0]})" if ways else "")


def _seed(run: Run) -> int:
    return -1 if run.summary.seed is None else run.summary.seed


def _line(run: Run, label: str, column: Column, run_dir: Path) -> dict[str, object]:
    summary, last = run.summary, released(run)
    return {
        "run_dir": str(run_dir),
        "name": summary.name,
        "task": column.task,
        "method": summary.method,
        "arm": label,
        "privacy": summary.privacy,
        "epsilon_budget": run.budget_epsilon,
        "epsilon_max": summary.epsilon_max,
        "delta": summary.delta,
        "seed": summary.seed,
        "num_rounds": summary.num_rounds,
        "num_clients": summary.num_clients,
        "cohort_size": summary.cohort_size,
        "num_held_out": summary.verdict.num_rows if summary.verdict else None,
        "metric": summary.metric.name,
        "start_score": summary.start_score,
        "score": summary.final_score,
        "start_accuracy": run.states[0].accuracy,
        "accuracy": last.accuracy,
        "loss": last.loss,
        **{name: last.scores.get(name) for name in SCORES},
        "num_trained_parameters": summary.num_trained_parameters,
        "bytes_up": summary.bytes_up,
        "bytes_down": summary.bytes_down,
        "seconds": summary.seconds,
        "adapter_sha256": summary.adapter_sha256,
    }
