"""Each client alone: the same model, steps, mechanism and number of participations, and nobody to share with."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlr.config.auto_rates import alone_rounds
from fedlr.methods.client_rules.rule import CONTROL
from fedlr.methods.method import full_adapter
from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.round import ClientPool, ServerState, remembering, run_round, scored
from fedlr.simulations.choosing import evaluator_of
from fedlr.simulations.contact_sheet import named, shown_rows
from fedlr.simulations.federation import Federation

AT_ONCE = 64  # clients whose states are held: they train, then the caller looks at them, and no thread is at work


@dataclass(frozen=True)
class Arm:
    """Where one client stands after its rounds alone, and how many of them gave an update that could be used."""

    state: ServerState
    num_updates: int


def train_alone(federation: Federation, pool: ClientPool, *, client_done: Callable[[], None]) -> Iterator[Arm]:
    """Yield each client's arm after as many rounds as it takes part in on average, by client id.

    A client that refuses (its budget is spent) keeps what it has. Nobody shares: nothing is personal, and SCAFFOLD has
    no drift to correct. A server optimizer steps for one client as it does for a cohort.
    """
    e = federation.experiment
    method = federation.method.of_one_client()
    if method.personal:
        method = replace(method, broadcast=full_adapter, personal=())

    def train(client_id: int) -> Arm:
        state, num_updates = federation.start, 0
        for _ in range(alone_rounds(e)):
            before = state
            state, diagnostics = run_round(
                state,
                [client_id],
                pool=pool,
                method=method,
                train_head=e.adapter.train_head,
                ranks=federation.ranks,
            )
            state = remembering(before, state, e.average_last)
            memory = {name: tensors for name, tensors in state.adapter.memory.items() if name != CONTROL}
            state = replace(state, adapter=replace(state.adapter, memory=memory))
            num_updates += len(diagnostics.trained)
            client_done()
        return Arm(state, num_updates)

    # A product that is folded into the base is there for all who compute at that time.
    num_threads = 1 if federation.method.folds else e.runtime.num_workers
    with ThreadPoolExecutor(num_threads) as threads:
        for first in range(0, e.num_clients, AT_ONCE):
            yield from list(threads.map(train, range(first, min(first + AT_ONCE, e.num_clients))))


def of_own_rows(federation: Federation, evaluator: Evaluator, client_id: int, arm: Arm) -> dict[str, Any]:
    """Return how good a client alone is on held-out rows of its own, where that is told of clients at all, and what it
    takes the pictures of the contact sheet for."""
    tests, shown = federation.client_tests, shown_rows(federation)
    if tests is None or not len(tests.rows[client_id]):
        return {}
    state = scored(arm.state)
    own = {"own_accuracy": accuracy_on(federation, state, tests.rows[client_id])}
    if client_id >= len(shown):
        return own
    return {**own, "named": named(evaluator, state, shown[client_id])}


def accuracy_on(federation: Federation, state: ServerState, rows: NDArray[np.int64]) -> float:
    """Return the accuracy of a state on some of the held-out rows."""
    evaluator = evaluator_of(replace(federation, test=federation.test.subset(rows)))
    return evaluator.score(state)[0].accuracy
