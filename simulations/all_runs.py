"""One ledger for all runs on the same rows (`privacy.ledger`): what they spend together, refused before any work.

A run's own ledger forgets the runs before it. This one has a single account, for any row of the data set, whoever held
it in which run: a row is at one client of a run, so it pays at most what a client of that run may. Each run is charged
in full, before it begins, with the steps that a client may take; a run that is killed, stops early or fails stays
charged, and one that is resumed is not charged again.

Who starts a run has seen the results of those before, and may choose noise and steps by them. So the ledger adds up by
the Renyi filter of `fedlr.privacy.filter` (accountant "rdp"), which is proven for that, and not by loss distributions.
"""

import math
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.files import make_folder
from fedlr.privacy.all_runs import ANY_ROW, all_runs
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.privacy.units import rounded_up
from fedlr.simulations.federation import Federation


def charge_run(federation: Federation) -> dict[str, Any] | None:
    """Charge a run to the ledger of all runs on its data; return what a statement says of it, None without one.

    Raises:
        InputError: the runs together would exceed the budget; the file is another data set's, budget's or kind of
            run's, or was changed. Nothing is charged then.
    """
    privacy, mechanism = federation.experiment.privacy, federation.mechanism
    if privacy.ledger is None or mechanism is None:
        return None
    assert privacy.ledger_epsilon is not None
    path = Path(privacy.ledger)
    ledger = _opened(federation, path, PrivacyBudget(privacy.ledger_epsilon, privacy.delta))
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


def _opened(federation: Federation, path: Path, budget: PrivacyBudget) -> PrivacyLedger:
    about: dict[str, Any] = {
        "dataset_id": federation.source,
        "randomness": federation.experiment.privacy.randomness,
        "accountant": "rdp",
    }
    if not path.exists():
        make_folder(path.parent)
        return PrivacyLedger.create(path, budget, **about)
    return PrivacyLedger.open(path, budget, **about)
