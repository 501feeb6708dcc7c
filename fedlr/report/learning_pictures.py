"""Pictures of what was learned and what it cost in privacy."""

import math
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.report.picture import Picture, client_axis, drawn
from fedlr.report.run_files import Run, spent_by_client
from fedlr.report.svg import SERIES, colour, legend, marker, percent_axis, round_axis
from fedlr.report.wording import epsilon_text

MOST_STACKED_LABELS = len(SERIES)


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
    alone = [(one.epsilon, one.accuracy) for one in run.alone if _is_finite(one.epsilon)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if alone:
            axes.plot(*zip(*alone, strict=True), "x", color=colour("green"), label="each client alone")
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
    caption += ", one cross a client alone." if alone else "."
    return drawn(name, title, caption, paint)


def epsilon_by_client(run: Run) -> Picture:
    """What each client has spent of its own budget."""
    name, title = "epsilon-clients", "Privacy spent by each client"
    spent = spent_by_client(run)
    if all(row.epsilon is None for row in run.asked):
        return Picture(name, title, "No client states an epsilon: this run gives no differential privacy.")
    if not all(map(math.isfinite, spent.values())):
        count = sum(not math.isfinite(epsilon) for epsilon in spent.values())
        return Picture(
            name, title, f"{count} of {len(spent)} clients have an infinite epsilon: no differential privacy."
        )
    budget = run.budget_epsilon

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(spent)), list(spent.values()), width=0.8, color=colour("blue"), label="spent")
        if budget is not None:
            label = f"budget, epsilon {epsilon_text(budget)}"
            axes.axhline(budget, color=colour("vermillion"), linestyle="--", linewidth=1.4, label=label)
        axes.set_ylim(0, 1.08 * max([*spent.values(), budget or 0.0, 1e-9]))
        axes.set_ylabel("Epsilon")
        client_axis(axes, list(spent))
        legend(figure, axes)

    caption = "Lower is more private; a client never asked has spent nothing"
    caption += ", and no bar may pass the dashed line of the budget." if budget is not None else "."
    return drawn(name, title, caption, paint)


def label_distribution(run: Run) -> Picture:
    """How many examples of each label each client holds, if that is public."""
    name, title = "labels", "Labels held by each client"
    if run.partition is None:
        withheld, absent = "withheld: the data are not declared public", "not among the files of this run"
        reason = withheld if run.partition_withheld else absent
        return Picture(name, title, f"How the labels are spread over the clients is {reason}.")
    if len(run.partition.labels) > MOST_STACKED_LABELS:
        caption = "One column is a client, one row a label; darker is a larger share of that client's examples."
        return drawn(name, title, caption, lambda figure: _paint_label_shares(figure, run))
    caption = (
        "One bar is one client, its height the number of its examples, its parts their labels; the less "
        "alike the bars, the less alike the clients' data."
    )
    return drawn(name, title, caption, lambda figure: _paint_label_counts(figure, run))


def _paint_alone(axes: Axes, run: Run) -> None:
    accuracy = [one.accuracy for one in run.alone]
    label = "clients alone, lowest to highest"
    axes.axhspan(min(accuracy), max(accuracy), color=colour("green"), alpha=0.16, linewidth=0, label=label)
    axes.axhline(fmean(accuracy), color=colour("green"), linestyle=":", linewidth=1.4, label="clients alone, mean")


def _paint_label_counts(figure: Figure, run: Run) -> None:
    assert run.partition is not None
    counts = run.partition.label_counts
    axes = figure.subplots()
    bottom = [0] * len(counts)
    for index, label in enumerate(run.partition.labels):
        heights = [row[index] for row in counts.values()]
        axes.bar(
            range(len(counts)),
            heights,
            bottom=bottom,
            width=0.8,
            color=colour(SERIES[index]),
            label=_clip(label),
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("Examples")
    client_axis(axes, list(counts))
    legend(figure, axes, columns=4)


def _paint_label_shares(figure: Figure, run: Run) -> None:
    assert run.partition is not None
    counts = run.partition.label_counts
    shares = [[row[i] / max(sum(row), 1) for row in counts.values()] for i in range(len(run.partition.labels))]
    axes = figure.subplots()
    axes.grid(False)
    mesh = axes.imshow(shares, aspect="auto", cmap="cividis_r", vmin=0, interpolation="nearest")
    every = -(-len(run.partition.labels) // 20)
    axes.set_yticks(
        range(0, len(shares), every), [_clip(label) for label in run.partition.labels[::every]], fontsize=6.5
    )
    client_axis(axes, list(counts))
    axes.set_xlim(-0.5, len(counts) - 0.5)
    bar = figure.colorbar(mesh, ax=axes, label="Share of the client's examples (%)", pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")


def _is_finite(epsilon: float | None) -> bool:
    return epsilon is not None and math.isfinite(epsilon)


def _clip(label: str) -> str:
    """Shorten a label for a legend; a leading underscore would hide it there."""
    text = label if len(label) <= 22 else label[:21] + "…"
    return "\u200b" + text if text.startswith("_") or not text else text
