"""A Grid for strangers' replies: no upload can end a round, hold it up, fill the server's memory or change its sender.

The other half of each test is what Flower's own Grid does with the same bytes (flwr 1.41): when it no longer does, ours
may go. Mutants killed: metadata from inside a message; chunks counted once; a wait for the last object.
"""

import tracemalloc
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.superlink.grid import HttpGrid

import fedlr.server.reply_grid
from fedlr.flower.records import from_record, to_record
from fedlr.server.reply_grid import ReplyGrid
from tests.server.direct_grid import reply_to
from tests.server.hostile_devices import CHUNK, OBJECTS, Part, array, message_of
from tests.server.malformed import CANARY
from tests.server.small_federation import adapter
from tests.training.small_models import mutant

MEGABYTE = 2**20
SENT = adapter().tensors


def honest(number: int = 1) -> tuple[Message, Part]:
    """Return node 100 + `number`'s reply to message m`number`, and its parts as they are uploaded."""
    reply = reply_to(f"m{number}", 100 + number, content=to_record(SENT))
    return reply, parts_of(reply)


def parts_of(thing: Any) -> Part:
    body = thing.deflate().partition(b"\0")[2]
    return Part(type(thing).__name__, [parts_of(child) for child in (thing.children or {}).values()], body)


class SuperLink:
    """What a SuperLink answers that holds these uploads; it hands a reply over once."""

    def __init__(self, uploads: Iterable[tuple[Message, Part]], *, late: Sequence[str] = ()) -> None:
        self.uploads, self.late, self.confirmed = list(uploads), set(late), list[str]()
        self.objects = {part.name: part.content for _, root in self.uploads for part in root.all()}

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        asked = [(m, r) for m, r in self.uploads if m.metadata.reply_to_message_id in request.message_ids]
        self.uploads = [upload for upload in self.uploads if upload not in asked]
        for message, root in asked:
            message.metadata.__dict__["_message_id"] = root.name
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message)) for message, _ in asked],
            message_object_trees=[root.tree() for _, root in asked],
        )

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        here = request.object_id in self.objects and request.object_id not in self.late
        content = self.objects[request.object_id] if here else b""
        return PullObjectResponse(
            object_found=request.object_id in self.objects, object_available=here, object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()


def over(link: SuperLink, kind: type[HttpGrid] = ReplyGrid) -> Any:
    grid: Any = kind(token="none")
    grid._client, grid._run = link, type("Run", (), {"run_id": 1})
    grid.most_bytes = 10_000
    return grid


def pulled(link: SuperLink, kind: type[HttpGrid] = ReplyGrid) -> dict[str, Message]:
    return {m.metadata.reply_to_message_id: m for m in over(link, kind).pull_messages(["m1", "m2"])}


def test_an_honest_reply_arrives_as_with_flowers_own_grid() -> None:
    for kind in (ReplyGrid, HttpGrid):
        link = SuperLink([honest(1), honest(2)])
        replies = pulled(link, kind)
        assert replies.keys() == {"m1", "m2"} and len(link.confirmed) == 2
        assert replies["m2"].metadata.src_node_id == 102 and from_record(replies["m2"].content).keys() == SENT.keys()


def test_the_error_of_a_device_arrives_without_its_words() -> None:
    reply = reply_to("m1", 101, error=Error(2, CANARY))
    message = pulled(SuperLink([(reply, parts_of(reply))]))["m1"]
    assert message.has_error() and CANARY not in str(message.error.reason)


ENDS_FLOWERS = [
    name for name in OBJECTS if "times" not in name and name not in ("two contents", "content that is a record")
]


@pytest.mark.parametrize("name", OBJECTS)
def test_what_cannot_be_put_together_is_an_error_in_its_place_and_the_others_come(name: str) -> None:
    def uploads() -> list[tuple[Message, Part]]:
        reply, _ = honest(1)
        return [(reply, OBJECTS[name](reply)), honest(2)]

    link = SuperLink(uploads())
    replies = pulled(link)
    assert replies["m2"].has_content() and len(link.confirmed) == 2
    assert name == "two contents" or (replies["m1"].has_error() and CANARY not in str(replies["m1"].error.reason))
    if name in ENDS_FLOWERS:
        with pytest.raises(Exception):  # noqa: B017 - each in its own way
            pulled(SuperLink(uploads()), HttpGrid)


def peak_of(grid: Any) -> int:
    tracemalloc.start()
    replies = list(grid.pull_messages(["m1"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(replies) == 1
    return peak


def test_one_chunk_named_a_thousand_times_does_not_fill_the_servers_memory() -> None:
    def bomb() -> SuperLink:
        reply, _ = honest(1)
        return SuperLink([(reply, message_of(reply, [array([CHUNK], arraychunk_ids=[0] * 1000)]))])

    assert peak_of(over(bomb())) < MEGABYTE
    assert peak_of(over(bomb(), HttpGrid)) > 100 * MEGABYTE
    once = mutant(fedlr.server.reply_grid, ('sum(chunks[index] for index in body["arraychunk_ids"])', "sum(chunks)"))
    assert peak_of(over(bomb(), once.ReplyGrid)) > 100 * MEGABYTE


def test_more_objects_or_bytes_than_were_asked_for_are_not_pulled() -> None:
    for body, count in ((b"\0" * 2 * MEGABYTE, 1), (b"", 1500)):
        reply, _ = honest(1)
        chunks = [Part("ArrayChunk", [], str(i).encode() + body) for i in range(count)]
        link = SuperLink([(reply, message_of(reply, [array(chunks)])), honest(2)])
        replies = pulled(link)
        assert replies["m1"].has_error() and replies["m2"].has_content()


def test_a_reply_that_is_half_uploaded_is_left_for_the_next_look_and_never_asked_for_twice() -> None:
    reply, root = honest(1)
    link = SuperLink([(reply, root), honest(2)], late=[root.name])
    grid = over(link)
    assert [m.metadata.reply_to_message_id for m in grid.pull_messages(["m1", "m2"])] == ["m2"]
    assert list(grid.pull_messages(["m1"])) == []
    link.late.clear()
    (message,) = grid.pull_messages(["m1"])
    assert message.has_content() and list(grid.pull_messages(["m1"])) == []


def test_an_upload_that_was_given_up_or_is_no_longer_waited_for_is_forgotten() -> None:
    reply, root = honest(1)
    link = SuperLink([(reply, root)], late=[root.name])
    grid = over(link)
    assert list(grid.pull_messages(["m1"])) == []
    del link.objects[root.name]
    (message,) = grid.pull_messages(["m1"])
    assert message.has_error()
    link = SuperLink([(reply, root)], late=[root.name])
    grid = over(link)
    assert list(grid.pull_messages(["m1"])) == list(grid.pull_messages(["m2"])) == []
    assert not grid._coming


def test_a_reply_cannot_say_that_it_is_anothers() -> None:
    def lie() -> SuperLink:
        reply, root = honest(1)
        return SuperLink([(reply, message_of(reply, root.children, src_node_id=102, reply_to_message_id="m2"))])

    assert {key: m.metadata.src_node_id for key, m in pulled(lie()).items()} == {"m1": 101}
    assert {key: m.metadata.src_node_id for key, m in pulled(lie(), HttpGrid).items()} == {"m2": 102}  # it is believed
