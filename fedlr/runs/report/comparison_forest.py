"""The forest plot of a paired comparison: one row an arm and privacy, a panel a task, zero in the middle."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.comparison_metric import title_of
from fedlr.runs.report.comparison_pairs import PairedArm
from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.svg import SERIES, colour, legend
from fedlr.runs.report.wording import count
from fedlr.tasks.evaluation import ACCURACY, Metric

ROW_IN = 0.24  # height of a row, an arm at one privacy
LABEL_WIDTH = 34  # characters of an arm's name in a line


def forest(pairs: Sequence[PairedArm], metric: Metric = ACCURACY, *, against: str) -> Picture:
    """One panel a task: the differences of all pairs as dots, the mean as an upright mark in its interval's bar."""
    name, better = title_of(metric), "Right" if metric.higher_is_better else "Left"
    unit, scale = ("points", 100.0) if metric.is_share else ("difference", 1.0)
    tasks, labels, groups = (sorted(set(names)) for names in zip(*map(_names, pairs), strict=True))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            axes.axvline(0.0, color=colour("ink"), linewidth=1.0)
            for arm in (arm for arm in pairs if arm.task == task):
                index = groups.index(arm.privacy)
                place = labels.index(arm.label) + 0.7 * ((index + 0.5) / len(groups) - 0.5)
                _paint_arm(axes, arm, place, scale=scale, color=colour(SERIES[index % len(SERIES)]))
            axes.set_title(fill(task, 50), fontsize=9)
            axes.set_xlabel(f"{name[0].upper()}{name[1:]} over {against} ({unit})")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x")
            axes.margins(x=0.08)
        panels[0].set_yticks(range(len(labels)), [fill(label, LABEL_WIDTH, break_long_words=False) for label in labels])
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        for index, group in enumerate(groups):
            panels[0].plot([], [], linewidth=4, alpha=0.5, color=colour(SERIES[index % len(SERIES)]), label=group)
        legend(figure, panels[0])

    numbers = sorted({len(arm.seeds) for arm in pairs})
    told = count(numbers[0], "pair") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} pairs"
    caption = (
        f"{better} of the line is better than {against}. One dot is one pair, two runs with the same seed; the upright "
        f"mark is the mean, the bar its 95\u00a0% confidence interval (Student's t, {told} a row). A bar that crosses "
        "the line does not tell which is better."
    )
    if numbers[0] == 1:
        caption += " Of one pair there is no bar."
    lines = sum(max(len(groups), 1 + len(label) // LABEL_WIDTH) for label in labels)
    return drawn(
        "paired", f"Against {against}, paired by seed", caption, paint, is_wide=True, height_in=1.5 + ROW_IN * lines
    )


def _paint_arm(axes: Axes, arm: PairedArm, place: float, *, scale: float, color: str) -> None:
    interval, look = arm.interval, dict[str, Any](color=color)
    low, high = (scale * end for end in interval.ends)
    if interval.half_width is not None:
        axes.plot([low, high], [place, place], linestyle="-", linewidth=4, alpha=0.35, **look)
    axes.plot([scale * one for one in arm.differences], [place] * len(arm.seeds), "o", markersize=3, alpha=0.75, **look)
    axes.plot([scale * interval.mean], [place], "|", markersize=9, markeredgewidth=1.8, **look)


def _names(arm: PairedArm) -> tuple[str, str, str]:
    return arm.task, arm.label, arm.privacy
