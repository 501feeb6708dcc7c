"""Pictures of the results, in the style of the reports: how far each goal is reached, and each size of a step."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.svg import SERIES, colour, legend
from fedlr.simulations.bench.goals import Goal
from fedlr.simulations.bench.outcome import Measure, Outcome, spread


def goals_picture(rows: Sequence[tuple[Goal, Measure | None, str]]) -> Picture:
    """One row a goal: how many times better than its bound, on a logarithmic axis, with the goal as a line at 1."""
    shown = [(goal, measure) for goal, measure, _ in rows if measure is not None]
    title = "What is reached, against the goals"
    if not shown:
        return Picture("performance-goals", title, "Nothing was measured.")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (goal, measure) in enumerate(shown):
            middle, low, high = (better(goal, value) for value in _three(measure))
            name = "blue" if goal.reached(measure.spread.median) else "vermillion"
            axes.plot([low, high], [place, place], color=colour(name), linewidth=2.5, alpha=0.45)
            axes.plot([middle], [place], color=colour(name), marker="o" if name == "blue" else "D", markersize=5.5)
            axes.annotate(
                _short(measure.spread.median) + goal.unit,
                (max(low, high, middle), place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(1.0, color=colour("ink"), linewidth=1.2, linestyle="--")
        axes.set_xscale("log")
        values = [better(goal, value) for goal, measure in shown for value in _three(measure)]
        low, high = min(0.5, 0.8 * min(values)), 2.2 * max(2.0, *values)
        axes.set_xlim(low, high)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("times better than the goal (right of the line: reached)")
        axes.set_yticks(range(len(shown)), [goal.text for goal, _ in shown])
        _rows_from_the_top(axes, len(shown))

    caption = "A dot is the median, a bar reaches from the lower to the upper quartile, the dashed line is the goal."
    height_in = 1.0 + 0.3 * len(shown)
    return drawn("performance-goals", title, caption, paint, is_wide=True, height_in=height_in)


def step_picture(outcome: Outcome) -> Picture:
    """One row a size of the step benchmark, one colour a rival: ours relative to it, less being better."""
    found = [(m.key.rsplit(" / ", 1), m) for m in outcome.measures if " / " in m.key]
    sizes = list(dict.fromkeys(key[0] for key, _ in found))
    rivals = list(dict.fromkeys(key[1] for key, _ in found))
    markers = ("o", "s", "^", "D")

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, rival in enumerate(rivals):
            look: dict[str, Any] = {"color": colour(SERIES[index]), "linestyle": "none"}
            shift = 0.5 * ((index + 0.5) / len(rivals) - 0.5)
            for key, measure in found:
                if key[1] == rival:
                    s, place = spread(measure.values), sizes.index(key[0]) + shift
                    label = f"ours / {rival}" if key[0] == sizes[0] else None
                    axes.plot([s.lower, s.upper], [place, place], color=colour(SERIES[index]), alpha=0.45, linewidth=2)
                    axes.plot([s.median], [place], marker=markers[index % len(markers)], label=label, **look)
        axes.axvline(1.0, color=colour("ink"), linewidth=1.2, linestyle="--")
        axes.set_xlim(left=0)
        axes.set_xlabel("time of our private step / time of the rival's step (left of the line: ours is faster)")
        axes.set_yticks(range(len(sizes)), sizes)
        _rows_from_the_top(axes, len(sizes))
        legend(figure, axes, columns=4)

    caption = "A mark is the median over the turns, a bar reaches from the lower to the upper quartile."
    height_in = 1.4 + 0.34 * len(sizes)
    title = "One private step, against the same step without privacy and with Opacus"
    return drawn("performance-step", title, caption, paint, is_wide=True, height_in=height_in)


def better(goal: Goal, value: float) -> float:
    """Return how many times better than its bound a value is; 1 is just reached.

    >>> better(Goal("a", "a", "at most", 0.5, ""), 0.25), better(Goal("b", "b", "at least", 2.0, ""), 1.0)
    (2.0, 0.5)
    """
    if goal.kind == "at least":
        return value / goal.bound
    return goal.bound / value if value > 0 else math.inf


def _three(measure: Measure) -> tuple[float, float, float]:
    s = measure.spread
    return s.median, s.lower, s.upper


def _short(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _rows_from_the_top(axes: Axes, number: int) -> None:
    axes.set_ylim(number - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
