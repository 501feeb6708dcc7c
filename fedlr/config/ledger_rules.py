"""What does not go with one ledger for all runs on the same rows (`privacy.ledger`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlr.config.rule import rule

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

BASELINES = ("run_no_privacy", "run_alone", "run_centralised")  # of tracking: what trains on the same rows again


@rule("privacy.ledger", "privacy.ledger_epsilon")
def ledger_and_budget(e: "Experiment") -> Iterator[str]:
    """The ledger of all runs on the same rows has a budget."""
    p = e.privacy
    if (p.ledger is None) != (p.ledger_epsilon is None):
        yield (
            f"Expected privacy.ledger and privacy.ledger_epsilon together, got {p.ledger!r} and {p.ledger_epsilon}: "
            "the file of all runs on the same rows, and their budget"
        )


@rule("privacy.unit", "privacy.epsilon", "privacy.ledger")
def ledger_of_rows(e: "Experiment") -> Iterator[str]:
    """The ledger of all runs counts what was spent of rows."""
    p = e.privacy
    if p.ledger is not None and (p.unit != "example" or p.epsilon is None):
        found = f"{p.unit}, {p.epsilon}"
        yield f"Expected privacy.unit=example and privacy.epsilon with privacy.ledger, got {found}: it counts rows"


@rule("runtime", "privacy.ledger")
def ledger_of_a_simulation(e: "Experiment") -> Iterator[str]:
    """Devices keep a ledger of all runs themselves."""
    if e.privacy.ledger is not None and e.runtime.kind != "local":
        yield (
            f"Expected runtime=local with privacy.ledger, got {e.runtime.kind}: each device keeps a ledger of all runs"
        )


@rule(*(f"tracking.{key}" for key in BASELINES), "privacy.ledger")
def ledger_and_baselines(e: "Experiment") -> Iterator[str]:
    """A baseline trains on the same rows, and no budget of theirs has it."""
    for key in BASELINES:
        if e.privacy.ledger is not None and getattr(e.tracking, key):
            yield (
                f"Expected tracking.{key}=false with privacy.ledger, got true: a baseline trains on the same rows, and "
                "is in no budget of theirs"
            )
