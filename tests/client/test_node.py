"""A device's process outlives whatever its server, the network or a power cut does.

Mutants these tests reject: a loop that asks a server which refuses again at once; a process that ends with a message
that cannot be put together, or whose `node_id` was cut off while it was written; an end without a word where the
server refuses its signature.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.run import RunNotRunningException

import fedlr.client.node
from fedlr.client.device import Device
from fedlr.client.node import Connection, Outage, last_node_id, serve, step
from fedlr.errors import InputError, ShutOutError
from tests.client.device_files import device_settings


def connection(receive: Callable[[], Any]) -> Connection:
    def unused(*args: Any) -> Any:
        raise AssertionError

    return Connection(1, receive, unused, unused, unused, unused)


def refused() -> None:
    request = httpx.Request("POST", "https://127.0.0.1:1")
    httpx.Response(429, request=request).raise_for_status()


def over() -> None:
    raise RunNotRunningException


def no_message() -> Any:
    return object(), object()


@pytest.mark.parametrize("receive", [refused, over, no_message])
def test_what_goes_wrong_with_a_message_is_said_and_then_the_device_waits(receive: Callable[[], Any]) -> None:
    said: list[str] = []
    assert not step(connection(receive), cast(Device, None), say=said.append, outage=Outage(said.append))
    assert len(said) == 1


def test_an_outage_is_said_when_it_begins_and_when_it_is_over() -> None:
    said: list[str] = []
    outage = Outage(said.append)
    for receive in (lambda: None, refused, refused, refused, lambda: None, lambda: None):
        assert not step(connection(receive), cast(Device, None), say=said.append, outage=outage)
    assert [line.partition(" again")[0] for line in said] == [
        "the server cannot be reached (HTTPStatusError); trying",
        "the server is reached",
    ]


@pytest.mark.parametrize(
    ("text", "node_id"), [("", None), ("12\x00", None), ("1234", 1234), ("9" * 5000, None), ("é", None)]
)
def test_a_node_id_that_was_cut_off_is_none(text: str, node_id: int | None, tmp_path: Path) -> None:
    (tmp_path / "node_id").write_text(text)
    assert last_node_id(tmp_path / "node_id") == node_id
    assert last_node_id(tmp_path / "nothing") is None


def unauthorised(date: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://x", headers={TIMESTAMP_HEADER: "2026-11-30T06:00:00+00:00"})
    response = httpx.Response(401, request=request, headers={"date": date})
    return httpx.HTTPStatusError("", request=request, response=response)


def unavailable() -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://x")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(503, request=request))


NOW, LATER = "Mon, 30 Nov 2026 06:00:01 GMT", "Mon, 30 Nov 2026 09:00:00 GMT"


@pytest.mark.parametrize("is_heartbeat", [False, True])
@pytest.mark.parametrize(("date", "ends"), [(NOW, ShutOutError), (LATER, InputError), (None, KeyboardInterrupt)])
def test_an_interrupt_by_flower_is_told_from_one_by_a_person(
    date: str | None, ends: type[BaseException], is_heartbeat: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a server refuses a signature Flower sends this process SIGINT, and its connection hides exceptions."""

    def receive() -> Any:
        if is_heartbeat:
            raise KeyboardInterrupt
        try:  # a proxy's 503 is what a person may interrupt the wait for
            raise unavailable() if date is None else unauthorised(date)
        except httpx.HTTPStatusError:
            raise KeyboardInterrupt  # noqa: B904 - as a signal does

    @contextmanager
    def connected(_: object) -> Iterator[Connection]:
        with suppress(Exception):  # as Flower's own does
            yield connection(receive)

    settings = device_settings(tmp_path / "device")
    for name, found in (("connected", connected), ("load_root_certificates", lambda path: b"")):
        monkeypatch.setattr(fedlr.client.node, name, found)
    monkeypatch.setattr(fedlr.client.node, "load_node_key", lambda path: None)
    asked = None if date is None else unauthorised(date)
    monkeypatch.setattr(fedlr.client.node, "refusal_now", lambda *args, **options: asked)
    with pytest.raises(ends) as ended:
        serve(settings, cast(Device, None), say=lambda line: None)
    assert type(ended.value) is ends
