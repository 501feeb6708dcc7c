"""The clients' ledger of a simulated run, and what it says of the first rounds."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fedlr.privacy.ledger import PrivacyLedger
from simulations.federation import Federation


def create_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Create the ledger of a run; None without privacy."""
    return _ledger(federation, path, PrivacyLedger.create)


def open_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Open the ledger of a run that goes on; None without privacy.

    Raises:
        InputError: it is missing, was changed, or is another run's.
    """
    return _ledger(federation, path, PrivacyLedger.open)


def _ledger(federation: Federation, path: Path, make: Callable[..., PrivacyLedger]) -> PrivacyLedger | None:
    if federation.budget is None:
        return None
    privacy = federation.experiment.privacy
    return make(
        path,
        federation.budget,
        accountant=privacy.accountant,
        dataset_id=federation.source,
        randomness=privacy.randomness,
        unit="person" if privacy.unit == "person" else "example",
        rows_per_person=privacy.rows_of_unit,
    )


def spent_in_rounds(ledger: PrivacyLedger | None, clients: Iterable[int], num_rounds: int) -> dict[int, float]:
    """Return the epsilon of clients after so many rounds; nothing without privacy.

    What a killed process reserved of later rounds counts from there on: seeded, it will be the same release. Under
    randomness of the operating system it was another one, and counts at once.
    """
    if ledger is None:
        return {}
    return ledger.spent_all(clients, num_rounds=num_rounds if ledger.is_seeded else None)
