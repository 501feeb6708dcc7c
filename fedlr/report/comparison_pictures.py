"""Pictures of several runs: final accuracy by method and privacy, and accuracy per round."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from fedlr.report.picture import Picture, drawn
from fedlr.report.run_files import Run
from fedlr.report.svg import SERIES, colour, legend, percent_axis, round_axis
from fedlr.report.wording import short

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")


def group_name(run: Run) -> str:
    """Return the privacy of a run, with the budget if it is known: one group is comparable."""
    budget = run.budget_epsilon
    if not run.summary.is_private or budget is None:
        return run.summary.privacy
    return f"{run.summary.privacy}, ε ≤ {short(budget)}"


def final_accuracy(runs: Sequence[Run]) -> Picture:
    """One row a method, one dot a run, one bar the mean of a group."""
    methods = _ordered(run.summary.method for run in runs)
    groups = _ordered(map(group_name, runs))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, group in enumerate(groups):
            shift = 0.6 * ((index + 0.5) / len(groups) - 0.5)
            look: dict[str, Any] = {"color": colour(SERIES[index % len(SERIES)]), "linestyle": "none"}
            chosen = [run for run in runs if group_name(run) == group]
            places = [methods.index(run.summary.method) + shift for run in chosen]
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(
                [r.summary.final_accuracy for r in chosen],
                places,
                marker=marker,
                alpha=0.75,
                label=_seen(group),
                **look,
            )
            for row, method in enumerate(methods):
                values = [r.summary.final_accuracy for r in chosen if r.summary.method == method]
                if len(values) > 1:
                    axes.plot([fmean(values)], [row + shift], marker="|", markersize=13, markeredgewidth=2, **look)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.margins(x=0.06)
        axes.grid(axis="x")
        axes.set_xlabel("Final accuracy (%)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        legend(figure, axes)

    caption = (
        "Further right is better: one dot is one run, an upright bar the mean of several; compare within one "
        "colour, which is one level of privacy."
    )
    return drawn(
        "final-accuracy",
        "Final accuracy by method",
        caption,
        paint,
        height_in=max(3.1, 1.3 + 0.42 * len(methods)),
    )


def accuracy_of_each_run(runs: Sequence[Run]) -> Picture:
    """One line a run: colour is the method, dashes are the privacy."""
    methods = _ordered(run.summary.method for run in runs)
    groups = _ordered(map(group_name, runs))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        seen: set[tuple[str, str]] = set()
        for run in runs:
            key = (run.summary.method, group_name(run))
            label = None if key in seen else _seen(f"{key[0]} ({key[1]})")
            seen.add(key)
            axes.plot(
                [state.rounds_completed for state in run.states],
                [state.accuracy for state in run.states],
                color=colour(SERIES[methods.index(key[0]) % len(SERIES)]),
                linestyle=DASHES[groups.index(key[1]) % len(DASHES)],
                linewidth=1.4,
                label=label,
            )
        axes.margins(x=0.03, y=0.08)
        round_axis(axes)
        percent_axis(axes)
        legend(figure, axes, columns=2)

    caption = (
        "Higher is better: one line is one run, its colour the method, its dashes the privacy; runs that "
        "differ only in seed look alike."
    )
    height_in = 3.1 + 0.17 * -(-len({(r.summary.method, group_name(r)) for r in runs}) // 2)
    return drawn("accuracy-runs", "Accuracy after each round", caption, paint, height_in=height_in)


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _seen(label: str) -> str:
    """Return a label that a legend does not hide (a leading underscore would)."""
    return "\u200b" + label if label.startswith("_") else label
