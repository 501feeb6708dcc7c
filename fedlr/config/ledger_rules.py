"""What does not go with one ledger for all runs on the same rows (`privacy.ledger`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlr.errors import InputError

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


def check_ledger(experiment: "Experiment", baselines: Sequence[str]) -> None:
    """Refuse what a ledger of all runs does not cover; `baselines` are keys of tracking that train on the rows again.

    Raises:
        InputError: which names the key, its value and what to set.
    """
    e, p = experiment, experiment.privacy
    if (p.ledger is None) != (p.ledger_epsilon is None):
        raise InputError(
            f"Expected privacy.ledger and privacy.ledger_epsilon together, got {p.ledger!r} and {p.ledger_epsilon}: "
            "the file of all runs on the same rows, and their budget"
        )
    if p.ledger is None:
        return
    if p.unit != "example" or p.epsilon is None:
        found = f"{p.unit}, {p.epsilon}"
        raise InputError(
            f"Expected privacy.unit=example and privacy.epsilon with privacy.ledger, got {found}: it counts rows"
        )
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected runtime=local with privacy.ledger, got {e.runtime.kind}: each device keeps a ledger of all runs"
        )
    for key in baselines:
        if getattr(e.tracking, key):
            raise InputError(
                f"Expected tracking.{key}=false with privacy.ledger, got true: a baseline trains on the same rows, and "
                "is in no budget of theirs"
            )
