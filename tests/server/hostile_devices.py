"""Devices of one process that answer what they are told to, over Flower's real connection, hostile and honest ones.

    python -m tests.server.hostile_devices FOLDER

FOLDER/plan.json: {"address": ..., "devices": [["honest", ...], ["nan", ...]]}: one list of classes a device, an entry a
request; device K has FOLDER/device-K.key. A class is one of tests/server/malformed.py, or one of `OBJECTS` below, which
go beneath Flower's records: the objects that a SuperLink stores, hashes and passes on.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import metadata_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree

import fedlr.client.node
from fedlr.client.device import Device
from fedlr.client.node import Connection, Outage, connected, step
from fedlr.client.settings import Settings
from fedlr.flower.records import RecordDict
from tests.server.malformed import CANARY, CLASSES, Honest

HONEST, SILENT = "honest", "silent"


class Part:
    """One of Flower's objects as the bytes that are sent: TYPE CHILDREN LENGTH, a zero, the body."""

    def __init__(self, kind: str, children: Sequence["Part"], body: bytes, *, length: int | None = None) -> None:
        names = ",".join(dict.fromkeys(child.name for child in children))
        self.content = f"{kind} {names} {len(body) if length is None else length}".encode() + b"\0" + body
        self.children = list({child.name: child for child in children}.values())

    @property
    def name(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def tree(self) -> ObjectTree:
        return ObjectTree(object_id=self.name, children=[child.tree() for child in self.children])

    def all(self) -> Iterator["Part"]:
        for child in self.children:
            yield from child.all()
        yield self


def message_of(reply: Message, content: Sequence[Part], **metadata: Any) -> Part:
    """Return a message with these parts as its content, and other metadata inside than outside."""
    inside = metadata_to_proto(reply.metadata)
    inside.message_id = ""
    for key, value in metadata.items():
        setattr(inside, key, value)
    return Part("Message", content, MessageProto(metadata=inside).SerializeToString(deterministic=True))


def records(arrays: Part) -> Part:
    return Part("RecordDict", [arrays], json.dumps({"arrays": arrays.name}).encode())


def array(chunks: Sequence[Part], **changes: Any) -> Part:
    about = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": [0], **changes}
    inner = Part("Array", chunks, json.dumps(about).encode())
    return records(Part("ArrayRecord", [inner], json.dumps({"float32": inner.name}).encode()))


CHUNK = Part("ArrayChunk", [], b"\x93NUMPY" + bytes(100_000))
# Beneath the records: each makes the message that is uploaded instead of a reply.
OBJECTS: dict[str, Callable[[Message], Part]] = {
    "records that are no JSON": lambda reply: message_of(reply, [Part("RecordDict", [], CANARY.encode())]),
    "records that are a number": lambda reply: message_of(reply, [Part("RecordDict", [], b"7")]),
    "a record that is no protobuf": lambda reply: message_of(
        reply, [records(Part("ConfigRecord", [], b"\xff" * 9 + CANARY.encode()))]
    ),
    "an array of no shape": lambda reply: message_of(reply, [array([CHUNK], shape=[CANARY])]),
    "an array of no chunks": lambda reply: message_of(reply, [array([], arraychunk_ids=[3])]),
    "an array of one chunk a hundred thousand times": lambda reply: message_of(
        reply, [array([CHUNK], arraychunk_ids=[0] * 100_000)]
    ),
    "content that is a record": lambda reply: message_of(reply, [Part("ConfigRecord", [], b"")]),
    "content that is a message": lambda reply: message_of(reply, [message_of(reply, [])]),
    "no content": lambda reply: message_of(reply, []),
    "two contents": lambda reply: message_of(reply, [Part("RecordDict", [], b"{}"), Part("RecordDict", [], b" {}")]),
    "a message that is none": lambda reply: Part("RecordDict", [], b"{}"),
}


def upload(connection: Connection, reply: Message, root: Part, *, only: int | None = None) -> None:
    """Upload a message of our own making; `only` so many of its parts."""
    reply.metadata.__dict__["_message_id"] = root.name
    wanted, session = connection.send(remove_content_from_message(reply), root.tree(), 0.0)
    parts = {part.name: part.content for part in root.all() if part.name in wanted}
    for name, content in list(parts.items())[:only]:
        connection.push_object(reply.metadata.run_id, session, name, content)


class Puppet:
    """A device that answers each request as the next entry of its list says."""

    def __init__(self, number: int, kinds: Sequence[str], connection: Connection) -> None:
        self.number, self.kinds, self.connection, self.num_asked = number, kinds, connection, 0

    @property
    def kind(self) -> str:
        return self.kinds[min(self.num_asked, len(self.kinds) - 1)]

    def answer(self, record: RecordDict) -> RecordDict:
        honest = Honest.to(record)
        if self.kind in CLASSES:
            return CLASSES[self.kind][1](honest, random.Random(1000 * self.number + self.num_asked))
        return honest.record()

    def deliver(self, connection: Connection, reply: Message) -> None:
        if self.kind in OBJECTS:
            upload(connection, reply, OBJECTS[self.kind](reply))
        elif self.kind == SILENT:  # it dies in the middle of its upload
            content = Part("RecordDict", [], b"{}")
            upload(connection, reply, message_of(reply, [content]), only=1)
        else:
            DELIVER(connection, reply)


DELIVER = fedlr.client.node.deliver


def say(line: str) -> None:
    print(line, flush=True)


def main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    with ExitStack() as stack:
        puppets = []
        for number, kinds in enumerate(plan["devices"]):
            server = SimpleNamespace(
                address=plan["address"],
                private_key=folder / f"device-{number}.key",
                root_certificates=folder / "ca.crt",
            )
            state_dir = folder / f"state-{number}"
            state_dir.mkdir(exist_ok=True)
            settings = cast(Settings, SimpleNamespace(server=server, state_dir=state_dir))
            puppets.append(Puppet(number, kinds, stack.enter_context(connected(settings))))
        print("connected", flush=True)
        while not (folder / "stop").exists():
            for puppet in puppets:
                fedlr.client.node.deliver = puppet.deliver
                puppet.num_asked += step(puppet.connection, cast(Device, puppet), say=say, outage=Outage(say))
            time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
