"""What does not go with private trials, of which `fedlr tune` chooses the best (`privacy.trials`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlr.errors import InputError
from fedlr.errors.ranges import require_delta

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


def check_trials(experiment: "Experiment", baselines: Sequence[str]) -> None:
    """Refuse trials that the bound of their choice does not cover; `baselines` are keys of tracking that train again.

    Raises:
        InputError: which names the key, its value and what to set.
    """
    e, p = experiment, experiment.privacy
    if p.trials is None:
        for key in ("trials_law", "trials_epsilon"):
            if getattr(p, key) is not None:
                raise InputError(f"Expected privacy.trials with privacy.{key}={getattr(p, key)}, got null")
        return
    beside = f"with privacy.trials={p.trials:g}"
    if not p.is_private or (p.epsilon is not None and p.client_epsilon is not None):
        found = "two" if p.is_private else "none: without one nothing is accounted for"
        raise InputError(f"Expected one budget, of rows or of clients, {beside}, got {found}")
    if p.rows_of_unit > 1:
        raise InputError(
            f"Expected privacy.rows_per_person=1 {beside}, got {p.rows_of_unit}: no Renyi bound of several rows of one "
            "person is at hand, and the bound of a choice needs one"
        )
    if p.ledger is not None:
        raise InputError(
            f"Expected privacy.ledger=null {beside}, got {p.ledger}: it would charge every trial in full, and tell how "
            "many there were, which must stay secret"
        )
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected runtime=local {beside}, got {e.runtime.kind}: a server of devices sees every trial, and what it "
            "sees adds up"
        )
    if e.patience is not None:
        raise InputError(f"Expected patience=null {beside}, got {e.patience}: trials are of equal length")
    for key in baselines:
        if getattr(e.tracking, key):
            raise InputError(f"Expected tracking.{key}=false {beside}, got true: a baseline trains outside the trials")
    require_delta(p.delta, "rdp")
