"""What runs are compared by: accuracy, or another score between 0 and 1 of which more is better."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedlr.errors import InputError
from fedlr.runs.report.run_files import Run, State

ACCURACY = "accuracy"
METRICS: Mapping[str, str] = {
    ACCURACY: "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "auc": "ROC area",
}


def metric_name(metric: str) -> str:
    """Return how a metric is called in a title.

    Raises:
        InputError: there is no such metric.
    """
    if metric not in METRICS:
        raise InputError(f"Expected --metric to be {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric]


def measured_by(run: Run, metric: str, run_dir: Path) -> Run:
    """Return a run whose accuracies, at the start, at the end and by round, are another of its scores.

    Raises:
        InputError: the run has no such score.
    """
    if metric == ACCURACY:
        return run
    states = [replace(state, accuracy=_score(state, metric, run_dir)) for state in run.states]
    start, final = states[0].accuracy, states[-1].accuracy
    return replace(run, states=states, summary=replace(run.summary, start_accuracy=start, final_accuracy=final))


def _score(state: State, metric: str, run_dir: Path) -> float:
    if metric not in state.scores:
        raise InputError(
            f"Expected {metric!r} in every line of {run_dir / 'metrics.jsonl'}, got none after round "
            f"{state.rounds_completed}: not defined there, or the run is of an earlier version; compare by accuracy"
        )
    return state.scores[metric]
