"""Each client alone: the same model, steps, mechanism and number of participations, and nobody to share with."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from fedlr.rounds import ClientPool, ServerState, run_round
from simulations.federation import Federation
from simulations.progress import alone_rounds

AT_ONCE = 64  # clients whose states are held: they train, then the caller looks at them, and no thread is at work


def train_alone(federation: Federation, pool: ClientPool, *, client_done: Callable[[], None]) -> Iterator[ServerState]:
    """Yield each client's state after as many rounds as it takes part in on average, by client id.

    A client that refuses (its budget is spent) keeps what it has.
    """
    e = federation.experiment

    def train(client_id: int) -> ServerState:
        state = federation.start
        for _ in range(alone_rounds(e)):
            state, _ = run_round(
                state,
                [client_id],
                pool=pool,
                method=federation.method,
                train_head=e.adapter.train_head,
                ranks=federation.ranks,
            )
            client_done()
        return state

    # A product that is folded into the base is there for all who compute at that time.
    num_threads = 1 if federation.method.folds else e.runtime.num_workers
    with ThreadPoolExecutor(num_threads) as threads:
        for first in range(0, e.num_clients, AT_ONCE):
            yield from list(threads.map(train, range(first, min(first + AT_ONCE, e.num_clients))))
