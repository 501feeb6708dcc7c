"""One federated round, and many of them: `state, clients -> state, diagnostics`.

A round never trains anything itself: it sees a `ClientPool`. A pool may be clients in this process, Ray actors or real
devices behind Flower; the round is the same (McMahan et al. 2017, algorithm 1, with the method's choices).
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from typing import Protocol

from torch import Tensor

from fedlr.adapters.client_ranks import narrowed, ranks_now, widened
from fedlr.adapters.state import (
    AdapterState,
    Block,
    ClientUpdate,
    LoraFactors,
    Slot,
    num_bytes,
    roles_of,
    side_tensors,
    with_head,
)
from fedlr.errors import InputError
from fedlr.methods.aggregate.held import TooFewUpdates
from fedlr.methods.aggregate.last_models import mean_model, with_past
from fedlr.methods.client_rules.rule import CONTROL
from fedlr.methods.codecs.codec import Codec, CodecError, num_coded_bytes
from fedlr.methods.measure.diagnostics import (
    ChangeWatch,
    MeanChange,
    aggregation_error,
    aggregation_error_sd,
    singular_values,
)
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import Method
from fedlr.rounds.client_unit import ClientUnit
from fedlr.rounds.cohorts import cohorts, sample_among
from fedlr.rounds.outlying import MAX_UPDATE_RATIO, Moves, moves, near_the_others, product_moves
from fedlr.rounds.validate import rejection

MOST_HELD = 64  # updates, beyond which a client that sent only unusable ones is not waited for


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round. `round_index` counts finished rounds."""

    adapter: AdapterState
    round_index: int = 0


@dataclass(frozen=True)
class RoundRequest:
    """What one round asks of every client of its cohort.

    `broadcast` overlays the adapter that each client was given when it enrolled; `block` is what it trains, and returns
    but for its `personal` roles. `side` is merged into the base, `control` is for the method's rule of the clients.
    `ranks` has the rank of each client that is asked, and nothing where all have the adapter's.
    """

    round_index: int
    broadcast: Mapping[Slot, Tensor]
    block: Block
    personal: frozenset[str] = frozenset()
    side: Mapping[str, LoraFactors] = field(default_factory=dict)
    control: Mapping[Slot, Tensor] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)

    @property
    def shared(self) -> Block:
        """What leaves a client of what it trained."""
        return frozenset(entry for entry in self.block if not roles_of(frozenset({entry})) <= self.personal)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that is asked: two tasks that have it in common are one computation."""
        asked = (self.round_index, sorted(self.block, key=str), sorted(self.personal), sorted(self.ranks.items()))
        digest = hashlib.sha256(repr(asked).encode())
        for group in (self.broadcast, side_tensors(self.side), self.control):
            digest.update(AdapterState(group, scale=1.0).fingerprint().encode())
        return digest.hexdigest()

    def num_bytes(self, rank: int | None = None) -> int:
        """Return the bytes that go down to a client of this rank; None: the adapter's."""
        own = narrowed(self.broadcast, rank)
        return sum(map(num_bytes, (own.values(), side_tensors(self.side).values(), self.control.values())))


@dataclass(frozen=True)
class Dropout:
    """An answer the server cannot use, or one that never came: a counted, named event."""

    client_id: int
    status: str  # "refused" by the client (budget), "rejected" by the server (bad update, or none)
    reason: str


class ClientPool(Protocol):
    """Where clients train: in this process, in Ray actors, or on devices behind Flower."""

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield one outcome for each client of the cohort, in any order."""
        ...


@dataclass(frozen=True)
class RoundDiagnostics:
    """What the server can say about a round from released tensors alone."""

    cohort: tuple[int, ...]
    trained: tuple[int, ...]
    dropouts: tuple[Dropout, ...]
    aggregation_error: Mapping[str, float]  # by layer, relative
    singular_values: Mapping[str, list[float]]  # by layer, of delta_W
    bytes_up: int  # of the updates that were used, all clients together
    bytes_down: int
    train_s: float
    aggregate_s: float
    aggregation_error_sd: Mapping[str, float] = field(default_factory=dict)  # by layer: 0.0 where the error is exact
    ranks: Mapping[int, int] = field(default_factory=dict)  # by client of the cohort; empty: all have the adapter's
    change: MeanChange | None = None  # of the updates that were used; None: there was none, or ranks differ
    codec_error: CodecError | None = None  # None: no codec, or not known here
    is_secret: bool = False  # the client unit: who took part, and what came of it, is told to nobody


def initial_state(adapter: AdapterState, method: Method) -> ServerState:
    """Return the state before the first round: the method's finaliser also shapes the adapter it starts from."""
    return ServerState(method.finalise(adapter))


