"""`fedlr client ...`: what an edge engineer types."""

from collections.abc import Sequence
from pathlib import Path

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.runs.commands import command, dispatch, quiet_flower

COMMANDS = {
    "key": ("fedlr.client.key", "key"),
    "init": ("fedlr.client.ledger_command", "init"),
    "doctor": ("fedlr.client.doctor", "doctor"),
    "run": ("fedlr.client.cli", "run"),
    "ledger": ("fedlr.client.ledger_command", "ledger"),
}


def client(arguments: Sequence[str]) -> int:
    """Train on this device for a server, under its owner's policy: fedlr client COMMAND ...

    key      make this device's key pair
    init     make its ledger, once
    doctor   say what is here, what is wrong, and what will be refused
    run      connect and answer, until stopped
    ledger   say what was spent

    Each takes --help.
    """
    return dispatch("client", client.__doc__, COMMANDS, arguments)


@command
def run(arguments: list[str]) -> None:
    """Connect and answer, until stopped: fedlr client run client.yaml

    One process; the base model is loaded once. Killed at any time it may be started again: what was charged stays
    charged, what was released is sent again.
    """
    if len(arguments) != 1:
        raise InputError(f"Expected one file, such as client.yaml, got {len(arguments)} arguments")
    go_offline(True)  # before whatever reads the environment once
    from fedlr.client.device import Device  # heavy: torch and all that
    from fedlr.client.device_checks import data_text
    from fedlr.client.node import serve
    from fedlr.client.settings import load_settings

    quiet_flower()
    settings = load_settings(Path(arguments[0]))

    def say(line: str) -> None:
        print(f"{settings.name}: {line}", flush=True)

    device = Device(settings, say=say)
    data_text(settings)  # before it connects: found in a round, a row that is wrong would be told in a word
    try:
        serve(settings, device, say=say)
    finally:
        device.close()
