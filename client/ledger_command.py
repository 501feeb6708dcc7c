"""`fedlr client init` and `fedlr client ledger`: the ledger of this device, made once and read from its file alone."""

import json
from pathlib import Path

from fedlr.client.device import OWN
from fedlr.client.settings import FOLDER_MODE, Settings, load_settings
from fedlr.errors import InputError
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.statement import privacy_statement
from fedlr.runs.commands import Options, command


@command
def init(arguments: list[str]) -> None:
    """Make this device's state folder and its ledger, once: fedlr client init client.yaml

    An existing ledger is never overwritten. Do not make a new one for data that were trained on before: what was
    spent stays spent.
    """
    options = Options()
    options.add_argument("settings", type=Path)
    settings = load_settings(options.parse_args(arguments).settings)
    ledger = create_ledger(settings)
    if ledger is None:
        print(f"{settings.state_dir}: made, without a ledger: privacy.epsilon=null, so nothing is accounted")
        return
    p = settings.privacy
    print(f"{ledger.path}: a budget of epsilon {p.epsilon:g} at delta {p.delta:g} for {settings.dataset_id!r}")
    print(f"head {ledger.head()}: keep it in a second place, so that an older copy of the file can be told")


def create_ledger(settings: Settings) -> PrivacyLedger | None:
    """Make the state folder (mode 0700) and the ledger in it; None without privacy.

    Raises:
        InputError: the ledger is there already, or the folder cannot be made.
    """
    budget, p = settings.budget(), settings.privacy
    if settings.ledger_path.exists():
        raise InputError(f"Expected no ledger in {settings.state_dir} yet, got {settings.ledger_path}; it is kept")
    if settings.experiments_dir.exists():
        raise InputError(
            f"Expected a state_dir that never trained, got {settings.experiments_dir}: restore the ledger that "
            "belongs to it"
        )
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
    except OSError as error:
        raise InputError(f"Expected to make state_dir {settings.state_dir}, got {error.strerror}") from None
    if budget is None:
        return None
    return PrivacyLedger.create(
        settings.ledger_path,
        budget,
        dataset_id=settings.dataset_id,
        randomness=p.randomness,
        accountant=p.accountant,
    )


@command
def ledger(arguments: list[str]) -> None:
    """Say what was spent on this device's data, from its ledger alone: fedlr client ledger client.yaml [--json]

    --json prints the whole privacy statement.
    """
    options = Options()
    options.add_argument("settings", type=Path)
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args(arguments)
    settings = load_settings(chosen.settings)
    if settings.budget() is None:
        raise InputError(f"Expected a budget in {chosen.settings}, got privacy.epsilon=null: there is no ledger")
    settings.open_ledger()  # refuses one that is missing, changed, or another's
    stated = privacy_statement(settings.ledger_path, [OWN])
    if chosen.json:
        print(json.dumps(stated, indent=2))
        return
    statuses = stated["num_clients_by_status"]
    print(
        f"epsilon spent  {stated['epsilon']['maximum']} of {stated['budget']['epsilon']:g} at delta {stated['delta']:g}"
    )
    print(f"data           {stated['dataset_id']}")
    print(f"statement      {stated['statement']}")
    if statuses["open_reservation_counted_in_full"]:
        print("open           a round that began and never ended is counted in full")
    print(f"head           {stated['ledger_head']}")
