"""A federation of processes over TLS, as `fedlr federation` starts them: SuperLink, proxy, server and devices.

Its tests mostly wait, and each has a file of its own, so that they can wait side by side.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.settings import load_settings
from fedlr.config.schema import compose_experiment
from simulations.rehearsal import Rehearsal
from simulations.simulate import simulate
from tests.server.whole_federation import lines

LIVE = ("runtime=superlink", "deployment.rehearsal=true")
THREE = (
    "experiment=tiny",
    "data.num_examples=120",
    "data.num_test=24",
    "num_clients=3",
    "cohort_size=3",
    "runtime.num_workers=1",
)


@contextmanager
def rehearsed(folder: Path, *overrides: str, spare: float = 1.0) -> Iterator[Rehearsal]:
    words = [*THREE, *overrides]
    with Rehearsal(compose_experiment([*words, *LIVE]), words, folder, say=print, spare=spare) as found:
        yield found


def simulated(folder: Path, *overrides: str) -> Path:
    words = [*THREE, *overrides, f"tracking.output_dir={folder}"]
    return simulate(compose_experiment(words), say=lambda line: None)


def rounds_of(rehearsal: Rehearsal) -> list[int]:
    return [row["rounds_completed"] for row in lines(rehearsal.run_dir / "metrics.jsonl")]


def charges(rehearsal: Rehearsal) -> list[int]:
    ledgers = [load_settings(path).open_ledger() for path in rehearsal.settings]
    return [0 if ledger is None else ledger.participations(0) for ledger in ledgers]


def wait_for(rehearsal: Rehearsal, num_rounds: int, *, timeout_s: float = 300.0) -> None:
    """Watch until so many rounds are done."""
    deadline, metrics = time.monotonic() + timeout_s, rehearsal.run_dir / "metrics.jsonl"
    while not (metrics.exists() and rounds_of(rehearsal)[-1] >= num_rounds):
        assert time.monotonic() < deadline, f"{num_rounds} rounds within {timeout_s} s"
        rehearsal.step()
        time.sleep(0.1)
