"""A device that is told what it once said: it stops where its ledger knows less, before anything is read or charged.

Mutants killed: a device that looks at the epsilon alone, at the head alone, or after the charge.
"""

from dataclasses import replace
from pathlib import Path

import pytest

import fedlr.client.device
from fedlr.client.device import Device
from fedlr.flower.messages import LedgerEcho, Reply, Request
from fedlr.flower.node_key import create_node_key
from fedlr.flower.signed import is_signed
from tests.client.device_files import device_settings
from tests.client.hostile_server import sane_request
from tests.training.small_models import mutant

UNKNOWN = "e" * 64


def refused(device: Device, request: Request, echo: LedgerEcho | None) -> str | None:
    return Reply.read(device.answer(replace(request, echo=echo).record())).facts.refused


def a_device_stops(folder: Path, module: object = fedlr.client.device) -> None:
    """Raise AssertionError unless the echo decides, and nothing is charged where it stops the device."""
    settings = device_settings(folder / "device")
    device = module.Device(settings, say=lambda line: None)  # type: ignore[attr-defined]
    request = sane_request()
    ledger = settings.open_ledger()
    assert ledger is not None
    head, before = ledger.head(), settings.ledger_path.read_bytes()
    found = [
        refused(device, request, echo)
        for echo in (LedgerEcho(0.0, UNKNOWN), LedgerEcho(3.0, head), LedgerEcho(3.0, None), LedgerEcho(9e8, UNKNOWN))
    ]
    assert found == ["older_ledger", "spent_less", "spent_less", "older_ledger"]
    assert settings.ledger_path.read_bytes() == before and not list(settings.experiments_dir.glob("*"))
    assert refused(device, request, LedgerEcho(0.0, head)) is None, "an echo that is true changes nothing"
    spent = ledger.spent(0)
    assert spent > 0 and refused(device, request, LedgerEcho(spent, ledger.head())) is None
    assert refused(device, request, LedgerEcho(spent, head)) is None, "an older row is there still"


def test_a_ledger_that_was_put_back_is_found_by_what_the_server_remembers(tmp_path: Path) -> None:
    a_device_stops(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("self._ledger.require(echo.head or GENESIS)", "pass"),
        ("if echo.epsilon > (spent := self._ledger.spent(OWN)) * (1 + ROUNDING) + ROUNDING:", "if False:"),
    ],
    ids=["any head", "any epsilon"],
)
def test_a_device_that_does_not_look_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        a_device_stops(tmp_path, mutant(fedlr.client.device, change))


def test_what_a_device_says_is_signed_refusals_too(tmp_path: Path) -> None:
    settings = device_settings(tmp_path / "device")
    path = settings.server.private_key
    line = path.with_name(path.name + ".pub").read_text() if path.exists() else create_node_key(path).read_text()
    device = Device(settings, say=lambda line: None)
    reply = Reply.read(device.answer(replace(sane_request(), echo=LedgerEcho(0.0, UNKNOWN)).record()))
    assert reply.facts.refused == "older_ledger" and reply.facts.signature is not None
    assert is_signed(reply.facts.model_dump(), reply.facts.signature, line)
    assert not is_signed(reply.facts.model_dump() | {"epsilon": 0.5}, reply.facts.signature, line)
