"""`fedlr client run` that tells how long it trained: `python -m fedlr.simulations.bench.timed_device client.yaml`.

A device never tells anybody, because the time depends on its data; in a benchmark the data are no one's. What is timed
is all that the pool does for a round: the ledger, the steps, the noise.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from fedlr.__main__ import main
from fedlr.adapters.state import ClientUpdate
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import LocalPool
from fedlr.rounds.round import Dropout, RoundRequest

Train = Callable[[Any, RoundRequest, Sequence[int]], Iterator[ClientUpdate | Dropout]]
TOOK = "trained in seconds: "


def timed(train: Train) -> Train:
    """Print how long it takes until all updates are there."""

    @wraps(train)
    def train_and_tell(pool: Any, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        started = time.perf_counter()
        outcomes = list(train(pool, task, cohort))
        print(f"{TOOK}{time.perf_counter() - started:.6f}", flush=True)
        return iter(outcomes)

    return train_and_tell


if __name__ == "__main__":
    for pool in (FusedPool, LocalPool):
        pool.train = timed(pool.train)  # type: ignore[method-assign, assignment]
    sys.exit(main(["client", "run", *sys.argv[1:]]))