def request_of(
    state: ServerState, method: Method, *, train_head: bool = False, ranks: Mapping[int, int] | None = None
) -> RoundRequest:
    """Return what the next round asks of its clients; `ranks` by client id, None: all have the adapter's."""
    block = with_head(method.block_schedule(state.round_index, state.adapter), train_head)
    return RoundRequest(
        round_index=state.round_index,
        broadcast=method.broadcast(state.adapter, block),
        block=block,
        personal=frozenset(method.personal),
        side=state.adapter.side,
        control=state.adapter.memory.get(CONTROL, {}),
        ranks=ranks or {},
    )


def run_round(
    state: ServerState,
    cohort: Sequence[int],
    *,
    pool: ClientPool,
    method: Method,
    train_head: bool = False,
    ranks: Sequence[int] | None = None,
    max_update_ratio: float | None = MAX_UPDATE_RATIO,
    client_unit: ClientUnit | None = None,
    codec: Codec | None = None,
) -> tuple[ServerState, RoundDiagnostics]:
    """Broadcast, train, validate, aggregate, finalise.

    Updates are aggregated in ascending client order and few are kept: memory does not grow with the cohort. A client of
    smaller rank (`ranks`, by id; None: all have the adapter's) has zeros beyond it here; one that moved too far beside
    the others is left out (`fedlr.rounds.outlying`). A round without a usable update, or with fewer than a robust rule
    needs, keeps the adapter, and counts.

    With `client_unit` the aggregate sees one noised mean in place of the updates, of an empty cohort too; then the clip
    bounds each update by itself, and no update is measured against others. With `codec`, what the pool gives came
    through it: it is asked how many bytes an update has.
    """
    method = method.at(state.round_index)
    task = request_of(state, method, train_head=train_head, ranks=ranks_now(state.adapter, cohort, ranks))
    expected = state.adapter.select(task.shared)
    if client_unit is not None:
        client_unit.charge(state.round_index, client_unit.asked(task.fingerprint(), state.adapter))
        max_update_ratio = None

    started = time.perf_counter()
    answers = Answers(pool, task, cohort, adapter=state.adapter, max_update_ratio=max_update_ratio)
    updates, ideal, change = iter(answers), Ideal(state.adapter), ChangeWatch(expected)
    if client_unit is not None:
        updates = iter([client_unit.release(updates, expected, round_index=state.round_index, before=state.adapter)])
    first = next(updates, None)
    if first is None:
        aggregated = adapter = state.adapter
    else:
        counted = change.watch(ideal.watch(chain([first], updates)))
        del first
        try:
            aggregated = method.aggregate(state.adapter, counted)
            deque(counted, maxlen=0)  # whoever trained is in the diagnostics, also where a rule stops early
            adapter = method.finish(state.adapter, aggregated, task.shared)
        except TooFewUpdates:
            answers.leave_out("too_few")
            aggregated = adapter = state.adapter
    method.check_finalised(state.adapter, adapter)
    if client_unit is not None:
        adapter = client_unit.remembered(adapter)
        return ServerState(adapter, state.round_index + 1), RoundDiagnostics(
            cohort=(),
            trained=(),
            dropouts=(),
            aggregation_error={},
            singular_values=singular_values(adapter),
            bytes_up=client_unit.cohort_size * num_coded_bytes(codec, expected),
            bytes_down=client_unit.cohort_size * task.num_bytes(),
            train_s=answers.train_s,
            aggregate_s=time.perf_counter() - started - answers.train_s,
            change=change.mean(),
            is_secret=True,
        )
    diagnostics = RoundDiagnostics(
        cohort=tuple(cohort),
        trained=tuple(answers.trained),
        dropouts=tuple(sorted(answers.dropouts, key=lambda d: (d.client_id, d.status, d.reason))),
        aggregation_error=aggregation_error(ideal, aggregated) if answers.trained else {},
        aggregation_error_sd=aggregation_error_sd(ideal, aggregated) if answers.trained else {},
        singular_values=singular_values(adapter),
        bytes_up=_total(answers.trained, task, lambda rank: num_coded_bytes(codec, narrowed(expected, rank))),
        bytes_down=_total(cohort, task, task.num_bytes),
        train_s=answers.train_s,
        aggregate_s=time.perf_counter() - started - answers.train_s,
        ranks=task.ranks,
        change=None if task.ranks or not answers.trained else change.mean(),
    )
    return ServerState(adapter, state.round_index + 1), diagnostics


