"""The operator's view over real gRPC on loopback: what it shows, to whom, and what it withholds.

Mutants this file kills: a gate that does not ask for the token, asks in streams only, or waits for a request before
it refuses; a token compared by its beginning, or sent twice; no rate, or one bucket for all that is never empty;
streams without a limit, or never given back; a caller that may stall; the text of an exception in an answer; a stream
that goes on after the run; health that is said once, or always good; requests of any size.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedlr.server.view.access import Token
from fedlr.server.view.connection import ViewAddress, open_channel
from fedlr.server.view.operator_pb2 import DESCRIPTOR, GetAdapterRequest, Round, StatusRequest, WatchRequest
from tests.server.view_on_loopback import (
    HASTY,
    SECRET,
    Certificates,
    RunWriter,
    asked,
    metrics_line,
    new_certificates,
    refused,
    shown,
)

CALLS = {"Status": StatusRequest(), "Watch": WatchRequest(), "GetAdapter": GetAdapterRequest()}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return new_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    (tmp_path / "run").mkdir()
    return RunWriter(tmp_path / "run")


def test_rounds_are_streamed_as_the_files_grow(run: RunWriter, certificates: Certificates) -> None:
    with shown(run.path, certificates) as address, asked(address) as (view, usual):
        events, ends = followed(view.Watch(WatchRequest(from_round=1), **usual))
        run.configure()
        run.round(0)
        run.round(1)
        first = events.get(timeout=20)
        assert (first.rounds_completed, first.accuracy, first.HasField("loss")) == (1, 0.1, False)
        assert (first.epsilon_max, first.epsilon_median, first.num_trained) == (0.5, 0.25, 2)
        run.clients(2, client_8="budget_exhausted")
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(text := json.dumps(metrics_line(2, 1, None)))
            file.flush()
            time.sleep(0.1)  # many polls
            assert events.empty(), text
            file.write("\n")
        second = events.get(timeout=20)
        asked_clients = [(c.client_id, c.status, c.reason, c.epsilon) for c in second.cohort]
        assert asked_clients == [(3, "trained", "", 0.5), (8, "refused", "budget_exhausted", 0.5)]
        assert not ends.is_set()
        run.end()
        assert ends.wait(20) and events.empty()


def test_status_grows_with_the_run(run: RunWriter, certificates: Certificates) -> None:
    with shown(run.path, certificates) as address, asked(address) as (view, usual):
        empty = view.Status(StatusRequest(), **usual)
        assert (empty.name, empty.rounds_completed, empty.HasField("last_line_unix_s"), empty.ended) == (
            "",
            0,
            False,
            False,
        )
        run.configure(num_rounds=3)
        run.round(0)
        run.round(1)
        status = view.Status(StatusRequest(), **usual)
        assert (status.name, status.method, status.rounds_completed, status.num_rounds) == ("ward", "fedsvd", 1, 3)
        assert (status.epsilon_max, status.ended) == (0.5, False)
        assert abs(status.last_line_unix_s - (run.path / "metrics.jsonl").stat().st_mtime) < 1e-3


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        Token("f" * 64).metadata(),
        Token(SECRET[:-1]).metadata(),
        Token(SECRET + "0").metadata(),
        [("authorization", SECRET)],
        Token(SECRET).metadata() * 2,
    ],
    ids=["missing", "wrong", "shorter", "longer", "bare", "twice"],
)
def test_without_the_token_no_file_is_touched(
    call: str, metadata: object, run: RunWriter, address: ViewAddress, opened: list[str]
) -> None:
    assert refused(address, call, CALLS[call], metadata=metadata) == (
        "UNAUTHENTICATED",
        "the token is missing or wrong",
    )
    assert [path for path in opened if path.startswith(str(run.path))] == []


def test_a_caller_without_the_token_is_refused_before_it_sent_its_request(run: RunWriter) -> None:
    with shown(run.path) as address, open_channel(address) as channel:
        sends_nothing = threading.Event()
        call = channel.stream_unary(f"/{DESCRIPTOR.package}.OperatorView/Status")
        answer = call.future(iter(sends_nothing.wait, True), timeout=20)
        assert answer.code() is grpc.StatusCode.UNAUTHENTICATED
        sends_nothing.set()


def test_a_client_that_does_not_trust_the_authority_is_not_connected(
    run: RunWriter, certificates: Certificates, tmp_path: Path
) -> None:
    other = new_certificates(tmp_path / "other")
    with shown(run.path, certificates) as address:
        code, details = refused(replace(address, ca=other.ca), "Status", StatusRequest())
        assert code == "UNAVAILABLE" and "CERTIFICATE_VERIFY_FAILED" in details
        assert refused(replace(address, ca=None), "Status", StatusRequest())[0] == "UNAVAILABLE"  # plain text


def test_an_address_may_ask_so_often_and_no_more(run: RunWriter) -> None:
    limits = replace(HASTY, requests_per_s=0.001, burst=3)
    with shown(run.path, limits=limits) as address, asked(address) as (view, usual):
        for _ in range(3):
            view.Status(StatusRequest(), **usual)
        assert refused(address, "Status", StatusRequest(), metadata=())[0] == "UNAUTHENTICATED"  # drains no bucket
        assert refused(address, "Status", StatusRequest())[0] == "RESOURCE_EXHAUSTED"


def test_streams_are_few_and_leave_room_for_questions(run: RunWriter) -> None:
    with shown(run.path, limits=replace(HASTY, max_streams=2)) as address, asked(address) as (view, usual):
        run.round(0)
        open_streams = [view.Watch(WatchRequest(), **usual) for _ in range(2)]
        assert [next(stream).rounds_completed for stream in open_streams] == [0, 0]
        assert refused(address, "Watch", WatchRequest())[0] == "RESOURCE_EXHAUSTED"
        assert view.Status(StatusRequest(), **usual).rounds_completed == 0
        open_streams[0].cancel()
        run.end()
        assert eventually(lambda: [e.rounds_completed for e in view.Watch(WatchRequest(), **usual)] == [0])


def test_a_caller_that_does_not_read_is_dropped(run: RunWriter) -> None:
    (run.path / "adapters").mkdir()
    (run.path / "adapters" / "round-00001.safetensors").write_bytes(bytes(32 << 20))
    limits = replace(HASTY, stall_s=0.2, max_streams=1)
    with shown(run.path, limits=limits) as address, asked(address) as (view, usual):
        stalled = view.GetAdapter(GetAdapterRequest(), metadata=address.token.metadata())
        assert next(stalled).header.size_bytes == 32 << 20
        assert eventually(lambda: next(view.GetAdapter(GetAdapterRequest(), **usual)).HasField("header"))
        with pytest.raises(grpc.RpcError) as failure:
            list(stalled)
        assert failure.value.code() is grpc.StatusCode.CANCELLED


def test_large_requests_are_refused(run: RunWriter) -> None:
    with shown(run.path) as address, open_channel(address) as channel:
        raw = channel.unary_unary(f"/{DESCRIPTOR.package}.OperatorView/Status")
        with pytest.raises(grpc.RpcError) as failure:
            raw(bytes(HASTY.max_request_bytes + 1), metadata=address.token.metadata(), timeout=20)
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("file", "text", "call"),
    [
        ("metrics.jsonl", "secret row\n", "Watch"),
        ("metrics.jsonl", '{"rounds_completed": 1, "accuracy": "secret"}\n', "Watch"),
        ("clients.jsonl", "[1]\n", "Watch"),
        ("metrics.jsonl", "secret row\n", "Status"),
        ("config.yaml", "secret: [", "Status"),
        ("config.yaml", "num_rounds: secret", "Status"),
    ],
)
def test_a_broken_file_is_named_and_not_shown(file: str, text: str, call: str, run: RunWriter) -> None:
    run.round(0)
    run.metrics(1)
    (run.path / file).write_text(text)
    with shown(run.path) as address:
        code, details = refused(address, call, CALLS[call])
        assert code == "DATA_LOSS" and file in details
        assert "secret" not in details and str(run.path) not in details


def test_what_nobody_foresaw_is_told_to_the_log_alone(run: RunWriter, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with shown(run.path) as address:
        assert refused(address, "Watch", WatchRequest()) == ("INTERNAL", "the view could not answer; its log says why")
    assert str(run.path) in caplog.text


def test_health_is_that_of_the_run_directory(run: RunWriter, certificates: Certificates) -> None:
    with shown(run.path, certificates) as address, open_channel(address) as channel:
        health = HealthStub(channel)
        usual = {"metadata": address.token.metadata(), "timeout": 20}
        service = HealthCheckRequest(service="fedlr.operator.v1.OperatorView")
        for request in (HealthCheckRequest(), service):
            assert health.Check(request, **usual).status == HealthCheckResponse.SERVING
        changes = health.Watch(service, **usual)
        assert next(changes).status == HealthCheckResponse.SERVING
        run.path.rename(run.path.with_name("gone"))
        assert next(changes).status == HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as failure:
            health.Check(request, timeout=20)
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
def address(run: RunWriter) -> Iterator[ViewAddress]:
    run.round(0)
    with shown(run.path) as address:
        yield address


LISTENING: list[list[str]] = []
sys.addaudithook(lambda event, args: [paths.append(str(args[0])) for paths in LISTENING if event == "open"] and None)


@pytest.fixture
def opened(address: ViewAddress) -> Iterator[list[str]]:
    """Paths of the files that this process opens since the view is there."""
    LISTENING.append([])
    yield LISTENING[0]
    LISTENING.clear()


def eventually(holds: Callable[[], bool]) -> bool:
    """Say whether something holds within 20 seconds; a refused call is a no."""
    for _ in range(2000):
        try:
            if holds():
                return True
        except grpc.RpcError:
            pass
        time.sleep(0.01)
    return False


def followed(stream: Iterator[Round]) -> tuple["queue.Queue[Round]", threading.Event]:
    """Read a stream in a thread; return where its messages come out, and what is set at its end."""
    events: queue.Queue[Round] = queue.Queue()
    ends = threading.Event()

    def read() -> None:
        for event in stream:
            events.put(event)
        ends.set()

    threading.Thread(target=read, daemon=True).start()
    return events, ends
