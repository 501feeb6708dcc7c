"""A federation of processes over TLS: the simulation's numbers, whatever is killed or frozen in between.

Every process is real: SuperLink, proxy, server and devices, as `fedlr federation` starts them, but forked from one that
has imported what they import (`forked.py`). What is killed gets SIGKILL and is started again by the watch, as systemd
would. One file, so that one process of tests waits for all of it while the others compute.
"""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedlr.client.settings import load_settings
from fedlr.config.schema import compose_experiment
from fedlr.errors import ShutOutError
from fedlr.simulations import loopback
from fedlr.simulations.federation_command import LARGEST_DIFFERENCE, adapter_difference
from fedlr.simulations.loopback import PROXY, SERVER, SUPERLINK, Rehearsal
from fedlr.simulations.simulate import simulate
from tests.server import forked

LIVE = ("runtime=superlink", "deployment.rehearsal=true")
THREE = (
    "experiment=tiny",
    "data.num_examples=120",
    "data.num_test=24",
    "num_clients=3",
    "cohort_size=3",
    "runtime.num_workers=1",
)


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with forked.rehearsals():
        yield


@contextmanager
def rehearsed(folder: Path, *overrides: str, spare: float = 1.0) -> Iterator[Rehearsal]:
    words = [*THREE, *overrides]
    with Rehearsal(compose_experiment([*words, *LIVE]), words, folder, say=print, spare=spare) as found:
        yield found


def simulated(folder: Path, *overrides: str) -> Path:
    words = [*THREE, *overrides, f"tracking.output_dir={folder}"]
    return simulate(compose_experiment(words), say=lambda line: None)


def metrics_of(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, less one that the server is in the middle of writing."""
    metrics = rehearsal.run_dir / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rounds_of(rehearsal: Rehearsal) -> list[int]:
    return [row["rounds_completed"] for row in metrics_of(rehearsal)]


def charges(rehearsal: Rehearsal) -> list[int]:
    ledgers = [load_settings(path).open_ledger() for path in rehearsal.settings]
    return [0 if ledger is None else ledger.participations(0) for ledger in ledgers]


def wait_for(rehearsal: Rehearsal, num_rounds: int, *, timeout_s: float = 300.0) -> None:
    """Watch until so many rounds are done."""
    deadline = time.monotonic() + timeout_s
    while num_rounds not in rounds_of(rehearsal):
        assert time.monotonic() < deadline, f"{num_rounds} rounds within {timeout_s} s"
        rehearsal.step()
        time.sleep(0.1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_kills", "num_rounds"),
    [(8, 4), pytest.param(20, 10, marks=pytest.mark.slow), pytest.param(100, 10, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_a_run_ends_with_all_rounds_and_nothing_counted_twice(
    num_kills: int, num_rounds: int, tmp_path: Path
) -> None:
    """Each process at least once: the fast case kills each of the six, and two again."""
    # Every client in every round: an update that was lost or counted twice would show in the adapter.
    words = (
        f"num_rounds={num_rounds}",
        "deployment.min_updates=3",
        "deployment.round_deadline_s=15",
        "deployment.max_attempts=99",
    )
    draw = random.Random(num_kills)
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        names = [SERVER, SUPERLINK, PROXY, *(path.stem for path in rehearsal.settings)]
        killed: Counter[str] = Counter()
        for number in range(num_kills):
            # Spread over the rounds, so that the run is not over before the last.
            wait_for(rehearsal, (number * (num_rounds - 1)) // num_kills)
            time.sleep(draw.uniform(0.0, 2.0))
            name = names[number % len(names)] if number < len(names) else draw.choice(names)
            if rehearsal.processes[name].code is None:
                rehearsal.processes[name].send(signal.SIGKILL)
                killed[name] += 1
            rehearsal.step()
        rehearsal.watch(timeout_s=600)
        assert killed.total() >= num_kills * 0.8 and len(killed) == len(names)
        assert rounds_of(rehearsal) == list(range(num_rounds + 1))
        assert [row["num_trained"] for row in metrics_of(rehearsal)][1:] == [3] * num_rounds
        # Seeded noise: what is computed again is the same to the bit and is charged once, never less than once.
        assert charges(rehearsal) == [num_rounds] * 3
        expected = simulated(tmp_path / "local", f"num_rounds={num_rounds}")
        assert adapter_difference(expected / "adapter", rehearsal.run_dir / "adapter") <= LARGEST_DIFFERENCE


@pytest.mark.timeout(600)
def test_three_runtimes_are_one_experiment(tmp_path: Path) -> None:
    words = ("num_rounds=3",)
    in_process = simulated(tmp_path / "local", *words)
    with_flower = simulated(tmp_path / "flower", *words, "runtime=flower")
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        rehearsal.watch(timeout_s=240)
        for other in (with_flower, rehearsal.run_dir):
            assert adapter_difference(in_process / "adapter", other / "adapter") <= LARGEST_DIFFERENCE
        assert charges(rehearsal) == [3, 3, 3]
        logs = [(rehearsal.logs / f"client-{client}.log").read_text() for client in range(3)]
        assert [log.count("base model") for log in logs] == [1, 1, 1], "loaded once a device"


@pytest.mark.timeout(600)
def test_a_frozen_client_does_not_hold_a_round_and_below_quorum_it_waits_for_them(tmp_path: Path) -> None:
    words = ("num_rounds=4", "deployment.min_updates=2", "deployment.round_deadline_s=12", "deployment.max_attempts=99")
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        wait_for(rehearsal, 1)
        first, second = rehearsal.devices[:2]
        first.send(signal.SIGSTOP)
        wait_for(rehearsal, 2)
        assert metrics_of(rehearsal)[2]["num_trained"] == 2
        second.send(signal.SIGSTOP)
        reached = rounds_of(rehearsal)[-1]
        log = rehearsal.logs / f"{SERVER}.log"
        deadline = time.monotonic() + 120
        while "abandoned" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        # A round that both had answered before they froze may still have ended.
        assert rounds_of(rehearsal)[-1] <= reached + 1
        assert "abandoned" in log.read_text()
        for device in (first, second):
            device.send(signal.SIGCONT)
        rehearsal.watch(timeout_s=240)
        assert rounds_of(rehearsal) == [0, 1, 2, 3, 4]
        a_revoked_device_says_so_and_ends(rehearsal)


def a_revoked_device_says_so_and_ends(rehearsal: Rehearsal) -> None:
    """Raise AssertionError unless a connected device ends in one line, for good, and the others stay."""
    device, *others = rehearsal.devices
    where = ("--superlink", rehearsal.superlink_address, "--superlink-ca", str(rehearsal.keys / "ca.crt"))
    loopback.fedlr("server", "revoke", *where, "--roster", str(rehearsal.keys / "roster.json"), "--name", device.name)
    deadline = time.monotonic() + 120
    while device.code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    log = device.log.read_text()
    assert device.code == ShutOutError.exit_code, log
    assert log.count("its key was revoked") == 1 and "Traceback" not in log and "cannot be reached" not in log
    assert [other.code for other in others] == [None, None]
