"""What a server and a device say to each other: a request for one round, and its reply.

Both are tensors and facts (`flower.records`). Every tensor's path is led by its group: broadcast, side, control,
enrolled. A reply holds released values and constants of the configuration, nothing else: no counts, no losses, no
times, no text of an error. Its size does not depend on the data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Field, ValidationError
from torch import Tensor

from fedlr.adapters.state import SIDE_A, SIDE_B, AdapterState, Block, LoraFactors, Slot, side_tensors
from fedlr.config.schema import Section
from fedlr.errors import InputError
from fedlr.errors.messages import first_problem
from fedlr.flower.records import ANY, Limits, RecordDict, facts_of, from_record, to_record
from fedlr.flower.task_terms import Sha256
from fedlr.flower.terms import Terms
from fedlr.methods.codecs.codec import Codec, Exact, num_coded_bytes
from fedlr.rounds.round import RoundRequest

BROADCAST, SIDE, CONTROL, ENROLLED = GROUPS = ("broadcast", "side", "control", "enrolled")
# Why a device sent no update. Words of a closed set: what went wrong in detail stays on the device.
RefusalReason = Literal[
    "budget_exhausted",  # its ledger
    "already_reserved",
    "policy",  # the terms are outside what its owner allows
    "model",  # its base model is missing, or another than the terms name
    "data",  # its table is of another form than the terms name: other labels, pairs, plain texts
    "not_enrolled",  # it lost the adapter it was given, and needs it again
    "other_task",  # it was asked for something else in this round before
    "older_ledger",  # its ledger lacks a row which the server says was its last once
    "spent_less",  # its ledger says less than the server says it once did
    "device_error",
]
Facts = TypeVar("Facts", bound=Section)
REFUSALS: tuple[str, ...] = get_args(RefusalReason)
LARGEST_EPSILON = 1e9  # no ledger grants as much; an infinite one no checkpoint could hold


class RequestFacts(Section):
    """What a request says besides its tensors."""

    terms: str
    client_id: Annotated[int, Field(ge=0, lt=2**32)]
    round_index: Annotated[int, Field(ge=0, lt=2**32)]
    block: list[str | tuple[str, str]]
    personal: list[str]
    rank: Annotated[int, Field(ge=1, lt=2**16)] | None  # the client's, where it is not the adapter's
    scale: float
    enrolled_sha256: Sha256
    nonce: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    echo_epsilon: Annotated[float, Field(ge=0, le=LARGEST_EPSILON)] | None = None
    echo_head: Sha256 | None = None


@dataclass(frozen=True)
class LedgerEcho:
    """What a device last said of its ledger, as the server remembers it: told back, so that both can tell a ledger
    that was put back. A server that lies in it gets a refusal, which it could have had by not asking."""

    epsilon: float
    head: str | None


@dataclass(frozen=True)
class Request:
    """One round, asked of one device. `enrolled` is the adapter that broadcasts overlay; None: it was sent before.

    Flower names a message by its content, and lets whoever knows the name answer it; so every request has a nonce, and
    only the device that was sent it knows its name.
    """

    terms: Terms
    client_id: int
    task: RoundRequest
    enrolled_sha256: str
    scale: float
    enrolled: AdapterState | None
    echo: LedgerEcho | None = None

    def record(self) -> RecordDict:
        """Return the request as Flower sends it."""
        task = self.task
        groups: dict[str, Mapping[Slot, Tensor]] = {
            BROADCAST: task.broadcast,
            SIDE: side_tensors(task.side),
            CONTROL: task.control,
            ENROLLED: {} if self.enrolled is None else self.enrolled.tensors,
        }
        facts = {
            "terms": self.terms.text(),
            "client_id": self.client_id,
            "round_index": task.round_index,
            "block": sorted(task.block, key=str),
            "personal": sorted(task.personal),
            "rank": task.ranks.get(self.client_id),
            "scale": self.scale,
            "enrolled_sha256": self.enrolled_sha256,
            "nonce": token_hex(16),
        }
        if self.echo is not None:
            facts |= {"echo_epsilon": self.echo.epsilon, "echo_head": self.echo.head}
        tensors = {
            Slot(f"{group}/{slot.path}", slot.role): t for group, part in groups.items() for slot, t in part.items()
        }
        return to_record(tensors, facts)

    @classmethod
    def read(cls, record: RecordDict, limits: Limits = ANY) -> Self:
        """Read a request.

        Raises:
            InputError: for anything that is not exactly of this form, or an adapter that is not the one it names.
        """
        facts = _checked(RequestFacts, facts_of(record, limits), "request")
        groups: dict[str, dict[Slot, Tensor]] = {group: {} for group in GROUPS}
        for slot, tensor in from_record(record, limits).items():
            group, _, path = slot.path.partition("/")
            if group not in groups:
                raise InputError(f"Expected tensors of {', '.join(GROUPS)} in a request, got {group[:40]!r}")
            groups[group][Slot(path, slot.role)] = tensor
        enrolled = AdapterState(groups[ENROLLED], facts.scale) if groups[ENROLLED] else None
        if enrolled is not None and enrolled.fingerprint() != facts.enrolled_sha256:
            raise InputError(f"Expected the adapter {facts.enrolled_sha256[:12]} in a request, got another")
        block: Block = frozenset(entry if isinstance(entry, str) else Slot(*entry) for entry in facts.block)
        task = RoundRequest(
            round_index=facts.round_index,
            broadcast=groups[BROADCAST],
            block=block,
            personal=frozenset(facts.personal),
            side=_side(groups[SIDE]),
            control=groups[CONTROL],
            ranks={} if facts.rank is None else {facts.client_id: facts.rank},
        )
        echo = None if facts.echo_epsilon is None else LedgerEcho(facts.echo_epsilon, facts.echo_head)
        terms = Terms.read(facts.terms)
        return cls(terms, facts.client_id, task, facts.enrolled_sha256, facts.scale, enrolled, echo)


class ReplyFacts(Section):
    """What a reply says besides its tensors; `refused` names why there are none."""

    experiment_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    client_id: Annotated[int, Field(ge=0, lt=2**32)]
    round_index: Annotated[int, Field(ge=0, lt=2**32)]
    task_sha256: Sha256
    refused: RefusalReason | None
    # By the device's own ledger, over its life; None: no privacy.
    epsilon: Annotated[float, Field(ge=0, le=LARGEST_EPSILON)] | None
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    ledger_head: Sha256 | None
    # Of the above, with the key by which the server knows the device (`flower.signed`); None: it has no ledger or key.
    signature: Annotated[str, Field(pattern="^[0-9a-f]{192}$")] | None = None


@dataclass(frozen=True)
class Reply:
    """A device's answer: the values of the trained block less what is personal, or why there are none."""

    facts: ReplyFacts
    tensors: Mapping[Slot, Tensor]

    def record(self) -> RecordDict:
        """Return the reply as Flower sends it."""
        return to_record(self.tensors, self.facts.model_dump())

    @classmethod
    def read(cls, record: RecordDict, limits: Limits = ANY) -> Self:
        """Read a reply. The values are not looked at: that is `fedlr.rounds.validate`'s.

        Raises:
            InputError: for anything that is not exactly of this form.
        """
        return cls(_checked(ReplyFacts, facts_of(record, limits), "reply"), from_record(record, limits))


