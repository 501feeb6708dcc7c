"""What does not go with private trials, of which `fedlr tune` chooses the best (`privacy.trials`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlr.config.ledger_rules import BASELINES
from fedlr.config.rule import rule
from fedlr.errors.ranges import delta_refusals

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

KEYS = ("trials_law", "trials_epsilon")


def _beside(e: "Experiment") -> str:
    return f"with privacy.trials={e.privacy.trials:g}"


@rule("privacy.trials", *(f"privacy.{key}" for key in KEYS))
def trials_are_expected(e: "Experiment") -> Iterator[str]:
    """What is said of trials is said where there are some."""
    for key in KEYS:
        if e.privacy.trials is None and (value := getattr(e.privacy, key)) is not None:
            yield f"Expected privacy.trials with privacy.{key}={value}, got null"


@rule("privacy.epsilon", "privacy.client_epsilon", "privacy.trials")
def one_budget_of_trials(e: "Experiment") -> Iterator[str]:
    """The choice of the best trial is accounted for by one budget, with a delta that its bound takes."""
    p = e.privacy
    if p.trials is None:
        return
    if not p.is_private or (p.epsilon is not None and p.client_epsilon is not None):
        found = "two" if p.is_private else "none: without one nothing is accounted for"
        yield f"Expected one budget, of rows or of clients, {_beside(e)}, got {found}"
    else:
        yield from delta_refusals(p.delta, "rdp")


@rule("privacy.rows_per_person", "privacy.trials")
def trials_of_single_rows(e: "Experiment") -> Iterator[str]:
    """The bound of a choice needs a Renyi bound of each trial, and none of several rows of one person is at hand."""
    if e.privacy.trials is not None and e.privacy.rows_of_unit > 1:
        yield (
            f"Expected privacy.rows_per_person=1 {_beside(e)}, got {e.privacy.rows_of_unit}: no Renyi bound of several "
            "rows of one person is at hand, and the bound of a choice needs one"
        )


@rule("privacy.ledger", "privacy.trials")
def trials_outside_a_ledger(e: "Experiment") -> Iterator[str]:
    """A ledger of all runs would tell how many trials there were."""
    if e.privacy.trials is not None and e.privacy.ledger is not None:
        yield (
            f"Expected privacy.ledger=null {_beside(e)}, got {e.privacy.ledger}: it would charge every trial in full, "
            "and tell how many there were, which must stay secret"
        )


@rule("runtime", "privacy.trials")
def trials_of_a_simulation(e: "Experiment") -> Iterator[str]:
    """A server of devices sees every trial."""
    if e.privacy.trials is not None and e.runtime.kind != "local":
        yield (
            f"Expected runtime=local {_beside(e)}, got {e.runtime.kind}: a server of devices sees every trial, and "
            "what it sees adds up"
        )


@rule("patience", "privacy.trials")
def trials_of_one_length(e: "Experiment") -> Iterator[str]:
    """Trials are of equal length."""
    if e.privacy.trials is not None and e.patience is not None:
        yield f"Expected patience=null {_beside(e)}, got {e.patience}: trials are of equal length"


@rule("tracking.tracker", "privacy.trials")
def trials_outside_a_tracker(e: "Experiment") -> Iterator[str]:
    """A tracker would keep every trial; TensorBoard's files are deleted with it."""
    if e.privacy.trials is not None and e.tracking.tracker not in (None, "tensorboard"):
        yield (
            f"Expected tracking.tracker=null {_beside(e)}, got {e.tracking.tracker}: it would keep every trial, whose "
            "number and scores must stay secret"
        )


@rule(*(f"tracking.{key}" for key in BASELINES), "privacy.trials")
def trials_and_baselines(e: "Experiment") -> Iterator[str]:
    """A baseline trains outside the trials."""
    for key in BASELINES:
        if e.privacy.trials is not None and getattr(e.tracking, key):
            yield f"Expected tracking.{key}=false {_beside(e)}, got true: a baseline trains outside the trials"
