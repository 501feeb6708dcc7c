"""The ledgers of a simulated run: of its clients, and of the server where whole clients are hidden."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fedlr.errors.ranges import UnitName
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.simulations.federation import Federation

Make = Callable[..., PrivacyLedger]


def create_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Create the clients' ledger of a run; None where they have no budget."""
    return _of_clients(federation, path, PrivacyLedger.create)


def open_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Open the clients' ledger of a run that goes on; None where they have no budget.

    Raises:
        InputError: it is missing, was changed, or is another run's.
    """
    return _of_clients(federation, path, PrivacyLedger.open)


def create_server_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Create the server's ledger of a run; None where whole clients are not hidden."""
    return _made(federation, path, PrivacyLedger.create, federation.client_budget, unit="client")


def open_server_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Open the server's ledger of a run that goes on; None where whole clients are not hidden.

    Raises:
        InputError: it is missing, was changed, or is another run's.
    """
    return _made(federation, path, PrivacyLedger.open, federation.client_budget, unit="client")


def spent_in_rounds(ledger: PrivacyLedger | None, clients: Iterable[int], num_rounds: int) -> dict[int, float]:
    """Return the epsilon of clients after so many rounds; nothing without privacy.

    What a killed process reserved of later rounds counts from there on: seeded, it will be the same release. Under
    randomness of the operating system it was another one, and counts at once.
    """
    if ledger is None:
        return {}
    return ledger.spent_all(clients, num_rounds=num_rounds if ledger.is_seeded else None)


def _of_clients(federation: Federation, path: Path, make: Make) -> PrivacyLedger | None:
    privacy = federation.experiment.privacy
    unit: UnitName = "person" if privacy.unit == "person" else "example"
    return _made(federation, path, make, federation.budget, unit=unit, rows_per_person=privacy.rows_of_unit)


def _made(
    federation: Federation,
    path: Path,
    make: Make,
    budget: PrivacyBudget | None,
    *,
    unit: UnitName,
    rows_per_person: int = 1,
) -> PrivacyLedger | None:
    if budget is None:
        return None
    privacy = federation.experiment.privacy
    return make(
        path,
        budget,
        accountant=privacy.accountant,
        dataset_id=federation.source,
        randomness=privacy.randomness,
        unit=unit,
        rows_per_person=rows_per_person,
    )
