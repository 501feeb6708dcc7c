"""Pictures of what the server did with the updates: how exact the aggregate is, and how noisy."""

import math
from typing import Any

from matplotlib.figure import Figure

from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.run_files import Run, State
from fedlr.runs.report.svg import MOST_MARKED, colour, legend, log_axis, marker, round_axis
from fedlr.runs.report.wording import short

EXACT_BELOW = 1e-6  # relative; float32 factors round at about 1e-7
LOWEST_DRAWN = 1e-17  # where a logarithmic axis shows a zero


def aggregation_error(run: Run) -> Picture:
    """How far the aggregate is from the mean of the clients' updates."""
    name, title = "aggregation-error", "Aggregation error of each round"
    states = [state for state in run.states if state.rounds_completed > 0 and state.aggregation_error is not None]
    if run.hides_clients:
        return Picture(name, title, "Withheld: it would tell of single clients, whom this run hides.")
    if not states:
        return Picture(name, title, "No round was aggregated, or the adapter is not LoRA, whose products are compared.")
    errors = [error for state in states for error in (state.aggregation_error or 0.0, *state.error_by_layer.values())]
    largest = max(errors) if all(map(math.isfinite, errors)) else math.inf
    verdict = (
        f"Exact: every layer of every round is below {short(EXACT_BELOW)}, which is rounding"
        if largest < EXACT_BELOW
        else f"Lower is better; largest {short(largest)} (1 would be as large as the update itself)"
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        rounds = [state.rounds_completed for state in states]
        low = [_floor(min(_errors(state))) for state in states]
        high = [_floor(max(_errors(state))) for state in states]
        log_axis(axes)
        axes.axhspan(LOWEST_DRAWN / 3, EXACT_BELOW, color=colour("green"), alpha=0.12, linewidth=0, label="exact")
        layers: dict[str, Any] = {"color": colour("sky"), "label": "lowest to highest layer"}
        if len(rounds) <= MOST_MARKED:
            axes.vlines(rounds, low, high, linewidth=3.0, **layers)
        else:
            axes.fill_between(rounds, low, high, alpha=0.6, linewidth=0, **layers)
        mean = [_floor(state.aggregation_error or 0.0) for state in states]
        axes.plot(rounds, mean, color=colour("blue"), marker=marker("o", rounds), label="mean over layers")
        lowest = max(LOWEST_DRAWN, min([1e-7, *filter(math.isfinite, low)])) / 3
        axes.set_ylim(lowest, max(3.0, 2 * largest if math.isfinite(largest) else 0.0))
        axes.set_ylabel("Relative error")
        round_axis(axes, label="Round")
        legend(figure, axes, columns=3)

    caption = (
        f"{verdict}: distance between what the server made and the weighted mean of the clients' updates, "
        "relative to that mean."
    )
    return drawn(name, title, caption, paint)


def noise_to_signal(run: Run) -> Picture | None:
    """How large the noise in the mean of the updates is beside it; None when no round states it."""
    states = [s for s in run.states if s.noise_to_signal is not None and math.isfinite(s.noise_to_signal)]
    if not states:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        rounds = [state.rounds_completed for state in states]
        ratio = [state.noise_to_signal or 0.0 for state in states]
        axes.plot(rounds, ratio, color=colour("purple"), marker=marker("o", rounds), label="this run")
        dashes: dict[str, Any] = {"color": colour("muted"), "linestyle": "--", "linewidth": 1.2}
        axes.axhline(1.0, label="as much noise as update", **dashes)
        axes.set_ylim(0, 1.15 * max(1.0, *ratio))
        axes.set_ylabel("Noise norm / update norm")
        round_axis(axes, label="Round")
        legend(figure, axes)

    caption = (
        "Lower is better, and near 1 the update is noise: the norm of the noise that is expected in the mean of the "
        "updates, over the norm of that mean, which holds the noise too; from what was released and the configuration "
        "alone."
    )
    return drawn("noise", "Noise beside the update", caption, paint)


def _errors(state: State) -> list[float]:
    return list(state.error_by_layer.values()) or [state.aggregation_error or 0.0]


def _floor(value: float) -> float:
    return max(value, LOWEST_DRAWN)
