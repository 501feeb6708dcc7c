"""A device with conversations or pictures answers as one with texts does: alike, whatever its draw held.

Messages that a policy cannot refuse, as the model or what was kept must tell, with an empty draw and with two rows: the
same word, lengths and charge; and a refusal charges nothing. A row that a model does not take counts as zero.

Mutants, which are found out: no rehearsal; a row whose failure is told.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, Slot
from fedlr.client.device import Device
from fedlr.client.settings import Settings
from fedlr.client.trainee import Trainee
from fedlr.flower.messages import Request
from fedlr.flower.records import RecordDict
from fedlr.flower.terms import Terms
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.rehearsal import Rehearsal
from fedlr.training.fused import FusedGradients
from tests.client.blind import EMPTY, FILLED, answer
from tests.client.device_files import (
    LANGUAGE,
    LANGUAGE_PATH,
    PICTURE_PATH,
    PICTURES,
    device_settings,
    enrolled,
    language_terms,
    picture_terms,
)
from tests.client.hostile_server import sane_request

# Of each kind of rows: the device, the layer of its adapter, and its terms.
KINDS: Mapping[str, tuple[Mapping[str, Any], str, Callable[..., Mapping[str, Any]]]] = {
    "conversations": (LANGUAGE, LANGUAGE_PATH, language_terms),
    "pictures": (PICTURES, PICTURE_PATH, picture_terms),
}
MESSAGES: Mapping[str, Mapping[str, Any]] = {
    "lora_B": {},
    "both": {"block": [LORA_A, LORA_B]},
    "a layer that is nowhere": {"block": [("base_model.model.nowhere", LORA_B)]},
    "another width": {"broadcast": torch.ones(15, 2)},
    "huge values": {"broadcast": 1e6 * torch.ones(16, 2)},
    "more layers": {"terms": {"adapter.target_modules": "all-linear"}},
    "longer rows than the model reads": {"terms": {"max_length": 512}},
    "rows of one token": {"terms": {"max_length": 1}},
    "one by one": {"terms": {"trainer.engine": "opacus"}},
}
REFUSED = ("a layer that is nowhere", "another width", "more layers")
MODELS: dict[str, Trainee] = {}


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load the model once for the same terms; every device has its own log and its own rehearsals."""
    original = Trainee.prepare

    def prepare(settings: Settings, terms: Terms, *, features: bool = False, say: Any) -> Trainee:
        if terms.sha256() not in MODELS:
            MODELS[terms.sha256()] = original(settings, terms, features=features, say=say)
        made = MODELS[terms.sha256()]
        return replace(made, settings=settings, rehearsal=Rehearsal(made.rehearsal.share, say))

    monkeypatch.setattr(Trainee, "prepare", prepare)
    yield


def request_of(kind: str, message: Mapping[str, Any]) -> RecordDict:
    """Return the message of a server, whatever kind of rows it is for."""
    _, path, terms = KINDS[kind]
    asked: Request = sane_request(enrolled(path=path), terms({**message.get("terms", {})}))
    block = frozenset(e if isinstance(e, str) else Slot(*e) for e in message.get("block", [LORA_B]))
    broadcast = {**asked.task.broadcast, Slot(path, LORA_B): message.get("broadcast", torch.zeros(16, 2))}
    return replace(asked, task=replace(asked.task, block=block, broadcast=broadcast, round_index=1)).record()


def settings_of(kind: str, folder: Path) -> Settings:
    return device_settings(folder, privacy__epsilon=1e4, **KINDS[kind][0])


def seen_of(kind: str, messages: Mapping[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> set[str]:
    """Compare what is seen of every message with an empty draw and with two rows; return what was answered."""
    seen: list[dict[str, Any]] = []
    for name, draw in (("empty", EMPTY), ("filled", FILLED)):
        patch.setattr(PoissonSampler, "draw", lambda *given, draw=draw: draw(*given))
        seen.append({})
        for number, (message, what) in enumerate(messages.items()):  # each on a device that was asked nothing before
            settings = settings_of(kind, folder / f"{name} {number}")
            device = Device(settings, say=lambda line: None)
            seen[-1][message] = answer(device, request_of(kind, what), settings)
            device.close()
    differ = [message for message in messages if seen[0][message] != seen[1][message]]
    assert not differ, f"the answer tells whether a row was drawn: {differ}"
    return {message for message in messages if len(seen[0][message]) > 1 and seen[0][message][1]}


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_tells_whether_a_row_was_drawn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = seen_of(kind, MESSAGES, tmp_path, monkeypatch)
    assert {"lora_B", "both", "one by one"} <= answered and not answered & set(REFUSED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_tries_nothing_before_the_charge_is_seen(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedPool, "_rehearse", lambda *_: None)
    failing = {"now": MESSAGES["lora_B"]}
    with pytest.raises(AssertionError):
        failing_rows(kind, failing, tmp_path, monkeypatch, [], always=True)


def failing_rows(
    kind: str,
    messages: Mapping[str, Any],
    folder: Path,
    patch: pytest.MonkeyPatch,
    log: list[str],
    *,
    always: bool = False,
) -> None:
    """No drawn row can be computed; the answer says nothing of it. With `always` no constant row can be, either."""
    original, seen, active = FusedGradients.clipped_sums, [], {"now": always}

    def fails(self: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if active["now"]:
            raise MemoryError
        return original(self, inputs, *given, **named)

    patch.setattr(FusedGradients, "clipped_sums", fails)
    for name, draw in (("empty", EMPTY), ("filled", FILLED)):

        def drawn(*given: Any, draw: Any = draw) -> Any:
            active["now"] = always or given[0].sample_rate < 1.0
            return draw(*given)

        patch.setattr(PoissonSampler, "draw", drawn)
        settings = settings_of(kind, folder / name)
        device = Device(settings, say=log.append)
        seen += [answer(device, request_of(kind, message), settings) for message in messages.values()]
        device.close()
        active["now"] = always
    assert seen[0] == seen[1], "the answer tells that a row failed"
    assert not always or seen[0][0]["refused"], "what no row can be computed of is answered, and charged"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_cannot_be_computed_counts_as_zero(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    failing_rows(kind, {"now": MESSAGES["lora_B"]}, tmp_path, monkeypatch, log)
    assert sum("counts as zero" in line for line in log) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_tells_of_a_row_that_failed_is_found_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tells(self: Rehearsal, error: Exception, num_rows: int) -> None:
        raise error

    monkeypatch.setattr(Rehearsal, "failed", tells)
    with pytest.raises(AssertionError):
        failing_rows(kind, {"now": MESSAGES["lora_B"]}, tmp_path, monkeypatch, [])
