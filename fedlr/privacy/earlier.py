"""What a statement says of an earlier run whose adapter this one began with.

The released adapter is a function of both runs. So a row that both read is protected by their sum alone: epsilons and
deltas add up (Dwork and Roth 2014, theorem 3.16). Whether they read the same rows nothing here can tell, what files are
called least of all: a statement never claims more than that of its start.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedlr.privacy.units import rounded_up

INFINITE = "inf"


def earlier_run(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of the statement of an earlier run, as its model card has it; its own start is counted in.

    Raises:
        KeyError, TypeError, ValueError: it is no such statement.

    >>> from fedlr.privacy.statement import no_privacy_statement
    >>> found = earlier_run(no_privacy_statement(3))
    >>> found["epsilon"], found["unit"]
    ('inf', 'one training example of one client (add or remove one example)')
    """
    before = statement.get("started_from")
    counted = (
        statement if before is None else {"epsilon": {"maximum": before["epsilon_sum"]}, "delta": before["delta_sum"]}
    )
    epsilon, delta = largest(counted), counted["delta"]
    is_private = bool(statement["differential_privacy"]) and math.isfinite(epsilon)
    if is_private and not (epsilon >= 0 and 0 < float(delta) < 1):
        raise ValueError(f"epsilon {epsilon!r:.20} at delta {delta!r:.20}")
    name = statement.get("dataset_id")
    return {
        "epsilon": epsilon if is_private else INFINITE,
        "delta": float(delta) if is_private else None,
        "dataset_id": None if name is None else str(name)[:200],
        "for_release": is_private and statement["for_release"] is True,
        "unit": f"{statement['unit']} ({statement['neighbouring_relation']})"[:200],
    }


def largest(statement: Mapping[str, Any]) -> float:
    """Return the largest epsilon of a statement: of a choice among trials, of a ledger, or of what clients report;
    infinite where it has none.

    >>> largest({"epsilon": {"maximum": 5.13}, "trials": {"epsilon": 8.96}})
    8.96
    """
    if "epsilon" in statement:
        of_one = float(statement["epsilon"]["maximum"])
        return max(of_one, float(statement["trials"]["epsilon"])) if statement.get("trials") else of_one
    return max((float(client["epsilon"]) for client in statement.get("clients", ())), default=math.inf)


def with_earlier(statement: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a statement that also counts the run whose adapter this one began with; None: it began with none.

    Args:
        statement: of this run.
        earlier: what `earlier_run` returned, and names of the folder; or `started_from` of a statement.

    Guarantees: the statement claims no differential privacy, and no release, that the earlier one does not have.
    """
    if earlier is None:
        return statement
    kept = {key: value for key, value in earlier.items() if key not in ("epsilon_sum", "delta_sum")}
    own, before = largest(statement), float(earlier["epsilon"])
    is_alike = earlier["unit"] == f"{statement['unit']} ({statement['neighbouring_relation']})"
    total = own + before if is_alike else math.inf  # of other units nothing adds up
    delta = (statement["delta"] or 0.0) + (earlier["delta"] or 0.0) if math.isfinite(total) else None
    names = (statement.get("dataset_id"), earlier["dataset_id"])
    sums = {"epsilon_sum": total if delta is not None else INFINITE, "delta_sum": delta}
    return {
        **statement,
        "started_from": {**kept, **sums},
        "statement": f"{statement['statement']} {_sentence(earlier, before, total, delta, names)}",
        "differential_privacy": statement["differential_privacy"] and delta is not None,
        "for_release": statement["for_release"] and earlier["for_release"],
    }


def start_note(earlier: Mapping[str, Any]) -> str:
    """Say, before a run, what its start is worth to whoever is in both."""
    before = float(earlier["epsilon"])
    if not math.isfinite(before):
        return "the start was trained without privacy: whatever epsilon this run prints, it is not private as a whole"
    whom = str(earlier["unit"]).partition(" (")[0]
    return f"the start was trained with epsilon {rounded_up(before)} for {whom}; privacy.json counts it in at the end"


def _sentence(
    earlier: Mapping[str, Any], before: float, total: float, delta: float | None, names: tuple[Any, Any]
) -> str:
    data = f" on {names[1]!r}" if names[1] is not None else ""
    same = ", the data of this run" if names[0] is not None and names[0] == names[1] else ""
    if not math.isfinite(before):
        return (
            f"It began with an adapter that was trained{data}{same} without differential privacy: a row that was read "
            "there is not protected here either."
        )
    told = (
        f"It began with an adapter that was trained with epsilon <= {rounded_up(before)} at delta = "
        f"{earlier['delta']:g}{data}{same}, for {earlier['unit']}, by its model card"
    )
    if delta is None:
        return f"{told}: no sum of the two bounds what is known of a row that both runs read."
    return (
        f"{told}: for a row that both runs read the two add up to epsilon <= {rounded_up(total)} at delta = {delta:g}."
    )
