"""Clients on held-out rows of their own: the shared adapter beside what each reaches alone."""

from statistics import fmean

from matplotlib.figure import Figure

from fedlr.runs.report.picture import MOST_CLIENTS, Picture, clipped, drawn
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.svg import bar_limits, colour, legend, percent_axis
from fedlr.runs.report.wording import count, percent

MOST_NAMED = 12


def together_and_alone(run: Run) -> Picture | None:
    """Return both accuracies of each client, as bars side by side; None where one of them was not asked for."""
    alone = {one.client_id: one.own_accuracy for one in run.alone if one.own_accuracy is not None}
    clients = [one for one in run.client_accuracy if one.accuracy is not None and one.client_id in alone]
    if not clients or len(clients) > MOST_CLIENTS:
        return None
    together, apart = [one.accuracy or 0.0 for one in clients], [alone[one.client_id] for one in clients]
    better = sum(t > a for t, a in zip(together, apart, strict=True))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(clients))
        axes.bar([x - 0.2 for x in places], together, width=0.38, color=colour("blue"), label="together")
        axes.bar([x + 0.2 for x in places], apart, width=0.38, color=colour("orange"), label="alone")
        bar_limits(axes, 0, len(clients) - 1)
        if len(clients) <= MOST_NAMED:
            axes.set_xticks(list(places), [clipped(one.name or f"client {one.client_id}") for one in clients])
        else:
            axes.set_xlabel("Client")
        percent_axis(axes)
        legend(figure, axes)

    caption = (
        f"Each client on its own held-out rows: the shared adapter {percent(fmean(together))} in the mean, its own "
        f"adapter, trained on its rows alone for as many rounds, {percent(fmean(apart))}. Together is better for "
        f"{better:,} of {count(len(clients), 'client')}."
    )
    return drawn("own-rows", "Together and alone", caption, paint, is_wide=True)
