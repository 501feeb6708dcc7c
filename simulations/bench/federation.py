"""A steady round of a real federation on this machine, against Flower's own FedAvg of the same arrays.

Ours: SuperLink with TLS, node keys and a SQLite file, our proxy, three devices, our server; each device takes one
private step on a few short texts with the base model that it holds. The rival: Flower's SuperLink, SuperNodes and
FedAvg, by its own commands, with TLS, keys and SQLite, too; its clients train nothing and load no model. A round is
timed from the end of the one before to its own end, evaluation, files and checkpoint included, and what the slowest
device trained is taken off.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from fedlr.adapters.state import AdapterState, num_bytes
from fedlr.config.schema import compose_experiment
from fedlr.simulations.bench.federations import FIRST_TOKEN
from fedlr.simulations.bench.outcome import BenchmarkFailed, Check, Measure, Outcome
from fedlr.simulations.bench.rivals.flower_deployment import fedavg
from fedlr.simulations.bench.rivals.flower_fedavg import STEP
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timed_device import TOOK
from fedlr.simulations.bench.worker import by_name
from fedlr.simulations.federation import assemble
from fedlr.simulations.rehearsal import Rehearsal

NUM_CLIENTS = 3
LONGEST_S = 600.0
POLL_S = 0.01
TOLERANCE = 1e-5
LOADED = "base model"  # in a device's log


@dataclass(frozen=True)
class Rounds:
    """Steady rounds, those after the first: seconds of each, and what of it the slowest device trained."""

    wall_s: tuple[float, ...]
    train_s: tuple[float, ...]
    bytes_up: tuple[int, ...] = ()  # of one client
    num_loads: tuple[int, ...] = ()  # of the base model, by device

    @property
    def overhead_s(self) -> tuple[float, ...]:
        """Seconds of each round besides training."""
        return tuple(wall - train for wall, train in zip(self.wall_s, self.train_s, strict=True))


class TimedRehearsal(Rehearsal):
    """A federation whose devices tell how long they trained."""

    def _launch(self, name: str, command: Sequence[str]) -> None:
        timed = ("-m", "fedlr.simulations.bench.timed_device")
        ours = [command[0], *timed, *command[5:]] if list(command[1:5]) == ["-m", "fedlr", "client", "run"] else command
        super()._launch(name, ours)


def run(settings: Settings) -> Outcome:
    """Run ours, then the rival, over the same arrays."""
    num_rounds = settings.pick(tiny=2, quick=5, full=11)
    words = overrides(settings, num_rounds=num_rounds)
    arrays = exchanged(words)
    size = num_bytes(arrays.values())
    settings.say(f"  {len(arrays)} arrays, {size / 1e6:.2f} MB; load average {os.getloadavg()[0]:.1f}")
    load, before = [os.getloadavg()[0]], time.monotonic()
    mine = ours(words, settings.scratch / "ours", num_rounds=num_rounds)
    load.append(os.getloadavg()[0])
    settings.say(f"  ours: {told(mine)}   ({time.monotonic() - before:.0f} s, load average {load[1]:.1f})")
    if set(mine.bytes_up) != {size}:
        raise BenchmarkFailed(f"Expected updates of {size} bytes a client, got {sorted(set(mine.bytes_up))}")
    before = time.monotonic()
    wall_s, mean = fedavg(arrays, settings.scratch / "flower", num_clients=NUM_CLIENTS, num_rounds=num_rounds)
    theirs = Rounds(tuple(wall_s), (0.0,) * len(wall_s))
    load.append(os.getloadavg()[0])
    settings.say(f"  Flower: {told(theirs)}   ({time.monotonic() - before:.0f} s, load average {load[2]:.1f})")
    check = check_mean(arrays, mean, num_rounds=num_rounds)
    setting = {
        "clients": NUM_CLIENTS,
        "arrays": len(arrays),
        "bytes": size,
        "overrides": words,
        "load_average": load,  # before, between, after
        "clock": "wall, from the end of a round to the end of the next",
    }
    raw = {"ours": mine.__dict__, "Flower": theirs.__dict__}
    return Outcome("federation", measures(mine, theirs, size), (check,), setting, raw)


def measures(ours: Rounds, theirs: Rounds, size: int) -> tuple[Measure, ...]:
    """Return what is shown."""
    of = f"round of {NUM_CLIENTS} devices over TLS, {size / 1e6:.1f} MB each"
    ratio = fmean(ours.overhead_s) / fmean(theirs.overhead_s)
    return (
        Measure("federation-overhead", f"{of}: seconds besides training", ours.overhead_s, " s"),
        Measure("federation-ratio", "the same / Flower's FedAvg of the same arrays, means", (ratio,)),
        Measure("federation-loads", "loads of the base model, a device", tuple(map(float, ours.num_loads))),
        Measure("federation-flower", f"{of}: seconds of Flower's FedAvg, nothing trained", theirs.overhead_s, " s"),
        Measure("federation-train", f"{of}: seconds of training, slowest device", ours.train_s, " s"),
    )


def told(rounds: Rounds) -> str:
    """Return one line for the eye."""
    loads = f", base model loaded {max(rounds.num_loads)} time(s) a device" if rounds.num_loads else ""
    return f"{fmean(rounds.overhead_s):.2f} s a round besides {fmean(rounds.train_s):.2f} s of training{loads}"


def overrides(settings: Settings, *, num_rounds: int) -> list[str]:
    """Return the federation: FedAvg of both factors, 1.5 MB of them, one private step on a few short made-up texts."""
    toy = ["model=tiny", "adapter.rank=4", "adapter.lora_alpha=4"]
    real = ["model=minilm", *FIRST_TOKEN, "adapter.rank=41", "adapter.lora_alpha=41"]
    return [
        *settings.pick(tiny=toy, quick=real, full=real),
        "name=bench",
        "data=synthetic",
        "data.num_examples=68",
        "data.num_test=8",
        "method=fedit",
        "adapter.train_head=false",
        "partition=iid",
        f"seed={settings.seed}",
        f"num_clients={NUM_CLIENTS}",
        f"cohort_size={NUM_CLIENTS}",
        f"num_rounds={num_rounds}",
        "privacy.epsilon=1e6",
        "privacy.noise_multiplier=1.0",
        "privacy.accountant=rdp",
        "trainer.num_steps=1",
        "trainer.sample_rate=0.1",
        "trainer.divisor=2",
        f"deployment.min_updates={NUM_CLIENTS}",
        "deployment.rehearsal=true",
        "runtime.num_workers=1",
    ]


def exchanged(words: Sequence[str]) -> dict[str, Tensor]:
    """Return what a client of the first round trains and sends, by name: the arrays of the rival."""
    federation = assemble(compose_experiment([*words, "runtime=local"]), seed=0)
    start: AdapterState = federation.start.adapter
    return by_name(start.select(federation.request().block))


def ours(words: Sequence[str], folder: Path, *, num_rounds: int) -> Rounds:
    """Run our federation and time it from outside, by the lines of its metrics.

    Raises:
        BenchmarkFailed: a client is missing in a round.
    """
    experiment = compose_experiment([*words, "runtime=superlink"])
    with TimedRehearsal(experiment, words, folder, say=lambda line: None) as rehearsal:
        ends = list(line_times(rehearsal, num_rounds + 1))[1:]  # the first line is the start
        rehearsal.watch(timeout_s=LONGEST_S)
        logs = [(rehearsal.logs / f"client-{client}.log").read_text() for client in range(NUM_CLIENTS)]
    rows = [json.loads(line) for line in (rehearsal.run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    if lost := [row["rounds_completed"] for row in rows if row["num_trained"] != NUM_CLIENTS]:
        raise BenchmarkFailed(f"Expected {NUM_CLIENTS} clients in every round, got fewer in {lost}")
    trained = [training_times(log) for log in logs]
    if any(len(times) != num_rounds for times in trained):
        raise BenchmarkFailed(f"Expected every device to train {num_rounds} times, got {list(map(len, trained))}")
    return Rounds(
        wall_s=tuple(after - before for before, after in zip(ends, ends[1:], strict=False)),
        train_s=tuple(max(times) for times in zip(*trained, strict=True))[1:],
        bytes_up=tuple(row["bytes_up"] // NUM_CLIENTS for row in rows[1:]),
        num_loads=tuple(log.count(LOADED) for log in logs),
    )


def line_times(rehearsal: Rehearsal, num_lines: int) -> Iterator[float]:
    """Yield when each line of the metrics was there.

    Raises:
        BenchmarkFailed: one did not come.
    """
    metrics, deadline, seen = rehearsal.run_dir / "metrics.jsonl", time.monotonic() + LONGEST_S, 0
    while True:
        found = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        yield from [time.monotonic()] * (found - seen)
        seen = found
        if seen >= num_lines:
            return
        rehearsal.step()
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"Expected {num_lines} lines of metrics in {LONGEST_S:g} s, got {seen}")
        time.sleep(POLL_S)


def training_times(log: str) -> list[float]:
    """Return the seconds that a device says it trained, by round.

    >>> training_times("client-0: connected\\ntrained in seconds: 0.25\\nclient-0: round 0 of bench: trained")
    [0.25]
    """
    return [float(line.removeprefix(TOOK)) for line in log.splitlines() if line.startswith(TOOK)]


def check_mean(start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, num_rounds: int) -> Check:
    """Compare what Flower's FedAvg ended with, and what is known beforehand.

    Raises:
        BenchmarkFailed: other arrays, or another mean: the rival did not do its work.
    """
    moved = num_rounds * STEP * fmean(range(1, NUM_CLIENTS + 1))
    if start.keys() != end.keys():
        raise BenchmarkFailed(f"Expected {len(start)} arrays of Flower's FedAvg, got {len(end)}")
    difference = max(float((end[name] - start[name] - moved).abs().max()) for name in start)
    if not difference <= TOLERANCE:
        raise BenchmarkFailed(f"Expected Flower's mean to have moved by {moved:g}, got {difference:.1e} off")
    return Check("Flower's mean of the clients' arrays, and its known value", difference, TOLERANCE)
