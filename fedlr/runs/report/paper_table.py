"""The table of a paper: methods in rows, tasks and budgets in columns, and which of them may be called the best.

A cell is the mean over seeds and the standard deviation of one seed. The best mean of a column is *the best* only
where seeds say so: the paired difference from every other arm excludes zero, in intervals so wide that all of them
together hold in 19 of 20 columns (Bonferroni; Dunn 1961). Of one seed, or of arms with other seeds, none is the best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fedlr.errors import InputError
from fedlr.runs.report.comparison_arms import CONFIDENCE, Interval, mean_interval
from fedlr.runs.report.comparison_pairs import TaskArms, arms_by_task
from fedlr.runs.report.run_files import Run
from fedlr.tasks.evaluation import ACCURACY, Metric


@dataclass(frozen=True)
class Cell:
    """One arm in one column: a score by seed, and whether it is the best."""

    by_seed: Mapping[int | str, float]
    is_best: bool = False

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return fmean(self.by_seed.values())

    @property
    def sd(self) -> float | None:
        """The standard deviation of one seed, from n - 1; None of one seed."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Column:
    """One task at one level of privacy: a cell for each arm that has runs there."""

    task: str
    privacy: str
    cells: Mapping[str, Cell]
    arms: Mapping[str, Sequence[Run]]

    @property
    def runs(self) -> list[Run]:
        """All runs of the column."""
        return [run for runs in self.arms.values() for run in runs]

    @property
    def order(self) -> tuple[str, bool, float, str]:
        """By task, then by budget, without privacy last."""
        budget = self.runs[0].budget_epsilon
        return self.task, not self.runs[0].summary.is_private, 0.0 if budget is None else budget, self.privacy


@dataclass(frozen=True)
class PaperTable:
    """Rows by label, columns by task and budget."""

    labels: Sequence[str]
    columns: Sequence[Column]
    metric: Metric = ACCURACY

    @property
    def runs(self) -> list[Run]:
        """All runs of the table."""
        return [run for column in self.columns for run in column.runs]


def paper_table(runs: Sequence[Run], metric: Metric = ACCURACY) -> PaperTable:
    """Return the table of runs, whose scores are of a metric.

    Raises:
        InputError: there is none.
    """
    if not runs:
        raise InputError("Expected at least one run for a table, got none")
    columns = sorted((_column(arms, metric) for arms in arms_by_task(runs)), key=lambda column: column.order)
    return PaperTable(sorted({label for column in columns for label in column.cells}), columns, metric)


def _column(arms: TaskArms, metric: Metric) -> Column:
    cells = {label: Cell(_by_seed(runs)) for label, runs in arms.by_label.items()}
    sign = 1.0 if metric.higher_is_better else -1.0
    above = {label: {seed: sign * value for seed, value in cell.by_seed.items()} for label, cell in cells.items()}
    best = max(above, key=lambda label: fmean(above[label].values()))
    if is_best(above[best], [other for label, other in above.items() if label != best]):
        cells[best] = Cell(cells[best].by_seed, is_best=True)
    return Column(arms.task, arms.privacy, cells, arms.by_label)


def is_best(one: Mapping[int | str, float], others: Sequence[Mapping[int | str, float]]) -> bool:
    """Return whether seeds say that an arm is above all others, paired by seed.

    >>> is_best({0: 0.81, 1: 0.83}, [{0: 0.80, 1: 0.70}])
    False
    >>> is_best({0: 0.81, 1: 0.83, 2: 0.80}, [{0: 0.80, 1: 0.82, 2: 0.791}])
    True
    """
    if not others or len(one) < 2 or any(other.keys() != one.keys() for other in others):
        return False
    return all(difference(one, other, num_others=len(others)).ends[0] > 0 for other in others)


def difference(one: Mapping[int | str, float], other: Mapping[int | str, float], *, num_others: int = 1) -> Interval:
    """Return the mean difference over the same seeds, with an interval for so many comparisons at once."""
    return mean_interval([one[seed] - other[seed] for seed in one], confidence=1 - (1 - CONFIDENCE) / num_others)


def _by_seed(runs: Sequence[Run]) -> dict[int | str, float]:
    """Return the mean score of each seed; runs without a seed are one each, and pair with none."""
    found: dict[int | str, list[float]] = {}
    for run in runs:
        seed = run.summary.seed
        key = f"run {run.summary.adapter_sha256}" if seed is None else seed
        found.setdefault(key, []).append(run.summary.final_score)
    return {key: fmean(values) for key, values in found.items()}
