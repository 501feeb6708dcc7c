"""A device: it answers one request after the other, with its own model, data, policy and ledger.

    request -> policy -> an answer kept from before? -> the round on constant rows -> ledger.reserve -> DP-SGD
            -> ledger.settle -> disk -> reply

What a request can make fail fails before the ledger is charged, whatever rows there are and would have been drawn
(`fedlr.rounds.pools.rehearsal`); rows that it makes unreadable count as zero (`fedlr.client.own_rows`).

Nothing but `flower.messages.Reply` leaves: what goes wrong is said in the device's own log, and to the server in one
word. A round that was released is sent again from disk; one that was charged and never released is charged again with
fresh noise (or, with seeded randomness, computed again to the bit, which releases nothing new).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import AdapterState, Block, ClientUpdate, Slot
from fedlr.client.own_rows import read_rows
from fedlr.client.policy import Policy, PolicyRefusal, check_request, check_terms
from fedlr.client.settings import Settings
from fedlr.client.stored_replies import Kept, Replies, last_heads
from fedlr.client.trainee import Trainee, Unfit, only_head
from fedlr.errors import InputError
from fedlr.flower.messages import RefusalReason, Reply, ReplyFacts, Request
from fedlr.flower.node_key import load_node_key
from fedlr.flower.records import Limits, RecordDict
from fedlr.flower.signed import sign
from fedlr.flower.terms import Terms
from fedlr.methods.codecs.codec import Place, encoded
from fedlr.privacy.chain import GENESIS
from fedlr.privacy.ledger import PrivacyLedger, Refusal
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import LocalPool
from fedlr.training.threads import torch_threads

ROUNDING = 1e-3  # of an epsilon that a server remembers: accountants differ in their last digits
OWN = 0  # this device in its own ledger, whatever number a server gives it


class Refused(Exception):
    """No update will come of a request; the reason is one of the words that may leave."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Device:
    """One client of a federation.

    Args:
        settings: what its owner decided.
        say: the device's own log; what it is told never leaves.

    Raises:
        InputError: the ledger is missing (which is not an unspent budget), was changed, belongs to other settings, or
            is an older copy of itself: it lacks a row that was its last when an update was released; or the rows cannot
            be read. They are read here, and never again: found in a round, what is wrong would be told in a word.
    """

    def __init__(self, settings: Settings, *, say: Callable[[str], None]) -> None:
        self.num_models_loaded = 0
        self._settings, self._say = settings, say
        self._ledger = settings.open_ledger()
        self._trainee: Trainee | None = None
        self._pool: tuple[object, FusedPool | LocalPool] | None = None
        self._key = _key_of(settings)
        self._block: Block | None = None  # the last that was found trainable
        if self._ledger is not None:
            for head in last_heads(settings.experiments_dir):
                self._ledger.require(head)
        self._rows = read_rows(settings)

    def answer(self, record: RecordDict) -> RecordDict:
        """Answer one request.

        Raises:
            InputError: it is no request at all, so there is nobody to answer in the form of a reply.
        """
        request = Request.read(record, limits_of(self._settings.policy))
        where = f"round {request.task.round_index} of {request.terms.name}"
        try:
            reply = self._answer(request)
            self._say(f"{where}: {'trained' if reply.tensors else reply.facts.refused}")
        except Refused as refusal:
            self._say(f"{where}: refused ({refusal.reason}): {refusal}")
            reply = self._refusal(request, refusal.reason)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what went wrong with private data stays here, a panic of a library too
            self._say(f"{where}: failed: {type(error).__name__}: {error}")
            reply = self._refusal(request, "device_error")
        return reply.record()

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool[1].close()
            self._pool = self._block = None

    def _answer(self, request: Request) -> Reply:
        terms, task = request.terms, request.task
        try:
            check_terms(terms, self._settings)
            check_request(request, self._settings)
        except PolicyRefusal as refusal:
            raise Refused("policy", str(refusal)) from refusal
        self._check_echo(request)
        replies = Replies(self._settings.experiments_dir, terms.experiment_id)
        asked = task.fingerprint()
        if (done := replies.of(task.round_index)) is not None:
            if done.reply.facts.task_sha256 == asked:
                return Reply(self._facts(request, asked, None), done.reply.tensors)
            if terms.randomness == "seeded":  # the same noise on another sum: their difference would have none
                raise Refused("other_task", "another adapter was broadcast in this round before")
        kept = replies.enrolled(request.enrolled_sha256) if self._settings.runtime.cache_prefix else None
        trainee = self._prepared(request, request.enrolled or kept)
        enrolled = self._enrolled(request, replies)
        with torch_threads(1):
            pool = self._pool_of(trainee, request.client_id, enrolled)
            if task.block != self._block:
                trainee.check(task.block)
                self._block = task.block
            latest = replies.latest()
            if latest is not None and not {slot.role for slot in latest.personal} <= task.personal:
                raise Refused("policy", "what is personal in one round of an experiment stays so in all")
            pool.kept.restore(request.client_id, latest.personal if latest else {}, latest.memory if latest else {})
            (outcome,) = list(pool.train(task, [request.client_id]))
        if not isinstance(outcome, ClientUpdate):
            reason: RefusalReason = "budget_exhausted" if outcome.reason == "budget_exhausted" else "already_reserved"
            raise Refused(reason, f"the ledger says {outcome.reason}")
        reply = Reply(self._facts(request, asked, None), message_of(request, outcome, enrolled))
        replies.write(Kept(reply, *pool.kept.of(request.client_id)))
        return reply

    def _check_echo(self, request: Request) -> None:
        """Refuse to go on where the server remembers more than the ledger: it was put back, or the server lies.

        Nothing was read or charged then. What decides is the request and the ledger, whose rows are no data.
        """
        echo = request.echo
        if echo is None or self._ledger is None:
            return
        try:
            self._ledger.require(echo.head or GENESIS)
        except InputError as error:
            raise Refused("older_ledger", f"by the server's memory {error}") from error
        if echo.epsilon > (spent := self._ledger.spent(OWN)) * (1 + ROUNDING) + ROUNDING:
            what = f"the server remembers epsilon {echo.epsilon:g}, the ledger says {spent:g}"
            raise Refused("spent_less", f"{what}: put the newest ledger back, or ask the operator")

    def _enrolled(self, request: Request, replies: Replies) -> AdapterState:
        if request.enrolled is not None:
            replies.enrol(request.enrolled)
            return request.enrolled
        adapter = replies.enrolled(request.enrolled_sha256)
        if adapter is None:
            raise Refused("not_enrolled", f"the adapter {request.enrolled_sha256[:12]} is not on this device")
        return adapter

    def _prepared(self, request: Request, enrolled: AdapterState | None) -> Trainee:
        features, now = only_head(request.task, enrolled), self._trainee
        if now is not None and now.terms == request.terms and (features or not now.features):
            return now
        self.close()
        try:
            self._trainee = made = Trainee.prepare(
                self._settings, request.terms, self._rows, features=features, say=self._say
            )
        except Unfit as error:
            raise Refused(error.reason, str(error)) from error
        except InputError as error:
            raise Refused("policy", str(error)) from error
        self.num_models_loaded += 1
        self._say(f"base model {request.terms.model_sha256[:12]} loaded, {len(made.share)} examples")
        return made

    def _pool_of(self, trainee: Trainee, client_id: int, enrolled: AdapterState) -> FusedPool | LocalPool:
        key = (trainee.terms.sha256(), client_id, enrolled.fingerprint())
        if self._pool is None or self._pool[0] != key:
            self.close()
            ledger = None if trainee.terms.mechanism is None else self._ledger
            charges = None if ledger is None else OwnCharges(ledger, trainee.terms)
            self._pool = key, trainee.pool(client_id, enrolled, charges)
        return self._pool[1]

    def _refusal(self, request: Request, reason: RefusalReason) -> Reply:
        return Reply(self._facts(request, request.task.fingerprint(), reason), {})

    def _facts(self, request: Request, asked: str, reason: RefusalReason | None) -> ReplyFacts:
        spent = None if self._ledger is None else self._ledger.spent(OWN)
        facts = ReplyFacts(
            experiment_id=request.terms.experiment_id,
            client_id=request.client_id,
            round_index=request.task.round_index,
            task_sha256=asked,
            refused=reason,
            # Rounded up: the last digits of an accountant differ between machines.
            epsilon=None if spent is None else math.ceil(spent * 1e6) / 1e6 if math.isfinite(spent) else spent,
            delta=None if self._ledger is None else self._settings.privacy.delta,
            ledger_head=None if self._ledger is None else self._ledger.head(),
        )
        if self._key is None or self._ledger is None:
            return facts
        return facts.model_copy(update={"signature": sign(facts.model_dump(), self._key)})


