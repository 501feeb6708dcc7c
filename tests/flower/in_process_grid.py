"""A Flower Grid without Flower's processes: clients are functions, called one after the other."""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message], Message | list[Message] | None]
_IDS = count(1)


def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let messages be made, as in a process that Flower started; the names are private in flwr 1.41."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InProcessGrid(Grid):
    """Asks `client` for every message; `nodes` are the connected ones, or a function that is asked each time."""

    def __init__(self, client: Client, nodes: Sequence[int] | Callable[[], Sequence[int]]) -> None:
        self.client, self.nodes = client, nodes
        self.asked: list[Message] = []

    run = property(lambda self: None)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes() if callable(self.nodes) else self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(_IDS))
            self.asked.append(message)
            answer = self.client(as_received(message))
            replies += answer if isinstance(answer, list) else [answer] if answer is not None else []
        return replies


def as_received(message: Message) -> Message:
    """A copy: whatever a client does to its message, no other client and no server sees it."""
    records: dict[str, Any] = {}
    for key, record in message.content.items():
        records[key] = ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else ConfigRecord(dict(record))
    return Message(RecordDict(records), metadata=copy.copy(message.metadata))
