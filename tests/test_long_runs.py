"""Clients that drop out, and runs of hundreds of rounds: neither stops a run, moves its end far, or grows without end.

Over three seeds on made-up text: 0.5733 with everybody, 0.5866 with dropout (2.3 %; the worst seed 5.6 %). A round grew
by 0.1 kB and by no file or thread.
"""

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedlr.adapters.state import ClientUpdate
from fedlr.rounds.round import Dropout, RoundRequest, ServerState, federated_rounds
from fedlr.simulations.choosing import evaluator_of
from fedlr.simulations.federation import Federation
from fedlr.simulations.runtime import pool_here
from tests.simulations.small_runs import federation

WORDS = (
    "privacy=none",
    "method=fedavg",
    "num_clients=20",
    "cohort_size=20",
    "num_rounds=50",
    "data.num_examples=480",
    "data.num_test=120",
    "adapter.train_head=true",
    "trainer.divisor=4",
)
CHANCE, BURST, OF_BURST = 0.3, 20, 0.8


class DroppingOut:
    """A pool of which a share of the cohort never answers."""

    def __init__(self, pool: object, seed: int, *, chance: float) -> None:
        self._pool, self._draws, self._chance = pool, np.random.default_rng(seed), chance
        self.num_left_out = 0

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        chance = OF_BURST if task.round_index == BURST and self._chance else self._chance
        is_out = self._draws.random(len(cohort)) < chance
        self.num_left_out += int(is_out.sum())
        yield from (Dropout(client, "rejected", "no answer") for client, out in zip(cohort, is_out, strict=True) if out)
        yield from self._pool.train(task, [c for c, out in zip(cohort, is_out, strict=True) if not out])  # type: ignore[attr-defined]


def rounds(f: Federation, pool: object, num_rounds: int) -> Iterator[ServerState]:
    e = f.experiment
    for state, _ in federated_rounds(
        f.start,
        pool=pool,  # type: ignore[arg-type]
        method=f.method,
        num_rounds=num_rounds,
        num_clients=e.num_clients,
        cohort_size=e.cohort_size,
        max_participations=num_rounds,
        seed=f.seed,
        train_head=e.adapter.train_head,
    ):
        yield state


@pytest.mark.slow
def test_a_third_of_the_clients_missing_moves_the_loss_after_fifty_rounds_by_little() -> None:
    losses: dict[float, list[float]] = {0.0: [], CHANCE: []}
    starts: list[float] = []
    for seed in range(3):
        f = federation(*WORDS, seed=seed)
        evaluator = evaluator_of(f)
        start = evaluator.score(f.start)[0].loss
        starts.append(start)
        for chance, found in losses.items():
            pool = DroppingOut(pool_here(f, None), seed, chance=chance)
            *_, last = rounds(f, pool, 50)
            assert last.round_index == 50 and (pool.num_left_out > 200) is (chance > 0)
            found.append(evaluator.score(last)[0].loss)
        print(f"seed {seed}: loss {start:.4f} at first, {losses[0.0][-1]:.4f}, {losses[CHANCE][-1]:.4f} with dropout")
    assert np.mean(losses[0.0]) < 0.9 * np.mean(starts)  # it learns
    assert np.mean(losses[CHANCE]) == pytest.approx(np.mean(losses[0.0]), rel=0.05)


def usage() -> tuple[float, int, int]:
    """Resident memory in MB, open files, and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.slow
def test_five_hundred_rounds_grow_in_nothing() -> None:
    f = federation("privacy=none", "method=fedavg", "num_rounds=500", "data.num_examples=120")
    found = []
    for state in rounds(f, pool_here(f, None), 500):
        if state.round_index % 10 == 0:
            gc.collect()
            found.append(usage())
    at = 10 * np.arange(1, len(found) + 1)
    memory, files, threads = np.array(found, dtype=float).T
    after = at > 100  # libraries fill their caches first
    slopes = [float(np.polyfit(at[after], numbers[after], 1)[0]) for numbers in (memory, files, threads)]
    print(f"a round: {1000 * slopes[0]:.1f} kB, {slopes[1]:.2g} files, {slopes[2]:.2g} threads")
    assert slopes[0] < 0.1 and abs(slopes[1]) < 1e-3 and abs(slopes[2]) < 1e-3
