"""Pictures of several runs, arm by arm: final accuracy with its interval, accuracy per round, and what it cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedlr.runs.report.comparison_arms import Arm
from fedlr.runs.report.comparison_metric import title_of
from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.released import scored
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.server_pictures import EXACT_BELOW, LOWEST_DRAWN
from fedlr.runs.report.svg import SERIES, colour, legend, percent_axis, round_axis
from fedlr.runs.report.wording import byte_unit, power_of_ten
from fedlr.tasks.evaluation import ACCURACY, Metric

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
MOST_NAMED = 5  # arms in a caption
LEGEND_WIDTH = 72  # letters in a line of a legend
BESIDE: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": 7, "va": "center"}


@dataclass(frozen=True)
class Measure:
    """What one panel shows of a run; None: it has no such number."""

    title: str
    value: Callable[[Run], float | None]
    is_log: bool = False


def final_scores(arms: Sequence[Arm], metric: Metric = ACCURACY) -> Picture:
    """One row a label, one dot a run, and the interval of the mean over seeds."""

    name, limits = title_of(metric), (0.0, 1.0) if metric.is_share else (-math.inf, math.inf)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _paint_rows(axes, arms, lambda run: run.summary.final_score, limits=limits)
        _name_rows(axes, arms)
        axes.margins(x=0.14)  # room for n
        axes.set_xlabel(f"Final {name}" + (" (%)" if metric.is_share else ""))
        if metric.is_share:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        legend(figure, axes)

    several = [arm for arm in arms if arm.num_seeds > 1]
    cut = ", cut at 0 and 100\u00a0%" if metric.is_share else ""
    side = "right" if metric.higher_is_better else "left"
    caption = f"Further {side} is better: one dot is one run; compare within one colour, which is one level of privacy"
    if several:
        caption += (
            f"; the bar is the 95\u00a0% confidence interval of the mean over seeds (Student's t{cut}), its upright "
            "mark the mean, n the seeds"
        )
    if single := [f"{arm.label}, {arm.privacy}" for arm in arms if arm.num_seeds == 1]:
        told = f"{len(single)} arms" if len(single) > MOST_NAMED else "; ".join(single)
        caption += f". No interval is drawn where there is one seed: {told if several else 'in all of them'}"
    return drawn("final-accuracy", f"Final {name} by method", f"{caption}.", paint, height_in=_height(arms))


def scores_of_each_run(arms: Sequence[Arm], metric: Metric = ACCURACY) -> Picture:
    """One thin line a run; of an arm with several seeds a thick one for the mean, in the band of its interval."""
    name = title_of(metric)
    title = f"{name[0].upper()}{name[1:]}"
    labels, groups = _ordered(arm.label for arm in arms), _ordered(arm.privacy for arm in arms)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for arm in arms:
            look: dict[str, Any] = {
                "color": colour(SERIES[labels.index(arm.label) % len(SERIES)]),
                "linestyle": DASHES[groups.index(arm.privacy) % len(DASHES)],
            }
            several = arm.num_seeds > 1
            for number, run in enumerate(arm.runs):
                label = None if number or several else _named(arm)
                rounds = [state.rounds_completed for state in scored(run.states)]
                scores = [state.score for state in scored(run.states)]
                axes.plot(rounds, scores, linewidth=0.7 if several else 1.4, label=label, **look)
            if several:
                _paint_mean(axes, arm, look, is_share=metric.is_share)
        axes.margins(x=0.03, y=0.08)
        round_axis(axes)
        if metric.is_share:
            percent_axis(axes, label=f"{title} (%)")
        else:
            axes.set_ylabel(title)
        legend(figure, axes, columns=columns)

    names = [_named(arm) for arm in arms]
    columns = 1 if max(map(len, names)) > LEGEND_WIDTH // 2 else 2
    num_lines = sum(len(name.splitlines()) for name in names)
    higher = "Higher" if metric.higher_is_better else "Lower"
    caption = f"{higher} is better: one thin line is one run, its colour the method, its dashes the privacy"
    if any(arm.num_seeds > 1 for arm in arms):
        caption += "; a thick line is the mean over seeds, its band the 95\u00a0% confidence interval of that mean"
    height_in = 3.1 + 0.17 * -(-num_lines // columns)
    return drawn("accuracy-runs", f"{title} after each round", f"{caption}.", paint, height_in=height_in)


def costs(arms: Sequence[Arm]) -> Picture:
    """Privacy, bytes, aggregation error and time of every arm, side by side."""
    runs = [run for arm in arms for run in arm.runs]
    divisor, unit = byte_unit(max([1, *(max(r.summary.bytes_up, r.summary.bytes_down) for r in runs)]))
    measures = (
        Measure("ε, max over clients", lambda run: run.summary.epsilon_max),
        Measure(f"Sent up ({unit})", lambda run: run.summary.bytes_up / divisor),
        Measure(f"Sent down ({unit})", lambda run: run.summary.bytes_down / divisor),
        Measure("Aggregation error", lambda run: run.states[-1].aggregation_error, is_log=True),
        Measure("Time (s)", lambda run: run.summary.seconds),
    )

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(measures), sharey=True)
        for axes, measure in zip(panels, measures, strict=True):
            _paint_measure(axes, arms, measure)
        _name_rows(panels[0], arms)
        legend(figure, panels[1])

    caption = (
        "Further left is cheaper: one dot is one run, an upright mark the mean over seeds; of all clients together. "
        f"Left of the dashed line ({power_of_ten(EXACT_BELOW)}) the aggregate is exact, but for rounding; the error is "
        "the last round's. No dot under ε: no differential privacy."
    )
    return drawn("costs", "What it cost", caption, paint, is_wide=True, height_in=_height(arms) - 0.2)


def _paint_measure(axes: Axes, arms: Sequence[Arm], measure: Measure) -> None:
    axes.set_xlabel(measure.title)
    shown = {id(run): measure.value(run) for arm in arms for run in arm.runs}
    values = [value for value in shown.values() if value is not None and math.isfinite(value)]
    if measure.is_log:
        axes.set_xscale("log")
        lowest = max(LOWEST_DRAWN, min([EXACT_BELOW / 10, *values]))
        axes.set_xlim(lowest / 3, 3 * max([EXACT_BELOW * 10, *values]))
        axes.axvline(EXACT_BELOW, color=colour("green"), linestyle="--", linewidth=1.2)
        axes.xaxis.set_major_formatter(lambda value, _: power_of_ten(value))
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.12 * max(values, default=1.0) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))

    def value(run: Run) -> float | None:
        number = shown[id(run)]
        if number is None or not math.isfinite(number):
            return None
        return max(number, LOWEST_DRAWN) if measure.is_log else number

    _paint_rows(axes, arms, value)


def _paint_rows(
    axes: Axes,
    arms: Sequence[Arm],
    value: Callable[[Run], float | None],
    *,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a dot a run in the row of its label; with `limits` also intervals, cut there."""
    labels, groups = _ordered(arm.label for arm in arms), _ordered(arm.privacy for arm in arms)
    for index, group in enumerate(groups):
        look: dict[str, Any] = {"color": colour(SERIES[index % len(SERIES)])}
        shift = 0.6 * ((index + 0.5) / len(groups) - 0.5)
        dots: list[tuple[float, float]] = []
        for arm in (arm for arm in arms if arm.privacy == group):
            place = labels.index(arm.label) + shift
            found = [(run, number) for run in arm.runs if (number := value(run)) is not None]
            dots += [(number, place) for _, number in found]
            numbers = {id(run): number for run, number in found}
            if arm.num_seeds < 2 or len(found) < len(arm.runs):
                continue
            interval = arm.interval(_looked_up(numbers))
            axes.plot([interval.mean], [place], "|", markersize=12, markeredgewidth=1.8, **look)
            if limits:
                low, high = (min(max(end, limits[0]), limits[1]) for end in interval.ends)
                axes.plot([low, high], [place, place], linestyle="-", linewidth=4, alpha=0.35, **look)
                end = max(high, *numbers.values())
                axes.annotate(f"n = {arm.num_seeds}", (end, place), **BESIDE)
        marker = MARKERS[index % len(MARKERS)]
        x, y = [dot[0] for dot in dots], [dot[1] for dot in dots]
        axes.plot(x, y, marker, alpha=0.75, label=_seen(group), **look)


