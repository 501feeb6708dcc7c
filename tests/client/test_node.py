"""A device's process outlives whatever its server, the network or a power cut does.

Mutants these tests reject: a loop that asks a server which refuses again at once; a process that ends with a message
that cannot be put together, or whose `node_id` was cut off while it was written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flwr.supercore.run import RunNotRunningException

from fedlr.client.device import Device
from fedlr.client.node import Connection, Outage, last_node_id, step


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


@pytest.mark.parametrize(("text", "node_id"), [("", None), ("12\x00", None), ("1234", 1234)])
def test_a_node_id_that_was_cut_off_is_none(text: str, node_id: int | None, tmp_path: Path) -> None:
    (tmp_path / "node_id").write_text(text)
    assert last_node_id(tmp_path / "node_id") == node_id
    assert last_node_id(tmp_path / "nothing") is None
