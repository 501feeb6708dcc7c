"""A device whose disk fills up at any write of a round: no update leaves, and what was charged stays charged.

With room again it answers the same request: seeded, with the update that it would have sent, charged once; with noise
of the operating system as another release, charged anew, and never less than once. Mutant killed: an update that leaves
and is not on the disk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlr.client.device
from fedlr.client.device import Device
from fedlr.errors import InputError
from fedlr.flower.messages import Reply
from tests.client.device_files import device_settings
from tests.client.test_device import answer, request
from tests.simulations.every_write import FULL, full_from

LEAST = 15  # writes of a round: the adapter it was given, the charge, the update


def asked(device: Device, round_index: int, randomness: str) -> Reply | None:
    """Return the reply; None where the device could not even refuse, which its node says for it (`device_error`)."""
    try:
        return answer(device, request(round_index=round_index, randomness=randomness, num_rounds=100))
    except InputError as error:
        assert FULL in str(error) and "\n" not in str(error)
        return None


def every_write_of_a_round(folder: Path, randomness: str, *, every: int = 1) -> int:
    """Return how many writes there are, each of which (or one of so many) failed once, and all after it."""
    said: list[str] = []
    limits: dict[str, Any] = {"privacy__epsilon": 500.0, "privacy__randomness": randomness}
    limits |= {"policy__allow_seeded_randomness": randomness == "seeded"}
    device, twin = (Device(device_settings(folder / name, **limits), say=said.append) for name in ("device", "twin"))
    ledger = device._settings.open_ledger()
    assert ledger is not None
    for one in (device, twin):
        reply = asked(one, 0, randomness)
        assert reply is not None and reply.tensors, said
    for number in range(0, 200, every):
        before, said[:] = ledger.participations(0), []
        with full_from(number, folder) as calls:
            reply = asked(device, number + 1, randomness)
        if len(calls) <= number:
            assert reply is not None and reply.tensors, said
            return number
        assert reply is None or (reply.facts.refused, reply.tensors) == ("device_error", {}), calls[number]
        assert all(line.count("\n") == 0 for line in said), said
        again, expected = (asked(one, number + 1, randomness) for one in (device, twin))
        assert again is not None and expected is not None, calls[number]
        num_charged = ledger.participations(0) - before
        if randomness == "seeded":
            assert all(torch.equal(again.tensors[slot], tensor) for slot, tensor in expected.tensors.items())
            assert num_charged == 1, calls[number]
        assert again.tensors and 1 <= num_charged <= 2, calls[number]
    raise AssertionError("it never ended")


@pytest.mark.parametrize(
    ("randomness", "every"),
    [("os", 5), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("seeded", "os"))],
)
def test_a_device_whose_disk_is_full_at_any_write_sends_nothing_and_goes_on_with_room(
    tmp_path: Path, randomness: str, every: int
) -> None:
    assert every_write_of_a_round(tmp_path, randomness, every=every) >= LEAST


def passes_over(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        try:
            return real(*args, **options)
        except (OSError, InputError):
            return None

    return call


@pytest.mark.slow
def test_an_update_that_is_sent_and_not_kept_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedlr.client.device.Replies, "write", passes_over(fedlr.client.device.Replies.write))
    with pytest.raises(AssertionError):
        every_write_of_a_round(tmp_path, "seeded")