def _name_rows(axes: Axes, arms: Sequence[Arm]) -> None:
    labels = _ordered(arm.label for arm in arms)
    axes.set_yticks(range(len(labels)), [_row_name(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.grid(axis="x")


def _row_name(label: str) -> str:
    return fill(label, 34, break_long_words=False)


def _paint_mean(axes: Axes, arm: Arm, look: dict[str, Any], *, is_share: bool) -> None:
    """Draw the mean and its interval after every round that all runs of the arm have reached."""
    scores = [{state.rounds_completed: state.score for state in scored(run.states)} for run in arm.runs]
    rounds = sorted(set.intersection(*(set(one) for one in scores)))
    reached = [{id(run): one[r] for run, one in zip(arm.runs, scores, strict=True)} for r in rounds]
    intervals = [arm.interval(_looked_up(numbers)) for numbers in reached]
    ends = [[min(max(end, 0.0), 1.0) if is_share else end for end in interval.ends] for interval in intervals]
    low, high = [end[0] for end in ends], [end[1] for end in ends]
    axes.fill_between(rounds, low, high, color=look["color"], alpha=0.14, linewidth=0)
    label = _named(arm)
    axes.plot(rounds, [interval.mean for interval in intervals], linewidth=2.0, label=label, **look)


def _looked_up(numbers: Mapping[int, float]) -> Callable[[Run], float]:
    """Return the number of a run out of those by identity."""
    return lambda run: numbers[id(run)]


def _height(arms: Sequence[Arm]) -> float:
    """Return the height, in inches, of rows as high as the longest of their names."""
    labels = _ordered(arm.label for arm in arms)
    row_in = max(0.42, 0.1 + 0.14 * max(len(_row_name(label).splitlines()) for label in labels))
    return max(3.1, 1.3 + row_in * len(labels))


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _named(arm: Arm) -> str:
    """Return what a legend calls an arm."""
    return fill(_seen(f"{arm.label} ({arm.privacy})"), LEGEND_WIDTH, break_long_words=False)


def _seen(label: str) -> str:
    """Return a label that a legend does not hide (a leading underscore would)."""
    return "\u200b" + label if label.startswith("_") else label
