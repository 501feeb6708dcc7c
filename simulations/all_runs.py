"""One ledger for all runs on the same rows (`privacy.ledger`): what they spend together, refused before any work.

A run's own ledger forgets the runs before it. This one has a single account, for any row of the data set, whoever held
it in which run: a row is at one client of a run, so it pays at most what a client of that run may. Each run is charged
in full, before it begins, with the steps that a client may take; a run that is killed, stops early or fails stays
charged, and one that is resumed is not charged again.

Who starts a run has seen the results of those before, and may choose noise and steps by them. So the ledger adds up by
the Renyi filter of `fedlr.privacy.filter` (accountant "rdp"), which is proven for that, and not by loss distributions.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedlr.errors import InputError
from fedlr.files import make_folder, sync_folder, writing
from fedlr.privacy.all_runs import ANY_ROW, all_runs
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.privacy.units import rounded_up
from fedlr.simulations.federation import Federation

Make = Callable[..., PrivacyLedger]


def charge_run(federation: Federation) -> dict[str, Any] | None:
    """Charge a run to the ledger of all runs on its data; return what a statement says of it, None without one.

    A charge is never taken back, so it comes last, when nothing but the training is left to fail.

    Raises:
        InputError: the runs together would exceed the budget; the file is another data set's, budget's or kind of
            run's, or was changed. Nothing is charged then.
    """
    privacy, mechanism = federation.experiment.privacy, federation.mechanism
    if privacy.ledger is None or mechanism is None:
        return None
    path = Path(privacy.ledger)
    ledger = _made(federation, PrivacyLedger.open if path.exists() else _first)
    num_steps = federation.experiment.max_participations * federation.experiment.trainer.num_steps
    refusal = None
    for number in range(ledger.participations(ANY_ROW), ledger.participations(ANY_ROW) + 100):
        refusal = ledger.reserve(number, mechanism, num_steps, [ANY_ROW])[ANY_ROW]
        if refusal is None or refusal.reason != "already_reserved":  # a run that began beside this one took the number
            break
    if refusal is not None:
        raise InputError(
            f"Expected this run to fit into privacy.ledger_epsilon={privacy.ledger_epsilon:g} of all runs in {path}, "
            f"got {_told(refusal.epsilon_if_trained)} with it and {_told(refusal.epsilon_spent)} spent "
            "before: lower privacy.epsilon or num_rounds, or use other data; nothing was charged or trained"
        )
    return all_runs(path)


def _told(epsilon: float) -> str:
    return f"{rounded_up(epsilon):g}" if math.isfinite(epsilon) else "inf"


def open_all_runs(federation: Federation) -> PrivacyLedger | None:
    """Open the ledger that a run was charged to; None without one.

    Raises:
        InputError: it is missing, was changed, or is another data set's, budget's or kind of run's.
    """
    privacy = federation.experiment.privacy
    return None if privacy.ledger is None or federation.mechanism is None else _made(federation, PrivacyLedger.open)


def require_charge(ledger: PrivacyLedger | None, head: str | None) -> None:
    """Refuse a ledger of all runs that does not hold a run's charge any more.

    Args:
        ledger: of `open_all_runs`.
        head: its last row when the run was charged, or later; it follows the charge.

    Raises:
        InputError: the row is not there, or nobody kept it.
    """
    if ledger is None:
        return
    if head is None:
        raise InputError(
            f"Expected all_runs_head in the checkpoint of a run with privacy.ledger={ledger.path}, got none: nothing "
            "says that the run was charged there; start it anew"
        )
    ledger.require(head)


def _made(federation: Federation, make: Make) -> PrivacyLedger:
    privacy = federation.experiment.privacy
    assert privacy.ledger is not None and privacy.ledger_epsilon is not None
    about: dict[str, Any] = {
        "dataset_id": federation.source,
        "randomness": privacy.randomness,
        "accountant": "rdp",
    }
    return make(Path(privacy.ledger), PrivacyBudget(privacy.ledger_epsilon, privacy.delta), **about)


def _first(path: Path, budget: PrivacyBudget, **about: Any) -> PrivacyLedger:
    """Return the ledger of the first run; of runs that begin together one makes it, whole, and all open it."""
    make_folder(path.parent)
    whole = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        PrivacyLedger.create(whole, budget, **about)
        with writing(path), suppress(FileExistsError):
            os.link(whole, path)  # in place of no file, as a rename would be
    finally:
        with suppress(OSError):
            whole.unlink()
    with writing(path):
        sync_folder(path.parent)
    return PrivacyLedger.open(path, budget, **about)
