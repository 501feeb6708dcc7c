"""What the view reads: files that grow, are cut back, rot or are not there yet; and the limits it keeps.

Mutants this file kills: half a line sent, or a long one lost; a file that is cut back or replaced unnoticed; every
round again after that; a round without its clients, with those of others, with their first answers, or one that waits
for ever; an exported adapter that may be half a file; a checkpoint's adapter that is not its manifest's; a bucket
that fills over; a short or readable token; plain text on any address; a protocol that its code does not know.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.runs.directory import append_lines
from fedlr.runs.verified_folder import write_sealed
from fedlr.server.view import operator_pb2
from fedlr.server.view.access import read_token, server_credentials
from fedlr.server.view.adapter_files import find_adapter, open_adapter
from fedlr.server.view.limits import Limits, RequestRate, address_of
from fedlr.server.view.operator_pb2 import LAYOUT_CHECKPOINT, LAYOUT_PEFT, LAYOUT_RELEASED
from fedlr.server.view.refusals import NotThere, Unreadable
from fedlr.server.view.round_feed import SETTLE_S, RoundFeed
from fedlr.server.view.whole_lines import BLOCK_BYTES, WholeLines, last_whole_line
from tests.server.view_on_loopback import SECRET, RunWriter, new_certificates, token_file


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    (tmp_path / "run").mkdir()
    return RunWriter(tmp_path / "run")


def all_of(take: Callable[[], bytes | None]) -> list[bytes]:
    return list(iter(take, None))


@pytest.mark.parametrize("cut", range(12))
def test_half_a_line_is_never_read(cut: int, tmp_path: Path) -> None:
    path, text = tmp_path / "lines", b"one\ntwo\nsix\n"
    lines = WholeLines(path)
    assert lines.take() is None and last_whole_line(path) is None
    path.write_bytes(text[:cut])
    first = all_of(lines.take)
    assert last_whole_line(path) == (first[-1] if first else None)
    path.open("ab").write(text[cut:])
    assert first + all_of(lines.take) == [b"one", b"two", b"six"] and not lines.has_changed()


def test_lines_longer_than_a_block_are_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "lines", [b"a" * (3 * BLOCK_BYTES), b"", b"b" * BLOCK_BYTES, b"c"]
    path.write_bytes(b"\n".join(texts[:3]) + b"\n")
    assert last_whole_line(path) == texts[2]
    path.write_bytes(b"\n".join(texts) + b"\n" + b"half" * BLOCK_BYTES)
    assert all_of(WholeLines(path).take) == texts and last_whole_line(path) == b"c"


@pytest.mark.parametrize("as_new_file", [False, True])
def test_a_round_that_was_written_again_comes_again_and_no_other(as_new_file: bool, run: RunWriter) -> None:
    feed = RoundFeed(run.path)
    for number in range(3):
        run.round(number)
    metrics = run.path / "metrics.jsonl"
    metrics.open("a").write('{"rounds_comp')  # killed here
    assert [event.rounds_completed for event in feed.read(10)] == [0, 1, 2]
    kept = "".join(metrics.read_text().splitlines(keepends=True)[:2])
    if as_new_file:
        metrics.rename(metrics.with_name("old"))
    metrics.write_text(kept)
    run.metrics(2, accuracy=0.9)
    run.round(3)
    assert [(event.rounds_completed, event.accuracy) for event in feed.read(10)] == [(2, 0.9), (3, 0.3)]


def test_a_round_waits_for_its_clients_and_not_for_ever(run: RunWriter) -> None:
    now = 0.0
    feed = RoundFeed(run.path, from_round=1, clock=lambda: now)
    run.metrics(1)
    assert feed.read(10) == []
    run.clients(1)
    assert [len(event.cohort) for event in feed.read(10)] == [2]
    run.metrics(2)  # its clients never come
    assert feed.read(10) == []
    now += SETTLE_S
    assert [len(event.cohort) for event in feed.read(10)] == [0]
    late = {"round_index": 1, "client_id": 5, "status": "trained", "reason": None, "epsilon": 0.5}
    append_lines(run.path / "clients.jsonl", [late])
    run.round(3)
    assert [[client.client_id for client in event.cohort] for event in feed.read(10)] == [[3, 8]]
    run.metrics(4)
    assert feed.read(10) == [] and len(feed.read(10, ended=True)) == 1


def test_of_a_round_that_was_asked_twice_the_last_answers_count(run: RunWriter) -> None:
    run.clients(1, client_3="already_reserved")
    run.clients(1)
    run.metrics(1)
    [event] = RoundFeed(run.path).read(10)
    assert [(client.client_id, client.status) for client in event.cohort] == [(3, "trained"), (8, "trained")]


def test_rounds_come_in_turns_with_their_own_clients(run: RunWriter) -> None:
    for number in range(40):
        run.clients(number + 1, client_8=f"reason_{number + 1}")
    for number in range(41):
        run.metrics(number)
    feed = RoundFeed(run.path, from_round=2)
    found = [event for turn in iter(lambda: feed.read(7), []) for event in turn]
    assert [event.rounds_completed for event in found] == list(range(2, 41))
    assert all(event.cohort[1].reason == f"reason_{event.rounds_completed}" for event in found)


def stored(run: RunWriter, name: str, content: bytes) -> bytes:
    path = run.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def fetched(run: RunWriter, rounds_completed: int | None) -> tuple[int, int, bytes]:
    header, file = open_adapter(run.path, rounds_completed)
    with file:
        content = file.read()
    assert header.size_bytes == len(content) and header.sha256 == hashlib.sha256(content).hexdigest()
    return header.rounds_completed, header.layout, content


def test_an_adapter_is_found_wherever_the_run_keeps_it(run: RunWriter) -> None:
    first = stored(run, "adapters/round-00001.safetensors", b"first")
    stored(run, "adapters/.round-00009.safetensors.partial", b"half")
    write_sealed(run.path / "checkpoints" / "round-00002", {"adapter": {Slot("a", "lora_A"): torch.ones(2)}}, {})
    second = (run.path / "checkpoints" / "round-00002" / "adapter.safetensors").read_bytes()
    assert fetched(run, 1) == (1, LAYOUT_RELEASED, first)
    assert fetched(run, 2) == fetched(run, None) == (2, LAYOUT_CHECKPOINT, second)
    last = stored(run, "adapter/adapter_model.safetensors", b"last")
    run.metrics(3)
    assert fetched(run, None)[0] == 2  # may still be half a file
    run.end()
    assert fetched(run, None) == fetched(run, 3) == (3, LAYOUT_PEFT, last)
    released = stored(run, "adapters/round-00003.safetensors", b"released")
    assert fetched(run, None)[2] == last and fetched(run, 3) == (3, LAYOUT_RELEASED, released)


def test_a_missing_adapter_says_which_there_are(run: RunWriter) -> None:
    with pytest.raises(NotThere, match="no adapter: the run has none yet"):
        find_adapter(run.path, None)
    for number in (0, 1, 2, 5):
        stored(run, f"adapters/round-{number:05d}.safetensors", b"")
    with pytest.raises(NotThere, match="no adapter of round 4: the run has those of rounds 0-2, 5"):
        find_adapter(run.path, 4)


def test_a_rotten_checkpoint_is_not_given_away(run: RunWriter) -> None:
    folder = run.path / "checkpoints" / "round-00002"
    write_sealed(folder, {"adapter": {Slot("a", "lora_A"): torch.ones(2)}}, {})
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="round 2 is not the one of its manifest"):
        open_adapter(run.path, 2)
    (folder / "manifest.json").unlink()
    with pytest.raises(Unreadable, match="manifest"):
        open_adapter(run.path, 2)


def test_a_bucket_gives_a_burst_then_its_rate_to_each_address() -> None:
    now = 0.0
    rate = RequestRate(Limits(requests_per_s=2.0, burst=3), clock=lambda: now)
    assert [rate.allows("a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert rate.allows("b")
    assert [address_of(peer) for peer in ("ipv4:10.0.0.7:1", "ipv4:10.0.0.7:2", "ipv6:%5B::8%5D:1")] == [
        *("10.0.0.7", "10.0.0.7", "::8")
    ]
    now = 0.5
    assert [rate.allows("a") for _ in range(2)] == [True, False]
    now = 1000.0
    assert [rate.allows("a") for _ in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("secret", "mode", "message"),
    [
        (SECRET, 0o640, "got mode 0640; chmod 600"),
        (SECRET, 0o604, "got mode 0604; chmod 600"),
        (SECRET[:31], 0o600, r"32 or more characters in .*\[31\]"),
        (SECRET + " " + SECRET, 0o600, "one word"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 40, 0o600, "plain letters"),
    ],
)
def test_a_token_file_that_gives_no_secret_is_refused(secret: str, mode: int, message: str, tmp_path: Path) -> None:
    path = token_file(tmp_path)
    path.write_text(secret, encoding="utf-8")
    path.chmod(mode)
    with pytest.raises(InputError, match=message) as error:
        read_token(path)
    assert secret not in str(error.value)


def test_only_loopback_may_be_plain_text(tmp_path: Path) -> None:
    certificate, key = new_certificates(tmp_path).pair
    assert server_credentials("::1", None, None) is None
    for host in ("0.0.0.0", "::", "10.1.2.3", "fl.example.org", ""):
        with pytest.raises(InputError, match="not loopback"):
            server_credentials(host, None, None)
        assert server_credentials(host, certificate, key) is not None
    with pytest.raises(InputError, match="together"):
        server_credentials("127.0.0.1", certificate, None)
    with pytest.raises(InputError, match="KEY_VALUES_MISMATCH"):
        server_credentials("127.0.0.1", certificate, tmp_path / "superlink.key")
    key.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        server_credentials("127.0.0.1", certificate, key)


def test_the_generated_code_is_that_of_the_protocol() -> None:
    text = re.sub(r"//.*", "", Path(operator_pb2.__file__).with_name("operator.proto").read_text(encoding="utf-8"))
    field = r"(optional |repeated )?(\w+) (\w+) = (\d+);"
    messages = re.findall(r"message (\w+) {((?:[^{}]|{[^{}]*})*)}", text)
    generated = operator_pb2.DESCRIPTOR.message_types_by_name
    assert {name: sorted(re.findall(field, body)) for name, body in messages} == {
        name: sorted(declared(one) for one in message.fields) for name, message in generated.items()
    }
    calls = re.findall(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)", text)
    assert calls == [
        (one.name, one.input_type.name, "stream " * one.server_streaming, one.output_type.name)
        for one in operator_pb2.DESCRIPTOR.services_by_name["OperatorView"].methods
    ]
    assert re.findall(r"(LAYOUT_\w+) = (\d)", text) == [(n, str(v)) for n, v in operator_pb2.Layout.items()]


def declared(field: FieldDescriptor) -> tuple[str, str, str, str]:
    """Label, type, name and number of a field, as the protocol writes them."""
    scalars = {1: "double", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 12: "bytes"}
    kind = field.message_type or field.enum_type
    is_optional = field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"
    label = "repeated " if field.is_repeated else "optional " if is_optional else ""
    return label, kind.name if kind else scalars[field.type], field.name, str(field.number)
