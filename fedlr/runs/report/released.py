"""Which states of a run have scores, and which of them is the model that was released."""

from collections.abc import Sequence

from fedlr.runs.report.run_files import Run, State


def scored(states: Sequence[State]) -> list[State]:
    """Return the states that were scored: all, or those of every few rounds (`tracking.evaluate_every`)."""
    return [state for state in states if state.is_scored]


def released(run: Run) -> State:
    """Return the state whose adapter the run left behind."""
    return run.states[-1]
