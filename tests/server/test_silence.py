"""A device is silent: no word of what goes wrong in it leaves it, and no size of what it sends tells of its data.

Mutant, which is found out: a device that sends the text of its error.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

import fedlr.client.app
import fedlr.client.device
import fedlr.client.node
from fedlr.adapters.state import LORA_B
from fedlr.client.device import Device
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, ReplyFacts, Request
from fedlr.flower.records import ARRAYS, FACTS, LAYOUT, RecordDict
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.server.pool import GridPool
from fedlr.tasks.synthetic import synthetic_text
from tests.client.device_files import device_settings, enrolled
from tests.server.direct_grid import DirectGrid, reply_to, through_bytes
from tests.server.malformed import CANARY
from tests.server.small_federation import TERMS
from tests.training.small_models import mutant


def device_of(folder: Path, *, num_rows: int = 40, said: list[str] | None = None) -> Device:
    """Return a device whose rows, folder and file names hold the canary."""
    settings = device_settings(folder)
    data, path = synthetic_text(num_rows, seed=1), folder / f"{CANARY}.csv"
    rows = [(f"{CANARY} {text}", data.label_names[label]) for text, label in zip(data.texts, data.labels, strict=True)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    section = settings.data.model_copy(update={"path": str(path)})
    settings = settings.model_copy(update={"data": section, "name": CANARY})
    return Device(settings, say=[].append if said is None else said.append)


def request_to(client: int = 0) -> RecordDict:
    shared = enrolled()
    task = RoundRequest(0, dict(shared.tensors), frozenset({LORA_B}))
    return through_bytes(Request(TERMS, client, task, shared.fingerprint(), shared.scale, shared).record())


def every_byte(record: RecordDict | Message) -> bytes:
    """Return all that Flower sends: the objects, each with the names of those below it."""
    return b"".join(part.deflate() for part in get_all_nested_objects(record).values())


def fails(error: BaseException) -> Callable[..., Any]:
    def instead(*values: object, **named: object) -> Any:
        raise error

    return instead


WHERE_IT_FAILS = {
    "the model": (fedlr.client.device.Trainee, "prepare"),
    "the data": (fedlr.client.device.Trainee, "pool"),
    "a step": (FusedPool, "train"),
    "the ledger": (PrivacyLedger, "reserve"),
    "the disk": (fedlr.client.device.Replies, "write"),
    "the policy": (fedlr.client.device, "check_terms"),
}


class Panic(BaseException):
    """Stands for what a library in Rust raises, which is no Exception."""


WITH_WORDS = [
    Panic(CANARY),
    RuntimeError(CANARY),
    InputError(CANARY),
    OSError(28, "No space left", f"/home/{CANARY}"),
    KeyError(CANARY),
]


@pytest.mark.parametrize("where", WHERE_IT_FAILS)
def test_no_word_of_what_goes_wrong_on_a_device_leaves_it(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = list[str]()
    for number, error in enumerate(WITH_WORDS):
        device = device_of(tmp_path / f"{CANARY}-{number}", said=said)
        monkeypatch.setattr(*WHERE_IT_FAILS[where], fails(error))
        sent = device.answer(request_to())
        assert CANARY.encode() not in every_byte(sent)
        assert (
            Reply.read(sent).facts.refused in ("device_error", "policy", "model", "data")
            and not Reply.read(sent).tensors
        )
        shared = enrolled()
        grid = DirectGrid({0: lambda record, sent=sent: sent})
        pool = GridPool(grid, grid, terms=TERMS, enrolled=shared, deadline_s=60, quorum=1, poll_s=0.01, say=print)
        task = RoundRequest(0, dict(shared.tensors), frozenset({LORA_B}))
        (dropout,) = pool.train(task, [0])
        assert isinstance(dropout, Dropout) and dropout.status == "refused"
    assert sum(CANARY in line for line in said) == len(WITH_WORDS)  # the device's own log says it
    heard = capfd.readouterr()
    assert CANARY not in heard.out + heard.err + caplog.text


def test_a_device_that_tells_its_error_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = mutant(
        fedlr.client.device,
        ('reply = self._refusal(request, "device_error")', "return RecordDict({str(error): ConfigRecord()})"),
    )
    told.__dict__["ConfigRecord"] = ConfigRecord
    device = told.Device(device_settings(tmp_path), say=print)
    monkeypatch.setattr(fedlr.client.device.Trainee, "prepare", fails(RuntimeError(CANARY)))
    assert CANARY.encode() in every_byte(device.answer(request_to()))


def test_what_is_no_request_is_answered_without_a_word_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 100, 1
    asked = reply_to("m1", 1, content=RecordDict({CANARY: ConfigRecord({CANARY: CANARY})}))
    said = list[str]()
    sent = fedlr.client.node.answer(device_of(tmp_path / "device"), asked, say=said.append)
    assert sent.has_error() and CANARY.encode() not in every_byte(sent) and len(said) == 1


def test_a_stock_supernode_sends_no_word_of_a_device_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 100, 1
    asked = reply_to("m1", 1, content=request_to())
    monkeypatch.setenv("FEDLR_CLIENT", str(tmp_path / f"{CANARY}.yaml"))  # is not there
    context = Context(run_id=1, node_id=100, node_config={}, state=RecordDict(), run_config={})
    sent = fedlr.client.app.train(asked, context)
    assert sent.has_error() and CANARY.encode() not in every_byte(sent)


def test_an_answer_is_as_long_for_fifty_rows_as_for_five_thousand(tmp_path: Path) -> None:
    sent = [device_of(tmp_path / str(n), num_rows=n).answer(request_to()) for n in (50, 5000)]
    replies = [Reply.read(record) for record in sent]
    assert all(reply.facts.refused is None and reply.tensors for reply in replies)
    parts = [[len(part.deflate()) for part in get_all_nested_objects(record).values()] for record in sent]
    assert parts[0] == parts[1]
    texts = [record.config_records[LAYOUT][LAYOUT] for record in sent]
    assert texts[0] == texts[1] and [set(record) for record in sent] == [{ARRAYS, LAYOUT, FACTS}] * 2
    facts = [reply.facts.model_dump() for reply in replies]
    assert facts[0].keys() == facts[1].keys() == set(ReplyFacts.model_fields)
    assert {key for key in facts[0] if facts[0][key] != facts[1][key]} <= {
        "ledger_head",
        "signature",
    }  # of its own ledger and key
