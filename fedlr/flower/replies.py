"""What the clients of a Flower user answer, read as a stranger's: the updates of a round, and the mean of its metrics.

One reply of a node counts, its first. Whatever cannot be used is a `Dropout`: counted, named, never the end of a run.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Message, MetricRecord, RecordDict

from fedlr.adapters.state import AdapterState, ClientUpdate, in_block
from fedlr.flower.arrays import PeftNames, decode
from fedlr.rounds.round import Dropout, RoundRequest

FROZEN_MOVED, CLIENT_ERROR = "trained_what_is_frozen", "client_error"  # reasons beside those of fedlr.rounds.validate
LARGEST_METRIC = 1e100
logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Weighting:
    """Weights of the server: one for all clients, or what they say, up to a cap."""

    key: str
    cap: float | None

    def __call__(self, content: RecordDict) -> float:
        """Return the weight of a reply; 0 where it says nothing that can be one."""
        if self.cap is None:
            return 1.0
        said = metrics_of(content).get(self.key, 0)
        return float(min(said, self.cap)) if isinstance(said, int | float) and said > 0 else 0.0


@dataclass(frozen=True)
class ReplyPool:
    """A `ClientPool` (fedlr.rounds.round) whose clients have trained: their replies, by node."""

    contents: Mapping[int, RecordDict]
    dropouts: Sequence[Dropout]
    names: PeftNames
    adapter: AdapterState  # what was sent to them
    weighting: Weighting

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield what each reply holds, in ascending order of the nodes, then those that cannot be read."""
        unreadable = list(self.dropouts)
        for node, content in sorted(self.contents.items()):
            read = self._read(task, node, content)
            if isinstance(read, str):
                unreadable.append(Dropout(node, "rejected", read))
            else:
                yield read
        yield from unreadable

    def _read(self, task: RoundRequest, node: int, content: RecordDict) -> ClientUpdate | str:
        """Return the update, or in a word why there is none. The values of what trained are `rounds.validate`'s."""
        records = list(content.array_records.values())
        trained = set(self.names.keys(task.block))
        if len(records) != 1 or set(records[0]) not in (trained, set(self.names.slots)):
            return "wrong_keys"
        try:
            sent = {self.names.slots[key]: decode(array) for key, array in records[0].items()}
        except Exception:  # numpy and torch each have their own for bytes that make no sense
            return "malformed"
        frozen = {slot for slot in sent if not in_block(slot, task.block)}
        if not all(torch.equal(sent[slot], self.adapter.tensors[slot]) for slot in frozen):
            return FROZEN_MOVED
        tensors = {slot: tensor for slot, tensor in sent.items() if slot not in frozen}
        return ClientUpdate(node, tensors, weight=self.weighting(content), base_round=task.round_index)


def first_contents(replies: Iterable[Message], asked: Sequence[Message]) -> tuple[dict[int, RecordDict], list[Dropout]]:
    """Return the first reply of each node that was asked, and what else came.

    An error that the SuperLink writes for a node comes in its own name; the message it answers tells the node's.
    """
    nodes = {message.metadata.dst_node_id: message.metadata.group_id for message in asked}
    by_message = {message.metadata.message_id: message.metadata.dst_node_id for message in asked}
    contents: dict[int, RecordDict] = {}
    dropouts: list[Dropout] = []
    for reply in replies:
        node = reply.metadata.src_node_id
        if not reply.has_content():
            node = by_message.get(reply.metadata.reply_to_message_id, node)
            dropouts.append(Dropout(node, "refused", CLIENT_ERROR))
            logger.debug("node %d: %.500r", node, reply.error.reason if reply.has_error() else None)
        elif node not in nodes:
            dropouts.append(Dropout(node, "rejected", "unknown_client"))
        elif reply.metadata.group_id != nodes[node]:
            dropouts.append(Dropout(node, "rejected", "wrong_round"))
        elif node in contents:
            dropouts.append(Dropout(node, "rejected", "duplicate"))
        else:
            contents[node] = reply.content
    return contents, dropouts


def mean_metrics(contents: Sequence[RecordDict], weighting: Weighting) -> dict[str, float]:
    """Return the weighted mean of every number that more than half of the replies tell, but for that of the weights."""
    told: dict[str, list[tuple[float, float]]] = {}
    for content in contents:
        for name, value in metrics_of(content).items():
            if name != weighting.key and isinstance(value, int | float) and abs(value) <= LARGEST_METRIC:
                told.setdefault(name, []).append((weighting(content), float(value)))
    totals = {
        name: sum(weight for weight, _ in pairs) for name, pairs in told.items() if 2 * len(pairs) > len(contents)
    }
    return {name: sum(w * v for w, v in told[name]) / total for name, total in sorted(totals.items()) if total > 0}


def metrics_of(content: RecordDict) -> MetricRecord:
    """Return the metrics of a reply; none unless there is exactly one record of them."""
    records = list(content.metric_records.values())
    return records[0] if len(records) == 1 else MetricRecord()
