"""What a statement says of all runs on the same rows, where they share a ledger (`privacy.ledger`)."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedlr.errors import InputError
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.units import rounded_up

ANY_ROW = 0  # the one account of such a ledger
MEANS = (
    "all runs that were charged to this ledger, each in full and before it began, together: for one row of the data "
    "set, whichever client held it; by a Renyi filter, as runs may be chosen by the results of earlier ones"
)


def all_runs(path: str | os.PathLike[str], *, until: str | None = None) -> dict[str, Any]:
    """Return what a ledger of all runs says now, or said when `until` was the hash of its last row.

    A row that another run is writing, or left torn when it was killed, comes after the last: nothing was trained
    for it yet.
    """
    header, charges, head = read_ledger(path, until=until or read_ledger(path)[2])
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
    number = found["num_runs"]
    sentence = (
        f"Together with the other runs on these data ({number} run{'' if number == 1 else 's'} with this one): "
        f"epsilon <= {rounded_up(found['epsilon'])} at delta = {found['delta']:g}, of a budget of "
        f"{found['budget']:g}, for one row."
    )
    return {**statement, "statement": f"{statement['statement']} {sentence}", "all_runs": dict(found)}


def checked_all_runs(told: Any, run_dir: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Compute again what a statement says of all runs, where their ledger is found (privacy.ledger of config.yaml).

    Args:
        told: `all_runs` of the statement; None: it has none.
        run_dir: of the run.

    Returns:
        What the ledger said when the run ended (or `told`, where there is no such file), and a line that says what was
        not checked; None where all was.

    Raises:
        InputError: `told` is no such record, the ledger says something else, or was changed.
    """
    path = _ledger_of(run_dir)
    if told is None:
        if path is not None:
            raise InputError(
                f"Expected all_runs in {run_dir / 'privacy.json'}, as the run has a privacy.ledger, got none"
            )
        return None, None
    kinds = {"epsilon": float, "delta": float, "budget": float, "num_runs": int, "ledger_head": str, "means": str}
    if not isinstance(told, dict) or {key: _kind(value) for key, value in told.items()} != kinds:
        raise InputError(
            f"Expected all_runs of {run_dir / 'privacy.json'} to hold {', '.join(kinds)}, got {told!r:.200}"
        )
    if path is None or not path.exists():
        where = "config.yaml names no privacy.ledger" if path is None else f"there is no {path} from this folder"
        return told, f"not checked: what all runs on these data spent together ({where})"
    found = all_runs(path, until=told["ledger_head"])
    if different := sorted(key for key in kinds if found[key] != told[key]):
        raise InputError(
            f"Expected all_runs of {run_dir / 'privacy.json'} to say what {path} says, "
            f"got other values of {', '.join(different)}"
        )
    return found, None


def _kind(value: Any) -> type | None:
    if type(value) in (int, float) and not (math.isfinite(value) and value >= 0):
        return None
    return type(value)


def _ledger_of(run_dir: Path) -> Path | None:
    """Return the ledger of all runs that a run's configuration names, if it does."""
    path = run_dir / "config.yaml"
    try:
        privacy = (yaml.safe_load(path.read_bytes()) or {}).get("privacy") or {}
        ledger = privacy.get("ledger")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"Expected the configuration of a run in {path}, got {error!r:.200}") from None
    return None if ledger is None else Path(str(ledger))
