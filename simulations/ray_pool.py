"""Virtual clients in several processes: Ray actors, each with a resident base model and threads of its own.

The groups of a round are those of one process (`fedlr.rounds.pools.fused`), in the same order, so the numbers are the
same to the bit; only where a group trains differs. The ledger stays in this process, which charges a cohort before any
actor is asked. An actor builds its federation from the same configuration and seed.
"""

import importlib
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlr.adapters.state import ClientUpdate
from fedlr.config.schema import check_experiment
from fedlr.privacy.ledger import Refusal
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.fused import group_size
from fedlr.rounds.pools.local import Accounts, Charges
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.runtime import pool_here
from fedlr.training.threads import torch_threads

# Groups that wait at each actor beside the one that trains: no actor idles, and few results lie about.
QUEUED = 1


class RayPool:
    """A `ClientPool` (fedlr.rounds.round) over `runtime.num_processes` actors on this machine."""

    def __init__(self, federation: Federation, ledger: Charges | None) -> None:
        ray = _ray()
        e = federation.experiment
        self._federation = federation
        self._accounts = Accounts(
            ledger,
            federation.mechanism,
            federation.training,
            enrolled=federation.start.adapter,
            randomness=federation.randomness,
        )
        ray.init(
            num_cpus=e.runtime.num_processes,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
            ignore_reinit_error=True,
        )
        # The check against Opacus is one of the run, not of each process.
        checks = [e.trainer.check_parity] + [False] * (e.runtime.num_processes - 1)
        trainer = {flag: e.trainer.model_copy(update={"check_parity": flag}) for flag in (True, False)}
        # Ray shows an actor its own GPU only, as the first.
        on_gpu = e.runtime.device != "cpu"
        actor: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(Trainer)
        runtime = e.runtime.model_copy(update={"device": "cuda" if on_gpu else "cpu"})
        self._actors = [
            actor.remote(
                e.model_copy(update={"trainer": trainer[check], "runtime": runtime}).resolved(),
                seed=federation.seed,
                mechanism=federation.mechanism,
                randomness=federation.randomness,
            )
            for check in checks
        ]
        self.seconds: dict[int, float] = {}  # by client, of its latest round
        self.kept = Kept()  # stays empty: a method whose clients remember is refused (`federation.check_method`)

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Reserve each client's spending, then train those that can still pay, group by group; yield in their order."""
        ray = _ray()
        admitted, refused = self._accounts.reserve(task, cohort, self.kept)
        yield from refused
        e = self._federation.experiment
        trained = self._federation.start.adapter.overlaid(task.broadcast).select(task.block)
        has_rule = self._federation.training.rule.changes
        size = group_size(trained, e.runtime.memory_gb, has_rule=has_rule) if e.trainer.engine == "fused" else 1
        shipped = ray.put(task)
        groups = deque(enumerate(admitted[start : start + size] for start in range(0, len(admitted), size)))
        running: deque[tuple[list[int], Any]] = deque()
        while groups or running:
            while groups and len(running) < len(self._actors) * (1 + QUEUED):
                number, group = groups.popleft()
                running.append((group, self._actors[number % len(self._actors)].train.remote(shipped, group)))
            group, answer = running.popleft()
            updates, seconds = ray.get(answer)
            self._accounts.settle(task.round_index, dict.fromkeys(group, self._federation.training.num_steps))
            self.seconds.update(seconds)
            yield from updates

    def close(self) -> None:
        """End the actors."""
        _ray().shutdown()


class Trainer:
    """What runs in an actor: the same federation, and a pool of this process."""

    def __init__(
        self, experiment: Mapping[str, Any], *, seed: int, mechanism: Mechanism | None, randomness: Any
    ) -> None:
        with torch_threads(1):
            federation = assemble(check_experiment(experiment), seed=seed)
        federation = replace(federation, mechanism=mechanism, randomness=randomness)
        self._pool = pool_here(federation, None if mechanism is None else ChargedBefore())

    def train(self, task: RoundRequest, group: Sequence[int]) -> tuple[list[ClientUpdate], dict[int, float]]:
        """Train a group that the driver charged; return the updates in its order, and each client's seconds."""
        with torch_threads(1):
            answers = list(self._pool.train(task, group))
        updates = sorted((a for a in answers if isinstance(a, ClientUpdate)), key=lambda u: u.client_id)
        return updates, {client: self._pool.seconds[client] for client in group}


class ChargedBefore:
    """Stands for the ledger in a process whose driver keeps it: everyone who is asked has been charged."""

    def reserve(
        self,
        round_index: int,
        mechanism: Mechanism,
        num_steps: int,
        client_ids: Sequence[int],
        task: str | None = None,
    ) -> dict[int, Refusal | None]:
        """Let everyone train."""
        return dict.fromkeys(client_ids)

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Leave it to the driver."""


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    return importlib.import_module("ray")
