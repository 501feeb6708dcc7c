"""What a reader must be warned of: files that contradict each other, and rounds or runs that came to nothing."""

import math
from collections.abc import Sequence

from fedlr.runs.report.released import released
from fedlr.runs.report.run_files import Run, State, spent_by_client

MOST_NAMED = 8  # rounds in a sentence


def for_nothing(run: Run) -> list[str]:
    """Return one sentence for each arm of the run, and for its rounds, that trained for nothing."""
    found = [] if run.summary.problem is None else [f"Nothing was learnt: {run.summary.problem}."]
    found += _without_update(run.states, "")
    found += _without_update(run.no_privacy, " of the run without privacy")
    if idle := [one.client_id for one in run.alone if one.num_updates == 0]:
        found.append(f"{len(idle)} of {len(run.alone)} clients alone had no usable update: they stayed at the start.")
    return found


def _without_update(states: Sequence[State], whose: str) -> list[str]:
    rounds = [state.rounds_completed for state in states if state.rounds_completed and state.num_trained == 0]
    if not rounds:
        return []
    named = ", ".join(map(str, rounds[:MOST_NAMED])) + (" and others" if len(rounds) > MOST_NAMED else "")
    of_all = f" ({len(rounds)} of {len(states) - 1})" if len(rounds) > 1 else ""
    return [
        f"Round{'s' if len(rounds) > 1 else ''} {named}{of_all}{whose} had no usable update: the model stayed as it was"
        f" ({', '.join(sorted({reason for state in states for reason in state.reasons})) or 'no reason given'})."
    ]


def disagreements(run: Run) -> list[str]:
    """Return one sentence for each contradiction."""
    summary, first, last, final = run.summary, run.states[0], run.states[-1], released(run)
    found = []
    for name, told, seen in (
        ("start_accuracy", summary.start_accuracy, first.accuracy),
        ("final_accuracy", summary.final_accuracy, final.accuracy),
        ("bytes_up", summary.bytes_up, sum(state.bytes_up for state in run.states)),
        ("bytes_down", summary.bytes_down, sum(state.bytes_down for state in run.states)),
    ):
        if not _same(told, seen):
            found.append(f"The files disagree: summary.json says {name} = {told:g}, metrics.jsonl says {seen:g}.")
    if last.rounds_completed != summary.released.get("num_rounds", summary.num_rounds):
        found.append(
            f"The run is not complete: metrics.jsonl has {last.rounds_completed} of its {summary.num_rounds} rounds."
        )
    return found + _about_privacy(run)


def _about_privacy(run: Run) -> list[str]:
    told, seen = run.summary.epsilon_max, run.states[-1].epsilon_max
    largest = max(spent_by_client(run).values(), default=0.0)
    found, where = [], "privacy.json" if run.statement.get("trials") else "metrics.jsonl"
    if not run.summary.is_private and told is not None:
        found.append(f"The files disagree: summary.json says privacy = none, and epsilon_max = {told:g}.")
    if (trials := run.statement.get("trials")) and isinstance(trials, dict):
        seen = trials.get("epsilon")  # the lines are of one trial, the summary of the choice too
    if told is not None and isinstance(seen, float) and not _same(told, seen):
        found.append(f"The files disagree: summary.json says epsilon_max = {told:g}, {where} says {seen:g}.")
    if told is not None and largest > told * (1 + 1e-9):
        found.append(f"The files disagree: summary.json says epsilon_max = {told:g}, a client has spent {largest:g}.")
    if run.budget_epsilon is not None and largest > run.budget_epsilon * (1 + 1e-9):
        found.append(f"A client has spent {largest:g}, more than its budget of {run.budget_epsilon:g}.")
    return found


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))
