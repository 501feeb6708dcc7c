"""A device's one process: it asks the server for messages, answers them, and keeps the base model loaded.

It speaks Flower's Fleet interface itself. There is no second process that starts a third for every message, no port is
opened, and no code is ever fetched: what runs is what is installed here. The calls below Flower's public ones are
pinned by tests/server/test_live_federation.py and tests/server/test_gate_live.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response

from fedlr.client.connection_errors import (
    causes_of,
    check_connection,
    diagnose,
    is_shut_out,
    load_root_certificates,
    refusal_now,
)
from fedlr.client.device import Device
from fedlr.client.settings import Settings
from fedlr.errors import InputError, ShutOutError
from fedlr.files import write_whole
from fedlr.flower.node_key import load_node_key

NODE_ID = "node_id"  # in the state folder: by it a session that a killed process left behind is ended
# How long to wait between two questions to the server: short while an experiment goes on, long when nothing does.
BUSY_POLL_S, IDLE_POLL_S, BUSY_FOR_S = 0.3, 3.0, 120.0
SHUT_OUT = "The server shut this device out: its key was revoked; ask the operator, and make a new key"
FAILED = Error(code=2, reason="device_error")  # all that a server learns of what no reply could say


@dataclass(frozen=True)
class Connection:
    """Flower's callbacks of one registered node."""

    node_id: int
    receive: Callable[[], Any]
    send: Callable[..., Any]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


@contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    """Connect as this device's key; heartbeats are sent meanwhile.

    Raises:
        InputError: the server cannot be reached, or does not let this device in; the text says what to fix.
    """
    key = load_node_key(settings.server.private_key)
    certificates = load_root_certificates(settings.server.root_certificates)
    remembered = settings.state_dir / NODE_ID
    last = last_node_id(remembered)
    found_id = check_connection(settings.server.address, certificates, key, last_node_id=last)
    write_whole(remembered, str(found_id))
    with http_request_response(settings.server.address, False, certificates, (key, key.public_key())) as found:
        node_id, receive, send, _, _, pull_object, push_object, confirm = found
        yield Connection(node_id, receive, send, pull_object, push_object, confirm)


def last_node_id(path: Path) -> int | None:
    """Return the node that this device was last; None where nobody knows, or the file is not whole."""
    try:
        text = path.read_text(encoding="ascii")
        return int(text) if text.isdecimal() else None
    except (OSError, ValueError):  # none yet, or damaged: of no letters, or of thousands of digits
        return None


@dataclass
class Outage:
    """Since when the server has not been reached: said once when it begins, and once when it is over."""

    say: Callable[[str], None]
    began: float | None = None

    def lost(self, error: Exception) -> None:
        """Take in that a call failed."""
        if self.began is None:
            self.began = time.monotonic()
            self.say(f"the server cannot be reached ({type(error).__name__}); trying again until it can")

    def over(self) -> None:
        """Take in that a call was answered."""
        if self.began is not None:
            self.say(f"the server is reached again after {time.monotonic() - self.began:.0f} s")
            self.began = None


def serve(settings: Settings, device: Device, *, say: Callable[[str], None]) -> None:
    """Answer messages for ever.

    Raises:
        ShutOutError: the server let this device in, and does not any more.
        InputError: it refuses this device's signature, as its clock is off.
    """
    ended: BaseException | None = None
    with connected(settings) as connection:
        say(f"connected to {settings.server.address} as node {connection.node_id}")
        try:
            _answer_for_ever(connection, device, say=say)
        except BaseException as error:  # raised once the connection is closed: Flower's own end passes over exceptions
            ended = error
    if isinstance(ended, KeyboardInterrupt):
        _require_admission(ended, settings, connection.node_id)
    if ended is not None:
        raise ended


def _answer_for_ever(connection: Connection, device: Device, *, say: Callable[[str], None]) -> None:
    last, outage = time.monotonic(), Outage(say)
    while True:
        if step(connection, device, say=say, outage=outage):
            last = time.monotonic()
        else:
            time.sleep(BUSY_POLL_S if time.monotonic() - last < BUSY_FOR_S else IDLE_POLL_S)


def _require_admission(interrupt: KeyboardInterrupt, settings: Settings, node_id: int) -> None:
    """Tell a person's interrupt from Flower's, which ends the process by one where a server refuses its signature."""
    causes = (cause for cause in causes_of(interrupt) if isinstance(cause, httpx.HTTPStatusError))
    error = next((one for one in causes if one.response.status_code == httpx.codes.UNAUTHORIZED), None)
    if error is None:  # by the thread that says that this device is there, or by a person
        certificates = load_root_certificates(settings.server.root_certificates)
        key = load_node_key(settings.server.private_key)
        error = refusal_now(settings.server.address, certificates, key, node_id=node_id)
    if error is None:
        return
    if is_shut_out(error):
        raise ShutOutError(SHUT_OUT) from error
    raise InputError(diagnose(error, server=settings.server.address)) from error


def step(connection: Connection, device: Device, *, say: Callable[[str], None], outage: Outage) -> bool:
    """Take one message and answer it; return whether one was answered."""
    try:
        received = connection.receive()
        outage.over()
        if received is None:
            return False
        announced, tree = received
        message = fetch(connection, announced, tree)
        TaskIdentity.run_id, TaskIdentity.node_id = message.metadata.run_id, connection.node_id
        TaskIdentity.task_id = 0
        deliver(connection, answer(device, message, say=say))
        return True
    except RunNotRunningException:
        say("the run is over at the server; what was released stays on disk and is sent when it is asked again")
    except httpx.HTTPError as error:
        if is_shut_out(error):
            raise ShutOutError(SHUT_OUT) from error
        outage.lost(error)
    except Exception as error:  # a message that cannot be put together
        say(f"a message could not be taken: {type(error).__name__}: {error}")
    return False  # whoever refuses, or sends what is no message, is not asked again at once


def answer(device: Device, message: Message, *, say: Callable[[str], None]) -> Message:
    """Return the reply to a message, whatever it holds."""
    try:
        return Message(device.answer(message.content), reply_to=message)
    except InputError as error:
        say(f"a message that is no request was refused: {error}")
    except Exception as error:  # nothing a server sends may stop a device, and nothing of it is told
        say(f"a message failed: {type(error).__name__}: {error}")
    return Message(FAILED, reply_to=message)


def fetch(connection: Connection, announced: Message, tree: Any) -> Message:
    """Pull the objects of a message and put it together."""
    run_id = announced.metadata.run_id
    wanted = [part.object_id for part in iterate_object_tree(tree)]
    contents = pull_objects(wanted, pull_object_fn=lambda object_id: connection.pull_object(run_id, object_id))
    message = inflate_object_from_contents(tree.object_id, contents)
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = tree.object_id
    connection.confirm(run_id, tree.object_id)
    return message


def deliver(connection: Connection, reply: Message) -> None:
    """Push a reply and its objects. How long it took to make depends on the data, and is not told."""
    run_id = reply.metadata.run_id
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        objects = get_all_nested_objects(reply)
        wanted, session = connection.send(remove_content_from_message(reply), tree, 0.0)
        push_object_contents_from_iterable(
            ((name, objects[name].deflate()) for name in sorted(wanted & objects.keys())),
            lambda name, content: connection.push_object(run_id, session, name, content),
        )
