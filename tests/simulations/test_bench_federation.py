"""The benchmark of a real federation: what is measured from outside, and that a rival who does nothing is found out.

Mutants this file kills: a round without a client that counts, training that is taken off twice or not at all, a mean of
Flower's that is another, a device that tells no time, updates of another size.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlr.adapters.state import num_bytes
from fedlr.rounds.round import Dropout
from fedlr.simulations.bench import federation
from fedlr.simulations.bench.federation import (
    Rounds,
    TimedRehearsal,
    check_mean,
    exchanged,
    line_times,
    measures,
    overrides,
)
from fedlr.simulations.bench.outcome import BenchmarkFailed
from fedlr.simulations.bench.rivals.flower_fedavg import STEP
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timed_device import TOOK, timed
from fedlr.simulations.rehearsal import Rehearsal


def settings(folder: Path) -> Settings:
    return Settings("tiny", folder, lambda line: None)


def test_what_a_round_costs_is_what_is_left_without_training() -> None:
    mine, theirs = Rounds((2.0, 4.0), (1.0, 1.0), (8, 8), (1, 1, 1)), Rounds((8.0, 8.0), (0.0, 0.0))
    found = {measure.key: measure.values for measure in measures(mine, theirs, 8)}
    assert found["federation-overhead"] == (1.0, 3.0) and found["federation-flower"] == (8.0, 8.0)
    assert found["federation-ratio"] == (0.25,) and found["federation-loads"] == (1.0, 1.0, 1.0)


def test_the_arrays_are_those_that_a_client_sends(tmp_path: Path) -> None:
    arrays = exchanged(overrides(settings(tmp_path), num_rounds=2))
    assert len(arrays) == 8 and num_bytes(arrays.values()) == 8 * 4 * 32 * 4  # 2 layers, q and v, A and B, rank 4


def test_a_mean_that_is_another_is_seen() -> None:
    start = {"a": torch.zeros(3), "b": torch.ones(2)}
    moved = {name: tensor + 2 * STEP * 2 for name, tensor in start.items()}  # two rounds, the mean of 1, 2 and 3
    assert check_mean(start, moved, num_rounds=2).difference < 1e-6
    for wrong in (start, {"a": moved["a"]}, {**moved, "b": moved["b"] + STEP}):
        with pytest.raises(BenchmarkFailed):
            check_mean(start, wrong, num_rounds=2)


def test_a_device_tells_how_long_it_trained(capfd: pytest.CaptureFixture[str]) -> None:
    task: Any = None
    lost = Dropout(7, "rejected", "for a test")
    assert list(timed(lambda pool, task, cohort: iter([lost]))(None, task, [7])) == [lost]
    (seconds,) = federation.training_times(f"client-0: connected\n{capfd.readouterr().out}")
    assert 0 <= seconds < 10


def test_only_devices_are_started_as_timed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(Rehearsal, "_launch", lambda self, name, command: started.append(list(command)))
    for command in (["python", "-m", "fedlr", "client", "run", "c.yaml"], ["python", "-m", "fedlr", "server", "run"]):
        TimedRehearsal.__new__(TimedRehearsal)._launch("name", command)
    assert started == [["python", "-m", "fedlr.simulations.bench.timed_device", "c.yaml"], command]


def test_lines_are_timed_as_they_come(tmp_path: Path) -> None:
    lines = iter(["one\n", "", "two\nthree\n"])

    def step() -> bool:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(next(lines))
        return False

    rehearsal: Any = SimpleNamespace(run_dir=tmp_path, step=step)
    first, second, third = line_times(rehearsal, 3)
    assert first < second == third


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_federations_run_and_do_the_same_work(tmp_path: Path) -> None:
    outcome = federation.run(settings(tmp_path))
    found = {measure.key: measure.values for measure in outcome.measures}
    assert found["federation-loads"] == (1.0, 1.0, 1.0)
    assert found["federation-overhead"][0] > 0 and found["federation-flower"][0] > 0
    assert outcome.checks[0].difference <= outcome.checks[0].tolerance
    rows = [json.loads(line) for line in (tmp_path / "ours" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_trained"] for row in rows] == [0, 3, 3]
    assert TOOK in (tmp_path / "ours" / "logs" / "client-2.log").read_text()
