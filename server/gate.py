"""The gate: from a device's message to an update the round may use, or to a typed reason why not.

It stands in front of every method (reliability.md R-S1). The record is decoded by its exact form, what it says of
itself must be what was asked of exactly this client, and `rounds.validate` then looks at every value. Nothing a device
sends can raise, and no word of it reaches a log: a reason is one of a closed set.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, ReplyFacts, reply_limits
from fedlr.flower.records import RecordDict
from fedlr.methods.codecs.codec import Codec, Place, decoded
from fedlr.rounds.round import Dropout


@dataclass(frozen=True)
class Asked:
    """What one client was asked in one round, as far as its answer must repeat it."""

    experiment_id: str
    client_id: int
    round_index: int
    task_sha256: str
    expected: Mapping[Slot, Tensor]  # of the shapes and dtypes that must come back
    codec: Codec | None = None  # that a reply came through; then `expected` has the values that it is a change of
    place: Place | None = None
    delta: float | None = None  # of the budget; then an update comes with what its sender has spent, at this or less


@dataclass(frozen=True)
class Answer:
    """What came of it: an update or a dropout, and what the client says of its ledger (None where it is unusable)."""

    outcome: ClientUpdate | Dropout
    facts: ReplyFacts | None = None


def answer_of(record: RecordDict, asked: Asked, *, weight: float) -> Answer:
    """Decode one reply; it never raises for anything that the record holds.

    `weight` is the server's own. An update that is returned has the form that was asked for; its values are checked
    where the round takes it (`fedlr.rounds.validate`).
    """
    client = asked.client_id
    try:
        reply = Reply.read(record, reply_limits(asked.expected, asked.codec))
    except InputError:
        return Answer(Dropout(client, "rejected", "malformed"))
    facts = reply.facts
    if facts.client_id != client:
        return Answer(Dropout(client, "rejected", "other_client"))
    if facts.experiment_id != asked.experiment_id:
        return Answer(Dropout(client, "rejected", "other_experiment"))
    if facts.round_index != asked.round_index:
        return Answer(Dropout(client, "rejected", "wrong_round"))
    if facts.task_sha256 != asked.task_sha256:
        return Answer(Dropout(client, "rejected", "other_task"))
    if facts.refused is not None:
        if reply.tensors:  # a refusal that brings any is no refusal, and what else it says is not believed
            return Answer(Dropout(client, "rejected", "malformed"))
        return Answer(Dropout(client, "refused", facts.refused), facts)
    if asked.delta is not None and not is_stated(facts, asked.delta):
        return Answer(Dropout(client, "rejected", "no_statement"))
    tensors = reply.tensors
    if asked.codec is not None and asked.place is not None:
        try:
            tensors = decoded(asked.codec, tensors, asked.expected, asked.place)
        except InputError:  # which says what; a reason is a word of a closed set
            return Answer(Dropout(client, "rejected", "bad_code"), facts)
    return Answer(ClientUpdate(client, tensors, weight, facts.round_index), facts)


def is_stated(facts: ReplyFacts, delta: float) -> bool:
    """Return whether a device says what it has spent, at a delta that is not larger than this one."""
    return None not in (facts.epsilon, facts.ledger_head) and facts.delta is not None and facts.delta <= delta
