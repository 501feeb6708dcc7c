"""What runs are compared by: the score that their task puts first, or another score between 0 and 1."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlr.errors import InputError
from fedlr.runs.report.released import released
from fedlr.runs.report.run_files import Run, State
from fedlr.tasks.evaluation import ACCURACY, Metric

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "auc": "ROC area",
}


def metric_of(runs: Sequence[Run], asked: str | None) -> Metric:
    """Return what runs are compared by: what was asked for, else what their task puts first.

    Raises:
        InputError: there is no such metric, or nobody asked and the runs have several.
    """
    if asked is None:
        found = sorted({run.summary.metric for run in runs}, key=lambda metric: metric.name)
        if len(found) > 1:
            names = ", ".join(metric.name for metric in found)
            raise InputError(f"Expected runs with one score, got {names}: compare those of one task")
        return found[0]
    if asked not in TITLES:
        raise InputError(f"Expected --metric to be {', '.join(TITLES)}, got {asked!r}")
    return replace(ACCURACY, name=asked)


def title_of(metric: Metric) -> str:
    """Return how a metric is called in a title.

    >>> title_of(ACCURACY)
    'accuracy'
    """
    return {**TITLES, "micro_f1": "micro-F1"}.get(metric.name, metric.name)


def measured_by(run: Run, metric: Metric, run_dir: Path) -> Run:
    """Return a run whose scores, at the start, at the end and by round, are of a metric.

    Raises:
        InputError: the run has no such score.
    """
    if metric == run.summary.metric:
        return run
    states = [
        replace(state, score=_score(state, metric, run_dir)) if state.is_scored else state for state in run.states
    ]
    measured = replace(run, states=states)
    summary = replace(run.summary, start_score=states[0].score, final_score=released(measured).score)
    return replace(measured, summary=summary)


def _score(state: State, metric: Metric, run_dir: Path) -> float:
    if metric == ACCURACY:
        return state.accuracy
    if metric.name not in state.scores:
        raise InputError(
            f"Expected {metric.name!r} in every line of {run_dir / 'metrics.jsonl'}, got none after round "
            f"{state.rounds_completed}: not defined there, or the run is of an earlier version; compare by accuracy"
        )
    return state.scores[metric.name]
