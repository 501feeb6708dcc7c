"""One federated round, and many of them: `state, clients -> state, diagnostics`.

A round never trains anything itself: it sees a `ClientPool`. A pool may be clients in this process, Ray actors or real
devices behind Flower; the round is the same (McMahan et al. 2017, algorithm 1, with the method's four choices).

Clients are sampled by a pure function of (seed, round), so a run can go on from any state. The sample is public: no
privacy amplification is claimed from it, because the server that draws it is one of the adversaries.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedlr.adapter import HEAD, AdapterState, Block, ClientUpdate, Slot, num_bytes
from fedlr.aggregate.diagnostics import aggregation_error, singular_values
from fedlr.errors import InputError
from fedlr.method import Method
from fedlr.streams import Purpose, stream
from fedlr.validate import rejection


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round. `round_index` counts finished rounds."""

    adapter: AdapterState
    round_index: int = 0


@dataclass(frozen=True)
class RoundTask:
    """What one round asks of every client of its cohort.

    `broadcast` overlays the adapter that each client was given when it enrolled; `block` is what it trains and returns.
    """

    round_index: int
    broadcast: Mapping[Slot, Tensor]
    block: Block


@dataclass(frozen=True)
class Dropout:
    """An answer the server cannot use, or one that never came: a counted, named event."""

    client_id: int
    status: str  # "refused" by the client (budget), "rejected" by the server (bad update, or none)
    reason: str


class ClientPool(Protocol):
    """Where clients train: in this process, in Ray actors, or on devices behind Flower."""

    def train(self, task: RoundTask, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield one outcome for each client of the cohort, in any order."""
        ...


@dataclass(frozen=True)
class RoundDiagnostics:
    """What the server can say about a round from released tensors alone."""

    cohort: tuple[int, ...]
    trained: tuple[int, ...]
    dropouts: tuple[Dropout, ...]
    aggregation_error: Mapping[str, float]  # by layer, relative (methods.md 13.15)
    singular_values: Mapping[str, list[float]]  # by layer, of delta_W
    bytes_up: int  # of the updates that were used, all clients together
    bytes_down: int
    train_s: float
    aggregate_s: float


def sample_cohort(
    *, seed: int, round_index: int, num_clients: int, cohort_size: int, max_participations: int
) -> tuple[int, ...]:
    """Draw the clients of one round, uniformly among those with participations left.

    Args:
        seed: public seed of the run.
        round_index: which round, from 0.
        num_clients: enrolled clients, numbered from 0.
        cohort_size: clients to draw; fewer when fewer have participations left.
        max_participations: rounds that any client may be drawn for over the whole run.

    Returns:
        Client ids in ascending order: the same for every process that knows the arguments.

    >>> sample_cohort(seed=1, round_index=0, num_clients=4, cohort_size=4, max_participations=1)
    (0, 1, 2, 3)
    >>> sample_cohort(seed=1, round_index=1, num_clients=4, cohort_size=4, max_participations=1)
    ()
    """
    drawn = np.zeros(num_clients, dtype=np.int64)
    cohort: np.ndarray = np.empty(0, dtype=np.int64)
    for index in range(round_index + 1):
        eligible = np.flatnonzero(drawn < max_participations)
        generator = stream(seed, Purpose.COHORT, round_index=index)
        cohort = generator.choice(eligible, size=min(cohort_size, len(eligible)), replace=False)
        drawn[cohort] += 1
    return tuple(sorted(int(client) for client in cohort))


def initial_state(adapter: AdapterState, method: Method) -> ServerState:
    """Return the state before the first round: the method's finaliser also shapes the adapter it starts from."""
    return ServerState(method.finalise(adapter))


def run_round(
    state: ServerState, cohort: Sequence[int], *, pool: ClientPool, method: Method, train_head: bool = False
) -> tuple[ServerState, RoundDiagnostics]:
    """Broadcast, train, validate, aggregate, finalise.

    A round in which no client returned a usable update leaves the adapter as it was and still counts as a round.
    """
    block = method.block_schedule(state.round_index) | (frozenset({HEAD}) if train_head else frozenset())
    task = RoundTask(state.round_index, method.broadcast(state.adapter, block), block)

    started = time.perf_counter()
    updates, dropouts = collect(pool, task, cohort, expected=state.adapter.select(block))
    trained_at = time.perf_counter()

    aggregated = method.aggregate(state.adapter, updates) if updates else state.adapter
    adapter = method.finalise(aggregated) if updates else state.adapter
    diagnostics = RoundDiagnostics(
        cohort=tuple(cohort),
        trained=tuple(update.client_id for update in updates),
        dropouts=tuple(dropouts),
        aggregation_error=aggregation_error(state.adapter, updates, aggregated) if updates else {},
        singular_values=singular_values(adapter),
        bytes_up=sum(num_bytes(update.tensors.values()) for update in updates),
        bytes_down=num_bytes(task.broadcast.values()) * len(cohort),
        train_s=trained_at - started,
        aggregate_s=time.perf_counter() - trained_at,
    )
    return ServerState(adapter, state.round_index + 1), diagnostics


def collect(
    pool: ClientPool, task: RoundTask, cohort: Sequence[int], *, expected: Mapping[Slot, Tensor]
) -> tuple[list[ClientUpdate], list[Dropout]]:
    """Gather the cohort's outcomes in ascending client order, so that no schedule of the pool changes a sum.

    A client's first usable update counts and stays, whatever else comes in its name; a client of which nothing is heard
    is an event too.
    """
    updates: dict[int, ClientUpdate] = {}
    dropouts: list[Dropout] = []
    for outcome in pool.train(task, cohort):
        if isinstance(outcome, Dropout):
            dropouts.append(outcome)
            continue
        reason = rejection(outcome, expected=expected, round_index=task.round_index, asked=cohort, seen=updates)
        if reason is None:
            updates[outcome.client_id] = outcome
        else:
            dropouts.append(Dropout(outcome.client_id, "rejected", reason))
    heard = {*updates, *(dropout.client_id for dropout in dropouts)}
    dropouts += [Dropout(client, "rejected", "no_answer") for client in cohort if client not in heard]
    return [updates[c] for c in sorted(updates)], sorted(dropouts, key=lambda d: (d.client_id, d.status, d.reason))


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
) -> Iterator[tuple[ServerState, RoundDiagnostics]]:
    """Yield the state after each round: evaluation, logs and checkpoints are the caller's plain lines."""
    if not 1 <= cohort_size <= num_clients:
        raise InputError(f"Expected cohort_size in [1, num_clients={num_clients}], got {cohort_size}")
    while state.round_index < num_rounds:
        cohort = sample_cohort(
            seed=seed,
            round_index=state.round_index,
            num_clients=num_clients,
            cohort_size=cohort_size,
            max_participations=max_participations,
        )
        state, diagnostics = run_round(state, cohort, pool=pool, method=method, train_head=train_head)
        yield state, diagnostics
