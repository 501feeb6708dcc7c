"""Where the files of a run contradict each other: a report says so and never picks the nicer number."""

import math

from fedlr.report.run_files import Run, spent_by_client


def disagreements(run: Run) -> list[str]:
    """Return one sentence for each contradiction."""
    summary, first, last = run.summary, run.states[0], run.states[-1]
    found = []
    for name, told, seen in (
        ("start_accuracy", summary.start_accuracy, first.accuracy),
        ("final_accuracy", summary.final_accuracy, last.accuracy),
        ("bytes_up", summary.bytes_up, sum(state.bytes_up for state in run.states)),
        ("bytes_down", summary.bytes_down, sum(state.bytes_down for state in run.states)),
    ):
        if not _same(told, seen):
            found.append(f"The files disagree: summary.json says {name} = {told:g}, metrics.jsonl says {seen:g}.")
    if last.rounds_completed != summary.num_rounds:
        found.append(
            f"The run is not complete: metrics.jsonl has {last.rounds_completed} of its {summary.num_rounds} rounds."
        )
    return found + _about_privacy(run)


def _about_privacy(run: Run) -> list[str]:
    told, seen = run.summary.epsilon_max, run.states[-1].epsilon_max
    largest = max(spent_by_client(run).values(), default=0.0)
    found = []
    if not run.summary.is_private and told is not None:
        found.append(f"The files disagree: summary.json says privacy = none, and epsilon_max = {told:g}.")
    if told is not None and seen is not None and not _same(told, seen):
        found.append(f"The files disagree: summary.json says epsilon_max = {told:g}, metrics.jsonl says {seen:g}.")
    if told is not None and largest > told * (1 + 1e-9):
        found.append(f"The files disagree: summary.json says epsilon_max = {told:g}, a client has spent {largest:g}.")
    if run.budget_epsilon is not None and largest > run.budget_epsilon * (1 + 1e-9):
        found.append(f"A client has spent {largest:g}, more than its budget of {run.budget_epsilon:g}.")
    return found


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))
