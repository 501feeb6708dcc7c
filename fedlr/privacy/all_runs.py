"""What a statement says of all runs on the same rows, where they share a ledger (`privacy.ledger`)."""

import os
from collections.abc import Mapping
from typing import Any

from fedlr.privacy.charges import read_ledger
from fedlr.privacy.units import rounded_up

ANY_ROW = 0  # the one account of such a ledger
MEANS = (
    "all runs that were charged to this ledger, each in full and before it began, together: for one row of the data "
    "set, whichever client held it; by a Renyi filter, as runs may be chosen by the results of earlier ones"
)


def all_runs(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a ledger of all runs says now."""
    header, charges, head = read_ledger(path)
    return {
        "epsilon": charges.epsilon(ANY_ROW, header),
        "delta": header.delta,
        "budget": header.epsilon,
        "num_runs": len(charges.of(ANY_ROW)),
        "ledger_head": head,
        "means": MEANS,
    }


def with_all_runs(statement: dict[str, Any], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a statement that also says what all runs on the data have spent together."""
    if found is None:
        return statement
    sentence = (
        f"With the other runs on these data, {found['num_runs']} so far: epsilon <= {rounded_up(found['epsilon'])} at "
        f"delta = {found['delta']:g}, of a budget of {found['budget']:g}, for one row."
    )
    return {**statement, "statement": f"{statement['statement']} {sentence}", "all_runs": dict(found)}
