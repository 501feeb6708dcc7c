"""Pictures of what was learned, by round and by the privacy it took."""

import math
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.picture import MOST_CLIENTS, Picture, drawn
from fedlr.runs.report.released import released, scored
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.svg import colour, legend, marker, round_axis, score_axis
from fedlr.tasks.evaluation import ACCURACY


def accuracy_by_round(run: Run) -> Picture:
    """Score of the shared adapter after each round, against the two baselines."""
    metric, is_chosen = run.summary.metric, any(state.validation for state in run.states)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if run.alone:
            _paint_alone(axes, run)
        if run.no_privacy:
            rounds = [state.rounds_completed for state in scored(run.no_privacy)]
            scores = [state.score for state in scored(run.no_privacy)]
            axes.plot(
                rounds,
                scores,
                color=colour("orange"),
                linestyle="--",
                marker=marker("s", rounds),
                label="without privacy",
            )
        rounds = [state.rounds_completed for state in scored(run.states)]
        scores = [state.score for state in scored(run.states)]
        axes.plot(rounds, scores, color=colour("blue"), marker=marker("o", rounds), label="this run")
        if is_chosen:
            _paint_validation(axes, run)
        axes.margins(x=0.03, y=0.08)
        round_axis(axes)
        score_axis(axes, metric)
        legend(figure, axes, columns=2)

    caption = f"{'Higher' if metric.higher_is_better else 'Lower'} is better; round 0 is the start, before any training"
    caption += "; the dashed line is the same run without privacy" if run.no_privacy else ""
    caption += "; the dotted line is the score on validation rows, the ring the released model" if is_chosen else ""
    caption += "; the band spans the clients that train alone, lowest to highest" if run.alone else ""
    return drawn(
        "accuracy",
        f"{metric.heading} after each round",
        caption + "; mind that the vertical axis need not start at zero.",
        paint,
    )


def accuracy_by_epsilon(run: Run) -> Picture:
    """Score against the privacy spent to reach it."""
    metric = run.summary.metric
    name, title = "accuracy-epsilon", f"{metric.heading} against privacy spent"
    states = [state for state in scored(run.states) if _is_finite(state.epsilon_max)]
    points = [(state.epsilon_max or 0.0, state.score, state.rounds_completed) for state in states]
    if not points:
        return Picture(name, title, "This run states no finite epsilon, so there is no privacy axis to draw on.")
    alone = [(one.epsilon, one.score) for one in run.alone if one.epsilon is not None and math.isfinite(one.epsilon)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if alone:
            _paint_alone_at_epsilon(axes, alone)
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=colour("blue"),
            marker=marker("o", points),
            label="this run",
        )
        for index in sorted({0, len(points) - 1}):
            epsilon, score, rounds = points[index]
            place: dict[str, Any] = {
                "xytext": (0, 7),
                "textcoords": "offset points",
                "fontsize": 8,
                "ha": "center",
            }
            axes.annotate("start" if rounds == 0 else f"round {rounds}", (epsilon, score), **place)
        axes.margins(x=0.08, y=0.14)
        axes.set_xlabel("Epsilon spent so far, maximum over clients")
        score_axis(axes, metric)
        legend(figure, axes)

    up, more = ("Up", "more accuracy") if metric == ACCURACY else ("Up", "a higher score")
    up, more = (up, more) if metric.higher_is_better else ("Down", f"a lower {metric.name}")
    caption = f"{up} and to the left is better: {more} for less privacy spent; one dot is one round"
    drawn_alone = ", the upright line all clients alone" if len(alone) > MOST_CLIENTS else ", one cross a client alone"
    caption += f"{drawn_alone if alone else ''}."
    return drawn(name, title, caption, paint)


def _paint_validation(axes: Axes, run: Run) -> None:
    """Draw what the model was chosen by, and a ring around it."""
    found = [(s.rounds_completed, s.validation.get(run.summary.metric.name)) for s in run.states if s.validation]
    rounds, scores = zip(*((number, math.nan if score is None else score) for number, score in found), strict=True)
    axes.plot(rounds, scores, color=colour("grey"), linestyle=":", label="on validation rows")
    final = released(run)
    axes.plot(
        [final.rounds_completed],
        [final.score],
        "o",
        color=colour("vermillion"),
        markerfacecolor="none",
        markersize=11,
        label="released",
    )


def _paint_alone(axes: Axes, run: Run) -> None:
    scores = [one.score for one in run.alone]
    label = "clients alone, lowest to highest"
    axes.axhspan(min(scores), max(scores), color=colour("green"), alpha=0.16, linewidth=0, label=label)
    axes.axhline(fmean(scores), color=colour("green"), linestyle=":", linewidth=1.4, label="clients alone, mean")


def _paint_alone_at_epsilon(axes: Axes, alone: list[tuple[float, float]]) -> None:
    spent, scores = zip(*alone, strict=True)
    if len(alone) <= MOST_CLIENTS:
        axes.plot(spent, scores, "x", color=colour("green"), label="each client alone")
        return
    label = "clients alone, lowest to highest"
    axes.vlines(median(spent), min(scores), max(scores), color=colour("green"), linewidth=1.8, label=label)


def _is_finite(epsilon: float | None) -> bool:
    return epsilon is not None and math.isfinite(epsilon)
