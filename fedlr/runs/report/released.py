"""Which states of a run have scores, and which of them is the model that was released."""

from collections.abc import Sequence

from fedlr.runs.report.run_files import Run, State
from fedlr.runs.selection import BEST, VALIDATION, Selection, told


def scored(states: Sequence[State]) -> list[State]:
    """Return the states that were scored: all, or those of every few rounds (`tracking.evaluate_every`)."""
    return [state for state in states if state.is_scored]


def released(run: Run) -> State:
    """Return the state whose adapter the run left behind."""
    number = run.summary.released.get("rounds_completed")
    return next((state for state in run.states if state.rounds_completed == number), run.states[-1])


def released_by(run: Run, arm: Sequence[State]) -> State:
    """Return the state that another arm of a run would leave behind, chosen by the run's own rule."""
    selection = Selection(run.summary.metric, str(run.summary.released.get("model")))
    rows = [{"rounds_completed": state.rounds_completed, VALIDATION: state.validation} for state in arm]
    number = selection.released(rows)["rounds_completed"]
    return next(state for state in arm if state.rounds_completed == number)


def which_model(run: Run) -> list[str]:
    """Return sentences on which model was released and whether the run stopped early; none where it is the last."""
    record = run.summary.released
    if not record or not (record["model"] != "last" or record["stopped_early"]):
        return []
    sentence = told(record)
    found = [f"{sentence[0].upper()}{sentence[1:]}."]
    if record["stopped_early"]:
        found.append(
            f"The run stopped after round {record['num_rounds']} of {run.summary.num_rounds}, by its scores on "
            "validation rows"
            + ("; its epsilon is that of all rounds that were announced." if run.summary.is_private else ".")
        )
    if run.alone and record["model"] == BEST:
        found.append("Clients alone are not chosen among: each is told by its last model.")
    return found