def message_of(request: Request, update: ClientUpdate, enrolled: AdapterState) -> Mapping[Slot, Tensor]:
    """Return an update as it travels: a function of the update, which is noised, and of public words."""
    codec, task = request.terms.built_codec(), request.task
    if codec is None:
        return update.tensors
    place = Place(request.terms.seed, request.client_id, task.round_index)
    with torch_threads(1):
        sent_down = enrolled.overlaid(task.broadcast).select(task.shared)
        return encoded(codec, update.tensors, narrowed(sent_down, task.ranks.get(request.client_id)), place)


def _key_of(settings: Settings) -> ec.EllipticCurvePrivateKey | None:
    """Return the key that signs what the ledger says; None on a device without one, such as a simulated one."""
    path = settings.server.private_key
    key = load_node_key(path) if path.exists() else None
    return key if key is not None and isinstance(key.curve, ec.SECP384R1) else None


def limits_of(policy: Policy) -> Limits:
    """Return what a request may hold at most: what the policy lets an adapter be, sent and enrolled, and a side."""
    num_values = 4 * policy.max_trained_values + policy.max_side_values
    return Limits(num_bytes=8 * num_values)


class OwnCharges:
    """The device's ledger as a pool asks for it: rounds are numbered over the life of the ledger, whoever asks.

    The terms are part of every task: the same request under other steps is another computation. They announce how many
    steps there will be.
    """

    def __init__(self, ledger: PrivacyLedger, terms: Terms) -> None:
        self._ledger, self._terms_sha256, self._announced = ledger, terms.sha256(), terms.announced_steps()
        self._round = 0

    def reserve(
        self,
        round_index: int,
        mechanism: Mechanism,
        num_steps: int,
        client_ids: Sequence[int],
        task: str | None = None,
    ) -> Mapping[int, Refusal | None]:
        """Charge a round, or refuse; with seeded noise a round that is computed again is the one it was."""
        (client,) = client_ids
        if task is not None:
            task = hashlib.sha256(f"{self._terms_sha256} {task}".encode()).hexdigest()
        before = self._ledger.round_of(OWN, task) if task is not None and self._ledger.is_seeded else None
        self._round = self._ledger.participations(OWN) if before is None else before
        answers = self._ledger.reserve(self._round, mechanism, num_steps, [OWN], task, self._announced)
        return {client: answers[OWN]}

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Say how many steps were taken."""
        (steps,) = steps_taken.values()
        self._ledger.settle_all(self._round, {OWN: steps})
