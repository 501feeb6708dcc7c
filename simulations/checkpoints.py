"""Where an arm of a run stands, on disk: written every few rounds, and found again when the run goes on.

A checkpoint holds the state, what the clients keep, the ledger's head, and what the run was made of, so that nothing
else is taken for it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlr.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fedlr.errors import InputError
from fedlr.experiment import Experiment
from fedlr.pools.kept import Kept
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds import ServerState
from fedlr.run_dir import CHECKPOINTS, CLIENTS, METRICS, cut_lines, sync_file, versions
from simulations.federation import Federation


class Checkpoints:
    """The checkpoints of one arm, in its folder, and the lines that belong to them."""

    def __init__(self, federation: Federation, folder: Path, ledger: PrivacyLedger | None) -> None:
        self._folder, self._ledger = folder, ledger
        self._every, self._num_rounds = (
            federation.experiment.tracking.checkpoint_every,
            federation.experiment.num_rounds,
        )
        self._about = {**about_experiment(federation.experiment), **about_federation(federation)}
        self._started, self.seconds_before = time.perf_counter(), 0.0
        self.metrics: list[dict[str, Any]] = []  # of the rounds so far
        self.clients: list[dict[str, Any]] = []

    def take_up(self, *, say: Callable[[str], None]) -> Checkpoint | None:
        """Return where the arm stands, None at its start, and cut off the lines of later rounds.

        Raises:
            InputError: the checkpoint is of another run, the ledger is older than it, or lines are missing.
        """
        found = latest_checkpoint(self._folder / CHECKPOINTS, say=say)
        num_rounds = found.state.round_index if found else 0
        if found:
            require_same(found.facts, self._about)
            if self._ledger:
                self._ledger.require(found.facts["ledger_head"])
            self.seconds_before = found.facts["seconds"]
        before = num_rounds + 1 if found else 0
        self.metrics = cut_lines(self._folder / METRICS, lambda row: row["rounds_completed"] < before)
        self.clients = cut_lines(self._folder / CLIENTS, lambda row: row["round_index"] < num_rounds)
        for name, rows in ((METRICS, self.metrics), (CLIENTS, self.clients)):
            if found and len(rows) != found.facts["num_lines"][name]:
                raise InputError(
                    f"Expected {found.facts['num_lines'][name]} lines of {num_rounds} rounds in {self._folder / name}, "
                    f"got {len(rows)}: lines were lost or changed, so the run cannot go on"
                )
        return found

    def save(self, state: ServerState, kept: Kept, *, num_lines: Mapping[str, int]) -> None:
        """Write a checkpoint if it is time for one: at the start, every few rounds, and at the end.

        Raises:
            InputError: the disk is full or cannot be written; what was there is whole.
        """
        number = state.round_index
        if self._every is None or (number % self._every and number != self._num_rounds):
            return
        for name in (METRICS, CLIENTS):
            sync_file(self._folder / name)  # before the checkpoint that counts their lines
        facts = {
            **self._about,
            "ledger_head": self._ledger.head() if self._ledger else None,
            "num_lines": dict(num_lines),
            "seconds": self.seconds(),
        }
        save_checkpoint(self._folder / CHECKPOINTS, state, facts, more=kept.tensors())

    def seconds(self) -> float:
        """Return how long the arm has run, the time before it went on included."""
        return self.seconds_before + time.perf_counter() - self._started


def about_experiment(experiment: Experiment) -> dict[str, Any]:
    """Return what a run is made of, as far as it is known before anything is loaded."""
    text = json.dumps(experiment.resolved(), sort_keys=True)
    return {"config_sha256": hashlib.sha256(text.encode()).hexdigest(), "versions": versions()}


def about_federation(federation: Federation) -> dict[str, Any]:
    """Return what else a run is made of."""
    return {
        "seed": federation.seed,
        "base_sha256": federation.base.fingerprint,
        "data_sha256": federation.data_sha256,
        "start_sha256": federation.start.adapter.fingerprint(),
        "private": federation.mechanism is not None,
    }


WHAT = {
    "config_sha256": "config.yaml as it was when the run began",
    "seed": "the seed of the run",
    "base_sha256": "the base model of the run",
    "data_sha256": "the examples of the run",
    "start_sha256": "the adapter that the run began with",
    "private": "the arm that the checkpoint is of",
}


def require_same(facts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse to go on with something else than what a run was made of.

    Raises:
        InputError: which names it.
    """
    for name, found in (about.get("versions") or {}).items():
        if facts["versions"].get(name) != found:
            raise InputError(
                f"Expected {name} {facts['versions'].get(name)} as when the run began, got {found}: a run goes on with "
                "the same versions only; install them, or start it anew"
            )
    for key, found in about.items():
        if key != "versions" and facts[key] != found:
            raise InputError(
                f"Expected {WHAT[key]} ({facts[key]!s:.16}), got another ({found!s:.16}); start the run anew"
            )
