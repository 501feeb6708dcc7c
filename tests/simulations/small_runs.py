"""What the simulation tests share: an experiment of a second, its federation, and pools over it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fedlr.config.schema import Experiment, compose_experiment
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.round import RoundRequest, ServerState
from fedlr.runs.directory import LEDGER
from fedlr.runs.selection import Selection
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.progress import Progress
from fedlr.simulations.simulate import leave_behind, run_rounds
from fedlr.training.threads import torch_threads

# What a run without privacy leaves behind; a private one also its ledger.
RUN_FILES = {
    "adapter",
    "asked.yaml",
    "checkpoints",
    "clients.jsonl",
    "config.yaml",
    "metrics.jsonl",
    "partition.json",
    "privacy.json",
    "report.html",
    "summary.json",
    "versions.json",
}

SMALL = (
    "experiment=tiny",
    "data.num_examples=120",
    "data.num_test=24",
    "num_clients=4",
    "cohort_size=3",
    "num_rounds=2",
    "runtime.num_workers=1",
)


def experiment(*overrides: str) -> Experiment:
    return compose_experiment([*SMALL, *overrides])


@cache
def federation(*overrides: str, seed: int = 0) -> Federation:
    with torch_threads(1):
        return assemble(experiment(*overrides), seed=seed)


def quiet(e: Experiment) -> Progress:
    return Progress(e, say=lambda line: None)


def first_task(f: Federation, *, round_index: int = 0) -> RoundRequest:
    return f.request(round_index)


def rounds(f: Federation, folder: Path) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Train a federation and return its adapter's hash and its lines of metrics and of clients, without seconds."""
    folder.mkdir(parents=True)
    ledger = create_ledger(f, folder / LEDGER)
    with torch_threads(1):
        state, *_ = run_rounds(f, folder, ledger=ledger, progress=quiet(f.experiment))
    return state.adapter.fingerprint(), lines(folder / "metrics.jsonl"), lines(folder / "clients.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that ends in a whole line, without their `seconds`."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def open_ledger(path: Path, f: Federation) -> PrivacyLedger:
    return PrivacyLedger.open(path, f.budget, accountant="rdp", dataset_id=f.source, randomness="seeded")


def leave_state_behind(f: Federation, folder: Path, state: ServerState) -> None:
    """Write statement and adapter of a state, as if it were the last of a run."""
    rows = [{"rounds_completed": state.round_index}]
    released = Selection.of(f.experiment, f.task.metric).record(rows, num_rounds=f.experiment.num_rounds)
    leave_behind(f, folder, state, released)