def reply_limits(expected: Mapping[Slot, Tensor], codec: Codec | None = None) -> Limits:
    """Return what a reply may hold whose tensors are these, as they travel."""
    num_tensors = len((codec or Exact()).form(expected))
    return Limits(
        num_bytes=num_coded_bytes(codec, expected) + 1,
        num_tensors=num_tensors + 1,
        fact_chars=10_000,
        coded=codec is not None,
    )


def _side(tensors: Mapping[Slot, Tensor]) -> dict[str, LoraFactors]:
    paths = sorted({slot.path for slot in tensors})
    try:
        if len(tensors) != 2 * len(paths):
            raise KeyError("a factor without the other")
        return {path: LoraFactors(tensors[Slot(path, SIDE_A)], tensors[Slot(path, SIDE_B)]) for path in paths}
    except KeyError as error:
        raise InputError("Expected both factors of every layer's side in a request, got one") from error


def _checked(kind: type[Facts], facts: Mapping[str, Any], where: str) -> Facts:
    try:
        try:
            return kind.model_validate_json(json.dumps(facts))  # as JSON, in which a list may stand for a tuple
        except ValidationError as error:
            raise InputError(first_problem(error, facts, prefix=where)) from error
    except RecursionError as error:  # what could just be read is too deep to be written, or shown, a call further in
        raise InputError(f"Expected the facts of a {where} without nesting, got them nested too deep") from error
