"""Pictures of what a run cost: bytes and seconds."""

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.picture import Picture, drawn
from fedlr.runs.report.run_files import Run, State
from fedlr.runs.report.svg import MOST_MARKED, SERIES, bar_limits, colour, legend, marker, round_axis
from fedlr.runs.report.wording import byte_unit, bytes_text, seconds_text


def traffic(run: Run) -> Picture:
    """Bytes sent each round, and so far."""
    states = [state for state in run.states if state.rounds_completed > 0]
    if not states:
        return Picture("traffic", "Bytes sent", "No round was run.")
    up, down = [state.bytes_up for state in states], [state.bytes_down for state in states]
    rounds = [state.rounds_completed for state in states]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _paint_each_round(left, rounds, up, down)
        divisor, unit = byte_unit(max(sum(up), sum(down), 1))
        up_line, down_line = ([total / divisor for total in accumulate(sent)] for sent in (up, down))
        right.plot(rounds, up_line, color=colour("blue"), marker=marker("o", rounds))
        right.plot(rounds, down_line, color=colour("orange"), linestyle="--", marker=marker("s", rounds))
        right.set_ylim(bottom=0)
        right.set_ylabel(f"{unit} so far, all clients")
        for axes in (left, right):
            round_axis(axes, label="Round")
        bar_limits(left, rounds[0], rounds[-1])
        legend(figure, left)

    caption = (
        "Left: what all clients together sent and received in each round; right: the sum so far, in the end "
        f"{bytes_text(sum(up))} up and {bytes_text(sum(down))} down."
    )
    if errors := [state.codec_error for state in states if state.codec_error is not None]:
        caption += f" What goes up went through a codec, which moved an update by {100 * max(errors):.3g} % at most."
    return drawn("traffic", "Bytes sent", caption, paint, is_wide=True, height_in=2.9)


def time_spent(run: Run, *, is_wide: bool = False) -> Picture:
    """Seconds of each round by phase."""
    states = [state for state in run.states if state.rounds_completed > 0 and state.seconds]
    if not states:
        return Picture("time", "Where the time went", "No round states its duration.")
    phases = _phases(states)
    rounds = [state.rounds_completed for state in states]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bottom = [0.0] * len(states)
        for index, (name, values) in enumerate(phases.items()):
            paint_colour = colour(SERIES[index % len(SERIES)])
            axes.bar(rounds, values, bottom=bottom, width=0.8, color=paint_colour, label=name)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_ylabel("Seconds")
        round_axis(axes, label="Round")
        bar_limits(axes, rounds[0], rounds[-1])
        legend(figure, axes, columns=4)

    totals = {name: sum(values) for name, values in phases.items()}
    largest, whole = max(totals, key=lambda name: totals[name]), sum(totals.values())
    caption = (
        f"One bar is one round on the wall clock, its parts the phases: {seconds_text(whole)} in all, "
        f"of which {largest} took {100 * totals[largest] / max(whole, 1e-12):.0f}\u00a0%."
    )
    height_in = 2.9 if is_wide else 3.1
    return drawn("time", "Where the time went", caption, paint, is_wide=is_wide, height_in=height_in)


def _paint_each_round(axes: Axes, rounds: Sequence[int], up: Sequence[int], down: Sequence[int]) -> None:
    divisor, unit = byte_unit(max([*up, *down, 1]))
    looks = (("up, from clients", up, "blue", -0.2, "-"), ("down, to clients", down, "orange", 0.2, "--"))
    for label, sent, name, shift, dashes in looks:
        heights = [number / divisor for number in sent]
        if len(rounds) <= MOST_MARKED:
            axes.bar([r + shift for r in rounds], heights, width=0.4, color=colour(name), label=label)
        else:
            axes.plot(rounds, heights, color=colour(name), linestyle=dashes, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit} in the round, all clients")


def _phases(states: Sequence[State]) -> dict[str, list[float]]:
    """Return seconds by phase, and as `other` what the phases leave of the round."""
    names = list(dict.fromkeys(["train", "aggregate", "evaluate", *(n for s in states for n in s.seconds)]))
    phases = {name: [s.seconds.get(name, 0.0) for s in states] for name in names if name != "round"}
    parts = [sum(values[i] for values in phases.values()) for i in range(len(states))]
    other = [max(0.0, s.seconds.get("round", 0.0) - part) for s, part in zip(states, parts, strict=True)]
    return phases | {"other": other} if sum(other) > 0.01 * sum(parts) else phases
