"""Pictures of what was learned, by round and by the privacy it took."""

import math
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.picture import MOST_CLIENTS, Picture, drawn
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.svg import colour, legend, marker, percent_axis, round_axis


def accuracy_by_round(run: Run) -> Picture:
    """Accuracy of the shared adapter after each round, against the two baselines."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if run.alone:
            _paint_alone(axes, run)
        if run.no_privacy:
            rounds = [state.rounds_completed for state in run.no_privacy]
            accuracy = [state.accuracy for state in run.no_privacy]
            axes.plot(
                rounds,
                accuracy,
                color=colour("orange"),
                linestyle="--",
                marker=marker("s", rounds),
                label="without privacy",
            )
        rounds = [state.rounds_completed for state in run.states]
        accuracy = [state.accuracy for state in run.states]
        axes.plot(rounds, accuracy, color=colour("blue"), marker=marker("o", run.states), label="this run")
        axes.margins(x=0.03, y=0.08)
        round_axis(axes)
        percent_axis(axes)
        legend(figure, axes, columns=2)

    caption = "Higher is better; round 0 is the start, before any training"
    caption += "; the dashed line is the same run without privacy" if run.no_privacy else ""
    caption += "; the band spans the clients that train alone, lowest to highest" if run.alone else ""
    return drawn(
        "accuracy",
        "Accuracy after each round",
        caption + "; mind that the vertical axis need not start at zero.",
        paint,
    )


def accuracy_by_epsilon(run: Run) -> Picture:
    """Accuracy against the privacy spent to reach it."""
    name, title = "accuracy-epsilon", "Accuracy against privacy spent"
    points = [(s.epsilon_max or 0.0, s.accuracy, s.rounds_completed) for s in run.states if _is_finite(s.epsilon_max)]
    if not points:
        return Picture(name, title, "This run states no finite epsilon, so there is no privacy axis to draw on.")
    alone = [(one.epsilon, one.accuracy) for one in run.alone if one.epsilon is not None and math.isfinite(one.epsilon)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if alone:
            _paint_alone_at_epsilon(axes, alone)
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=colour("blue"),
            marker=marker("o", run.states),
            label="this run",
        )
        for index in sorted({0, len(points) - 1}):
            epsilon, accuracy, rounds = points[index]
            place: dict[str, Any] = {
                "xytext": (0, 7),
                "textcoords": "offset points",
                "fontsize": 8,
                "ha": "center",
            }
            axes.annotate("start" if rounds == 0 else f"round {rounds}", (epsilon, accuracy), **place)
        axes.margins(x=0.08, y=0.14)
        axes.set_xlabel("Epsilon spent so far, maximum over clients")
        percent_axis(axes)
        legend(figure, axes)

    caption = "Up and to the left is better: more accuracy for less privacy spent; one dot is one round"
    drawn_alone = ", the upright line all clients alone" if len(alone) > MOST_CLIENTS else ", one cross a client alone"
    caption += f"{drawn_alone if alone else ''}."
    return drawn(name, title, caption, paint)


def _paint_alone(axes: Axes, run: Run) -> None:
    accuracy = [one.accuracy for one in run.alone]
    label = "clients alone, lowest to highest"
    axes.axhspan(min(accuracy), max(accuracy), color=colour("green"), alpha=0.16, linewidth=0, label=label)
    axes.axhline(fmean(accuracy), color=colour("green"), linestyle=":", linewidth=1.4, label="clients alone, mean")


def _paint_alone_at_epsilon(axes: Axes, alone: list[tuple[float, float]]) -> None:
    spent, accuracy = zip(*alone, strict=True)
    if len(alone) <= MOST_CLIENTS:
        axes.plot(spent, accuracy, "x", color=colour("green"), label="each client alone")
        return
    label = "clients alone, lowest to highest"
    axes.vlines(median(spent), min(accuracy), max(accuracy), color=colour("green"), linewidth=1.8, label=label)


def _is_finite(epsilon: float | None) -> bool:
    return epsilon is not None and math.isfinite(epsilon)
