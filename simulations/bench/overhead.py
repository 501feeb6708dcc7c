"""What a round costs beside the training: trivial clients, with everything around them that a real round has.

A trivial client answers at once with tensors that are ready. The ledger is charged and settled as for clients that
train, every update is checked, the method aggregates, the state is diagnosed.
"""

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fedlr.adapters.state import ClientUpdate
from fedlr.config.schema import compose_experiment
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.local import Accounts
from fedlr.rounds.round import Dropout, RoundRequest, run_round
from fedlr.simulations.bench.federations import overrides
from fedlr.simulations.bench.outcome import BenchmarkFailed, Measure, Outcome
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.training.threads import torch_threads

GROUP = 64  # clients whose steps are settled together, as a pool of many does


class TrivialPool:
    """A `ClientPool` whose clients take no time: each returns what it was given, and pays for it."""

    def __init__(self, federation: Federation, ledger: PrivacyLedger | None) -> None:
        self._accounts = Accounts(
            ledger,
            federation.mechanism,
            federation.training,
            enrolled=federation.start.adapter,
            randomness=federation.randomness,
        )
        self._steps = federation.training.num_steps
        self._adapter = federation.start.adapter

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Charge, answer, settle."""
        admitted, refused = self._accounts.reserve(task, cohort, Kept())
        yield from refused
        tensors = self._adapter.select(task.block)
        for start in range(0, len(admitted), GROUP):
            group = admitted[start : start + GROUP]
            self._accounts.settle(task.round_index, dict.fromkeys(group, self._steps))
            for client in group:
                yield ClientUpdate(client, tensors, 1.0, task.round_index)


def run(settings: Settings) -> Outcome:
    """Time rounds of 100, 1,000 and 10,000 clients, in turn."""
    sizes = settings.pick(tiny=(10, 100), quick=(100, 1_000, 10_000), full=(100, 1_000, 10_000))
    turns = settings.pick(tiny=2, quick=3, full=7)
    words = overrides(settings, num_clients=4, num_steps=4, batch=4, is_toy=True)
    with torch_threads(1):
        federation = assemble(compose_experiment(words), seed=settings.seed)
        seconds = {size: [one_round(federation, size) for _ in range(turns + 1)][1:] for size in sizes}
    per_client = {size: tuple(1e3 * s / size for s in found) for size, found in seconds.items()}
    for size, found in per_client.items():
        settings.say(f"  {size:,} clients: {median(found):.4f} ms a client")
    most, fewer = sizes[-1], sizes[-2]
    growth = tuple(b / a for a, b in zip(per_client[fewer], per_client[most], strict=True))
    measures: list[Any] = [
        Measure("overhead", f"overhead of a round of {most:,} trivial clients, a client", per_client[most], " ms"),
        Measure("overhead-growth", f"time of {most:,} / time of {fewer:,} clients, a client", growth),
    ]
    measures += [Measure(f"overhead-{n}", f"the same, {n:,} clients", per_client[n], " ms") for n in sizes[:-1]]
    setting = {
        "threads": 1,
        "clock": "wall",
        "adapter": f"{federation.num_trained_values} trained values",
        "ledger": f"a new file in the temporary folder, charged in one write, settled {GROUP} clients at a time",
    }
    raw = {"seconds": {str(size): found for size, found in seconds.items()}}
    return Outcome("overhead", tuple(measures), (), setting, raw)


def one_round(federation: Federation, num_clients: int) -> float:
    """Return the seconds of one round of so many clients, its ledger new."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = create_ledger(federation, Path(folder) / "ledger.jsonl")
        pool = TrivialPool(federation, ledger)
        gc.collect()
        started = time.perf_counter()
        _, diagnostics = run_round(federation.start, range(num_clients), pool=pool, method=federation.method)
        seconds = time.perf_counter() - started
    if len(diagnostics.trained) != num_clients:
        raise BenchmarkFailed(f"Expected {num_clients} clients to train, got {len(diagnostics.trained)}")
    return seconds
