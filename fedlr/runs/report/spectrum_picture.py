"""The picture of the update's spectrum: how much of the rank is used, over rounds and over layers."""

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.run_files import Run, State
from fedlr.runs.report.svg import colour, log_axis, marker, round_axis
from fedlr.runs.report.wording import short

MOST_LINES = 8


def singular_values(run: Run) -> Picture:
    """The spectrum of the update: over rounds, and by layer at the end."""
    name, title = "singular-values", "Singular values of the update"
    if not any(value > 0 for state in run.states for values in state.singular_values.values() for value in values):
        return Picture(name, title, "The files hold no singular value above zero.")

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _paint_spectrum_by_round(left, run.states)
        _paint_spectrum_by_layer(right, run.states[-1])
        for axes in (left, right):
            log_axis(axes)
        left.set_ylabel("Singular value of ΔW")

    caption = (
        "Left: one line is one singular value, median over layers, the range over layers shaded for the "
        "largest; right: each layer after the last round; lines close together mean that the whole rank is "
        "used, and zeros (the start) are not drawn."
    )
    return drawn(name, title, caption, paint, is_wide=True)


def layer_rows(run: Run) -> list[list[str]]:
    """Return one row a layer: number in the picture, name, largest singular value, last aggregation error."""
    last = run.states[-1]
    rows = []
    for index, (path, values) in enumerate(last.singular_values.items()):
        error = last.error_by_layer.get(path)
        largest = short(values[0]) if values else "none"
        rows.append([str(index), path, largest, "none" if error is None else short(error)])
    return rows


def _paint_spectrum_by_round(axes: Axes, states: Sequence[State]) -> None:
    rank = max(len(values) for state in states for values in state.singular_values.values())
    shown = _shown(rank)
    for position, index in enumerate(shown):
        rounds = [s.rounds_completed for s in states if _at(s, index)]
        values = [_at(s, index) for s in states if _at(s, index)]
        if not rounds:
            continue
        strength = 1.0 - 0.65 * position / max(len(shown) - 1, 1)
        if index == 0:
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(rounds, low, high, color=colour("blue"), alpha=0.13, linewidth=0)
        middle = [median(v) for v in values]
        axes.plot(
            rounds,
            middle,
            color=colour("blue"),
            alpha=strength,
            marker=marker("o", rounds),
            markersize=3,
            linewidth=1.5,
        )
        if index in (shown[0], shown[-1]):  # the numbers between would lie on each other
            axes.annotate(
                f"{index + 1}",
                (rounds[-1], middle[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
    axes.set_title(f"Per round, median over layers (numbered 1 to {rank}, largest first)")
    round_axis(axes)


def _paint_spectrum_by_layer(axes: Axes, state: State) -> None:
    layers = list(state.singular_values.values())
    rank = max((len(values) for values in layers), default=0)
    shown = _shown(rank)
    for position, index in enumerate(shown):
        strength = 1.0 - 0.65 * position / max(len(shown) - 1, 1)
        places = [place for place, values in enumerate(layers) if len(values) > index and values[index] > 0]
        heights = [layers[place][index] for place in places]
        axes.plot(places, heights, color=colour("blue"), alpha=strength, marker="o", markersize=3, linewidth=0)
    axes.set_title("Per layer, after the last round")
    round_axis(axes, label="Layer (numbered as in the list below the pictures)")


def _shown(rank: int) -> list[int]:
    """Return which singular values to draw: all, or about eight of them from first to last."""
    if rank <= MOST_LINES:
        return list(range(rank))
    return sorted({round(step * (rank - 1) / (MOST_LINES - 1)) for step in range(MOST_LINES)})


def _at(state: State, index: int) -> list[float]:
    """Return one singular value over the layers, without zeros."""
    values = [values[index] for values in state.singular_values.values() if len(values) > index]
    return [value for value in values if value > 0]