class Answers:
    """What comes of a round. Iterating, once, trains the cohort and gives the usable updates in ascending client order,
    so that no schedule of the pool changes a sum.

    The first few are held, later ones until every lower client is heard. A client's first usable update counts and
    stays; one of which nothing is heard is an event. One that sent only what cannot be used is waited for while few
    updates are held, and then no longer: it could otherwise make the server hold them all.
    """

    def __init__(
        self,
        pool: ClientPool,
        task: RoundRequest,
        cohort: Sequence[int],
        *,
        adapter: AdapterState,
        max_update_ratio: float | None = MAX_UPDATE_RATIO,
    ) -> None:
        self.trained: list[int] = []  # ascending
        self.dropouts: list[Dropout] = []
        self.train_s = 0.0  # spent waiting for the pool
        self._outcomes = iter(pool.train(task, cohort) if cohort else ())
        self._max_update_ratio = max_update_ratio
        self._task, self._cohort = task, cohort
        self._adapter, self._expected = adapter, adapter.select(task.shared)

    def __iter__(self) -> Iterator[ClientUpdate]:
        def too_far(update: ClientUpdate) -> None:
            self.dropouts.append(Dropout(update.client_id, "rejected", "too_far"))

        for update in near_the_others(self._in_order(), max_ratio=self._max_update_ratio, reject=too_far):
            self.trained.append(update.client_id)
            yield update

    def leave_out(self, reason: str) -> None:
        """Count every update that was usable by itself as rejected: together they are of no use."""
        self.dropouts += [Dropout(client, "rejected", reason) for client in self.trained]
        self.trained.clear()

    def _in_order(self) -> Iterator[tuple[ClientUpdate, Moves]]:
        """Yield the updates of the right form, with how far each moved, in ascending client order."""
        asked, waiting = frozenset(self._cohort), deque(sorted(self._cohort))
        held: dict[int, tuple[ClientUpdate, Moves]] = {}
        over: set[int] = set()  # who has had its turn: used, held, dropped out, or no longer waited for
        heard: set[int] = set()
        while (outcome := self._next()) is not None:
            heard.add(outcome.client_id)
            if isinstance(outcome, Dropout):
                over.add(outcome.client_id)
                self.dropouts.append(outcome)
            elif reason := rejection(
                outcome,
                expected=self._expected if outcome.client_id not in asked else self._expected_of(outcome.client_id),
                round_index=self._task.round_index,
                asked=asked,
                seen=over,
            ):
                self.dropouts.append(Dropout(outcome.client_id, "rejected", reason))
            else:
                over.add(outcome.client_id)
                held[outcome.client_id] = self._as_wide(outcome), self._moves_of(outcome)
            del outcome  # the next one trains while this would still be held
            while waiting and (waiting[0] in over or (waiting[0] in heard and len(held) > MOST_HELD)):
                client = waiting.popleft()
                over.add(client)
                if client in held:
                    yield held.pop(client)
        self.dropouts += [Dropout(client, "rejected", "no_answer") for client in waiting if client not in heard]
        for client in sorted(held):
            yield held.pop(client)

    def _expected_of(self, client: int) -> Mapping[Slot, Tensor]:
        return narrowed(self._expected, self._task.ranks.get(client))

    def _moves_of(self, update: ClientUpdate) -> Moves:
        if self._max_update_ratio is None:
            return {}
        of_factors = moves(update.tensors, self._expected_of(update.client_id))
        if self._task.personal:  # the server does not know the other factor
            return of_factors
        rank = self._task.ranks.get(update.client_id)
        return {**of_factors, **product_moves(update.tensors, self._adapter, rank=rank)}

    def _as_wide(self, update: ClientUpdate) -> ClientUpdate:
        rank = self._task.ranks.get(update.client_id)
        return update if rank is None else replace(widened(update, self._expected), rank=rank)

    def _next(self) -> ClientUpdate | Dropout | None:
        started = time.perf_counter()
        try:
            return next(self._outcomes, None)
        finally:
            self.train_s += time.perf_counter() - started


