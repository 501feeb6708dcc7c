"""A federation of a second in this process: real devices behind a grid that is no network."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlr.client.device import Device
from fedlr.client.settings import load_settings
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.server.pool import GridPool
from fedlr.server.run import Run
from fedlr.simulations.devices import write_devices
from tests.server.direct_grid import DirectGrid

SMALL = (
    "experiment=tiny",
    "data.num_examples=120",
    "data.num_test=24",
    "num_clients=4",
    "cohort_size=3",
    "num_rounds=3",
    "runtime.num_workers=1",
)


MADE: list["Federation"] = []


def close_all() -> None:
    """End the threads of every device."""
    while MADE:
        for device in MADE.pop().devices:
            device.close()


def experiment(*overrides: str) -> Experiment:
    return compose_experiment([*SMALL, "runtime=flower", *overrides])


@dataclass
class Federation:
    """Devices of an experiment, each with its folder; `start` gives a new server over the same directory."""

    experiment: Experiment
    folder: Path
    spare: float = 1.0
    deadline_s: float = 0.2
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        MADE.append(self)
        self.folder.mkdir(exist_ok=True)
        authority = self.folder / "ca.crt"
        authority.write_text("")
        assert self.experiment.seed is not None
        self.files = write_devices(
            self.experiment,
            self.folder / "devices",
            seed=self.experiment.seed,
            address="127.0.0.1:1",
            root_certificates=authority,
            spare=self.spare,
        )
        self.devices = [self.device(client) for client in range(len(self.files))]
        self.grid = DirectGrid({client: device.answer for client, device in enumerate(self.devices)})

    def device(self, client: int) -> Device:
        """Return a client's device as it is after a restart."""
        return Device(load_settings(self.files[client]), say=self.said.append)

    def restart(self, client: int) -> Device:
        self.devices[client].close()
        self.devices[client] = self.device(client)
        self.grid.answers[client] = self.devices[client].answer
        return self.devices[client]

    def start(self, name: str = "run") -> Run:
        return Run(self.experiment, self.folder / name, say=self.said.append)

    def pool(self, run: Run) -> GridPool:
        e = self.experiment
        return GridPool(
            self.grid,
            self.grid,
            terms=run.served.terms,
            enrolled=run.served.start.adapter,
            deadline_s=self.deadline_s,
            quorum=e.deployment.min_updates,
            poll_s=0.001,
            say=self.said.append,
            reports=run.progress.reports,
        )

    def finish(self, name: str = "run") -> Run:
        run = self.start(name)
        run.rounds(self.pool(run))
        return run

    def charges(self) -> list[int]:
        """Return for how many rounds each device was charged."""
        ledgers = [load_settings(path).open_ledger() for path in self.files]
        return [0 if ledger is None else ledger.participations(0) for ledger in ledgers]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def difference(one: Any, other: Any) -> float:
    """Return the largest difference of any number of two states of a server."""
    pairs = [(one.adapter.tensors[slot], tensor) for slot, tensor in other.adapter.tensors.items()]
    sides = one.adapter.side, other.adapter.side
    assert sides[0].keys() == sides[1].keys()
    pairs += [(part.lora_B @ part.lora_A, sides[1][p].lora_B @ sides[1][p].lora_A) for p, part in sides[0].items()]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
