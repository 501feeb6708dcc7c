"""Pictures of the clients: what each has spent and holds, or, of many clients, how they are spread."""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from fedlr.runs.report.picture import MOST_CLIENTS, Picture, client_axis, clipped, drawn
from fedlr.runs.report.run_files import Partition, Run, spent_by_client
from fedlr.runs.report.svg import SERIES, colour, legend, log_axis
from fedlr.runs.report.wording import short

MOST_STACKED_LABELS = len(SERIES)
MOST_TICKS = 20
BINS = 40


def epsilon_by_client(run: Run) -> Picture:
    """What each client has spent of its own budget."""
    name, title = "epsilon-clients", "Privacy spent by each client"
    spent = spent_by_client(run)
    if run.hides_clients:
        return Picture(name, title, "Withheld of each client: who took part is told to nobody. The statement has it.")
    if all(row.epsilon is None for row in run.asked):
        return Picture(name, title, "No client states an epsilon: this run gives no differential privacy.")
    if not all(map(math.isfinite, spent.values())):
        count = sum(not math.isfinite(epsilon) for epsilon in spent.values())
        return Picture(
            name, title, f"{count} of {len(spent)} clients have an infinite epsilon: no differential privacy."
        )
    budget = run.budget_epsilon
    if len(spent) > MOST_CLIENTS:
        return drawn(name, title, _spread_caption(spent, budget), lambda figure: _paint_spread(figure, spent, budget))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(spent)), list(spent.values()), width=0.8, color=colour("blue"), label="spent")
        if budget is not None:
            label = f"budget, epsilon {short(budget)}"
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
    if len(run.partition.label_counts) > MOST_CLIENTS:
        return drawn(name, title, _shares_caption(run.partition), partial(_paint_shares, partition=run.partition))
    if len(run.partition.labels) > MOST_STACKED_LABELS:
        caption = "One column is a client, one row a label; darker is a larger share of that client's examples."
        return drawn(name, title, caption, lambda figure: _paint_label_shares(figure, run))
    caption = (
        "One bar is one client, its height the number of its examples, its parts their labels; the less "
        "alike the bars, the less alike the clients' data."
    )
    return drawn(name, title, caption, lambda figure: _paint_label_counts(figure, run))


def _spread_caption(spent: Mapping[int, float], budget: float | None) -> str:
    unspent = sum(epsilon == 0 for epsilon in spent.values())
    caption = f"Further left is more private; {unspent:,} of {len(spent):,} clients have spent nothing"
    caption += ", and none may lie to the right of the dashed line of the budget" if budget is not None else ""
    return caption + "; mind that the vertical axis is logarithmic."


def _paint_spread(figure: Figure, spent: Mapping[int, float], budget: float | None) -> None:
    values = list(spent.values())
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1.02 * max([*values, budget or 0.0, 1e-9])))
    axes = figure.subplots()
    axes.stairs(counts, edges, baseline=0.5, fill=True, color=colour("blue"), label="clients")
    if budget is not None:
        label = f"budget, epsilon {short(budget)}"
        axes.axvline(budget, color=colour("vermillion"), linestyle="--", linewidth=1.4, label=label)
    log_axis(axes)
    axes.set_ylim(0.5, 2 * max(counts))
    axes.set_xlabel("Epsilon spent")
    axes.set_ylabel("Clients")
    legend(figure, axes)


def _shares_caption(partition: Partition) -> str:
    sizes = sorted({sum(counts) for counts in partition.label_counts.values()})
    held = f"{sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"
    return (
        "One row is a label: its bar spans the share that the label has of a client's examples for eight of ten "
        "clients, its dot is the median; the longer the bars, the less alike the clients' data. A client holds "
        f"{held} examples."
    )


def _paint_shares(figure: Figure, *, partition: Partition) -> None:
    counts = np.array(list(partition.label_counts.values()))
    low, middle, high = np.quantile(counts / counts.sum(axis=1, keepdims=True).clip(1), [0.1, 0.5, 0.9], axis=0)
    axes = figure.subplots()
    rows = range(len(partition.labels))
    axes.hlines(rows, low, high, color=colour("sky"), linewidth=5, label="eight of ten clients")
    axes.plot(middle, rows, "o", color=colour("blue"), label="median client")
    every = -(-len(rows) // MOST_TICKS)
    axes.set_yticks(rows[::every], [clipped(label) for label in partition.labels[::every]])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x")
    axes.set_xlabel("Share of a client's examples (%)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    legend(figure, axes)


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
            label=clipped(label),
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
    every = -(-len(run.partition.labels) // MOST_TICKS)
    axes.set_yticks(
        range(0, len(shares), every), [clipped(label) for label in run.partition.labels[::every]], fontsize=6.5
    )
    client_axis(axes, list(counts))
    axes.set_xlim(-0.5, len(counts) - 0.5)
    bar = figure.colorbar(mesh, ax=axes, label="Share of the client's examples (%)", pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