def _total(clients: Sequence[int], task: RoundRequest, size: Callable[[int | None], int]) -> int:
    """Return the sizes of all clients together; those of one rank have one size, which is taken once."""
    return sum(n * size(rank) for rank, n in Counter(task.ranks.get(client) for client in clients).items())


def remembering(before: ServerState, after: ServerState, average_last: int) -> ServerState:
    """Return a round's state that remembers the models before it that `scored` averages."""
    adapter = with_past(before.adapter, after.adapter, num_rounds=before.round_index, average_last=average_last)
    return replace(after, adapter=adapter)


def scored(state: ServerState) -> ServerState:
    """Return what is evaluated and exported of a state: the mean of the last models, or the model where one counts."""
    return replace(state, adapter=mean_model(state.adapter))


def federated_rounds(
    state: ServerState,
    *,
    pool: ClientPool,
    method: Method,
    num_rounds: int,
    num_clients: int,
    cohort_size: int,
    max_participations: int,
    seed: int,
    train_head: bool = False,
    ranks: Sequence[int] | None = None,
    quorum: int = 0,
    max_update_ratio: float | None = MAX_UPDATE_RATIO,
    average_last: int = 1,
    members: Callable[[], Collection[int]] | None = None,
    poisson: Callable[[int], tuple[int, ...]] | None = None,
    client_unit: ClientUnit | None = None,
    codec: Codec | None = None,
) -> Iterator[tuple[ServerState, RoundDiagnostics]]:
    """Yield the state after each round: evaluation, logs and checkpoints are the caller's plain lines.

    A round that fewer clients than `quorum` answered is abandoned: it yields the state it started from, and the same
    cohort is asked again, for as long as the caller goes on. `members` says anew at each attempt who may be drawn, and
    then counts participations itself; None: everybody whom `max_participations` leaves. `poisson` draws the cohort of a
    round in place of one of a fixed size (`fedlr.rounds.cohorts.poisson_cohort`); `client_unit` hides whole clients.
    """
    if not 1 <= cohort_size <= num_clients:
        raise InputError(f"Expected cohort_size in [1, num_clients={num_clients}], got {cohort_size}")
    if client_unit is not None and quorum:
        raise ValueError(f"Expected no quorum with the client unit, which tells nobody how many answered, got {quorum}")
    fixed = cohorts(seed=seed, num_clients=num_clients, cohort_size=cohort_size, max_participations=max_participations)
    draws = fixed if poisson is None else map(poisson, count())
    one_round = partial(
        run_round,
        pool=pool,
        method=method,
        train_head=train_head,
        ranks=ranks,
        max_update_ratio=max_update_ratio,
        client_unit=client_unit,
        codec=codec,
    )
    for cohort in islice(draws, state.round_index, num_rounds):
        while True:
            if members is not None:
                cohort = sample_among(members(), seed=seed, round_index=state.round_index, cohort_size=cohort_size)
            after, diagnostics = one_round(state, cohort)
            after = remembering(state, after, average_last)
            is_abandoned = len(diagnostics.trained) < min(quorum, len(cohort))
            state = state if is_abandoned else after
            yield state, diagnostics
            if not is_abandoned:
                break
