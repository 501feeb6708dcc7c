"""Flower's Grid for replies of strangers: whatever a device uploads, or leaves half uploaded, the others' replies come.

`HttpGrid` waits for the last object of a reply, for minutes where its sender has died, and the deadline of the round
passes; believes what a reply says of its own sender, which the SuperLink has not compared with what it knows; puts
together what names one chunk a million times; and raises for what it cannot put together, so that the replies it has
taken with it are lost. Here a reply that is not whole is left for the next look, and one that is not of Flower's form
is an error message, as one that never came (tests/server/test_reply_grid.py).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from fedlr.errors import InputError

MOST_OBJECTS = 1000  # of one reply; ours has one a dtype, one a chunk of 5 MiB, and six
SPARE_BYTES = 1 << 20  # of one reply, besides its tensors


@dataclass
class Coming:
    """A reply that the SuperLink has handed over, and as much of it as has arrived."""

    proto: MessageProto
    tree: ObjectTree
    contents: dict[str, bytes] = field(default_factory=dict)


class ReplyGrid(HttpGrid):
    """A Grid whose `pull_messages` neither waits nor raises for what a device did.

    `most_bytes` is what the tensors of one reply may have; whoever knows what is asked sets it.
    """

    most_bytes: int = 1 << 32
    _coming: Mapping[str, Coming] = MappingProxyType({})  # by the request that is answered

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are whole by now, and an error message for each that never will be."""
        wanted = set(message_ids)
        coming = {asked: one for asked, one in self._coming.items() if asked in wanted}
        # The SuperLink hands a reply over once, as soon as its upload begins; asked again, it says there is none.
        request = PullAppMessagesRequest(message_ids=wanted - coming.keys())
        found = self._runtime_client.PullMessages(request)
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            coming[proto.metadata.reply_to_message_id] = Coming(proto, tree)
        taken = {asked: self._taken(one) for asked, one in coming.items()}
        self._coming = {asked: one for asked, one in coming.items() if taken[asked] is None}
        return [message for message in taken.values() if message is not None]

    def _taken(self, one: Coming) -> Message | None:
        """Return the reply, or an error in its place; None: there is more to come."""
        metadata = metadata_from_proto(one.proto.metadata)  # as the SuperLink checked it
        try:
            if not self._pull(one):
                return None
            content = whole(one.proto, one.contents, most_bytes=self.most_bytes + SPARE_BYTES)
        except InputError:
            content = None
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=metadata.run_id, message_object_id=one.proto.metadata.message_id
            )
        )
        error = Error(ErrorCode.MESSAGE_UNAVAILABLE, "it cannot be put together") if content is None else None
        return make_message(metadata, content=content, error=error)

    def _pull(self, one: Coming) -> bool:
        """Pull what is there of a reply; return whether that is all of it.

        Raises:
            InputError: it is too large, or will never be whole.
        """
        wanted = {node.object_id for node in islice(iterate_object_tree(one.tree), MOST_OBJECTS + 1)}
        if len(wanted) > MOST_OBJECTS:
            raise InputError(f"Expected at most {MOST_OBJECTS} objects in a reply, got more")
        for object_id in wanted - one.contents.keys():
            request = PullObjectRequest(node=self.node, run_id=one.proto.metadata.run_id, object_id=object_id)
            part = self._runtime_client.PullObject(request)
            if not part.object_found:
                raise InputError("Expected all objects of a reply, got a part: its upload was given up")
            if not part.object_available:
                return False
            one.contents[object_id] = part.object_content
            if sum(map(len, one.contents.values())) > self.most_bytes + SPARE_BYTES:
                raise InputError("Expected a reply of the size that was asked for, got more bytes")
        return True


def whole(proto: MessageProto, contents: dict[str, bytes], *, most_bytes: int) -> RecordDict | None:
    """Put a reply together, using up its parts; None where it is an error of its sender's.

    Raises:
        InputError: it is not of Flower's form, or would grow beyond the bytes.
    """
    try:
        if proto.HasField("error"):
            return None
        if sum(grown_bytes(contents)) > most_bytes:
            raise ValueError("it grows")
        message = inflate_object_from_contents(proto.metadata.message_id, contents)
        if not isinstance(message, Message) or not message.has_content():
            raise ValueError("it has no content")
        if not isinstance(message.content, RecordDict):
            raise ValueError("its content is another thing")
        return message.content
    except Exception as error:  # of Flower, json and protobuf, each in its own way
        raise InputError(f"Expected a reply of Flower's form, got another ({type(error).__name__})") from error


def grown_bytes(contents: dict[str, bytes]) -> Iterator[int]:
    """Yield the bytes of each array once its chunks, any of which it may name more than once, are put together."""
    for content in contents.values():
        if get_object_type_from_object_content(content) == "Array":
            chunks = [len(contents[name]) for name in get_object_children_ids_from_object_content(content)]
            body = json.loads(bytes(content).partition(b"\x00")[2])
            yield sum(chunks[index] for index in body["arraychunk_ids"])
