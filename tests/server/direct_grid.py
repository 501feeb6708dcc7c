"""A Flower Grid without a network: messages go through Flower's bytes to devices of this process, and come back."""

from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlr.flower.records import RecordDict

Answer = Callable[[RecordDict], RecordDict | None]  # None: it never answers


class DirectGrid(Grid):
    """Nodes 100, 101, ...: client k is node 100 + k."""

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.answers = dict(answers)
        self._replies: dict[str, Message] = {}
        self.num_pushed = 0

    def online(self) -> Mapping[int, int]:
        return {client: 100 + client for client in self.answers}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online().values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            self.num_pushed += 1
            identifier = f"m{self.num_pushed}"
            pushed.append(identifier)
            node = message.metadata.dst_node_id
            try:
                content = self.answers[node - 100](through_bytes(message.content))
            except Exception:
                self._replies[identifier] = reply_to(identifier, node, error=Error(2, "device_error"))
            else:
                if content is not None:
                    self._replies[identifier] = reply_to(identifier, node, content=through_bytes(content))
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(one) for one in list(message_ids) if one in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_nodes(self) -> Iterable[object]:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError


def reply_to(identifier: str, node: int, *, content: RecordDict | None = None, error: Error | None = None) -> Message:
    metadata = Metadata(
        run_id=1,
        message_id=f"r-{identifier}",
        src_node_id=node,
        dst_node_id=1,
        reply_to_message_id=identifier,
        group_id="",
        created_at=0.0,
        ttl=60.0,
        message_type="train",
    )
    return make_message(metadata=metadata, content=content, error=error)


def through_bytes(record: RecordDict) -> RecordDict:
    return recorddict_from_proto(
        type(recorddict_to_proto(record)).FromString(recorddict_to_proto(record).SerializeToString())
    )
