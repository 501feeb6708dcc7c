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

from pydantic import ValidationError

from fedlr.adapters.state import AdapterState
from fedlr.config.schema import Experiment, Section
from fedlr.errors import InputError
from fedlr.errors.messages import first_problem
from fedlr.files import sync_file
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.round import ServerState
from fedlr.runs.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fedlr.runs.directory import CHECKPOINTS, CLIENTS, METRICS, cut_lines, versions
from fedlr.simulations.all_runs import open_all_runs, require_charge
from fedlr.simulations.choosing import Chooser
from fedlr.simulations.federation import Federation


class Checkpoints:
    """The checkpoints of one arm, in its folder, and the lines that belong to them."""

    def __init__(
        self,
        federation: Federation,
        folder: Path,
        ledger: PrivacyLedger | None,
        server_ledger: PrivacyLedger | None = None,
    ) -> None:
        self._folder, self._ledger, self._server_ledger = folder, ledger, server_ledger
        self._all_runs = open_all_runs(federation)
        self._start = federation.start.adapter
        self._is_fixed = not federation.method.dynamic_ranks
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
            check_facts(found, self._folder)
            check_state(
                found.state, self._start, path=self._folder, num_rounds=self._num_rounds, is_fixed=self._is_fixed
            )
            require_same(found.facts, self._about)
            if self._ledger:
                self._ledger.require(found.facts["ledger_head"])
            if self._server_ledger:
                self._server_ledger.require(found.facts["server_ledger_head"])
            require_charge(self._all_runs, found.facts.get("all_runs_head"))
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
        from fedlr.runs.report.run_files import check_rows  # loads a library of pictures, too slow for a start

        check_rows(self.metrics, self.clients, where=str(self._folder))
        return found

    def save(self, state: ServerState, kept: Kept, chooser: Chooser, *, num_lines: Mapping[str, int]) -> None:
        """Write a checkpoint if it is time for one: at the start, every few rounds, and at the end.

        Raises:
            InputError: the disk is full or cannot be written; what was there is whole.
        """
        number = state.round_index
        if self._every is None or (number % self._every and not chooser.is_over):
            return
        for name in (METRICS, CLIENTS):
            sync_file(self._folder / name)  # before the checkpoint that counts their lines
        facts = {
            **self._about,
            "ledger_head": self._ledger.head() if self._ledger else None,
            "num_lines": dict(num_lines),
            "seconds": self.seconds(),
            **chooser.facts(),
        }
        if self._server_ledger:
            facts["server_ledger_head"] = self._server_ledger.head()
        if self._all_runs:
            facts["all_runs_head"] = self._all_runs.head()
        more = {**kept.tensors(), **chooser.tensors()}
        save_checkpoint(self._folder / CHECKPOINTS, state, facts, more=more)

    def seconds(self) -> float:
        """Return how long the arm has run, the time before it went on included."""
        return self.seconds_before + time.perf_counter() - self._started


class _Best(Section):
    """What `Chooser.facts` says of the best model so far."""

    round_index: int
    scale: float
    sha256: str


class _Facts(Section):
    """What `Checkpoints.save` writes beside a state."""

    config_sha256: str
    versions: dict[str, str | None]
    seed: int
    base_sha256: str
    data_sha256: str
    start_sha256: str
    private: bool
    ledger_head: str | None
    client_unit: bool = False
    server_ledger_head: str | None = None
    all_runs_head: str | None = None
    num_lines: dict[str, int]
    seconds: float
    best: _Best | None = None


def check_facts(checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse facts of another form than are written: somebody changed them, and what they are hashed with.

    Raises:
        InputError: which names the first.
    """
    try:
        facts = _Facts.model_validate(dict(checkpoint.facts))
    except ValidationError as error:
        problem = first_problem(error, dict(checkpoint.facts), prefix="facts")
        raise InputError(f"Expected the facts of a run in {folder / CHECKPOINTS}: {problem}") from error
    if not {METRICS, CLIENTS} <= set(facts.num_lines) or facts.private is (facts.ledger_head is None):
        raise InputError(f"Expected num_lines of both files, and a ledger_head with privacy, in {folder / CHECKPOINTS}")
    if facts.client_unit is (facts.server_ledger_head is None):
        raise InputError(f"Expected a server_ledger_head exactly with the client unit in {folder / CHECKPOINTS}")


def check_state(state: ServerState, start: AdapterState, *, path: Path, num_rounds: int, is_fixed: bool) -> None:
    """Refuse the state of another adapter than the run began with.

    Raises:
        InputError: its slots, or their shapes, are others; or its round is none of the run.
    """
    shapes = [{slot: tensor.shape for slot, tensor in one.tensors.items()} for one in (state.adapter, start)]
    same = shapes[0] == shapes[1] if is_fixed else set(shapes[0]) == set(shapes[1])
    if not same or not 0 <= state.round_index <= num_rounds:
        raise InputError(
            f"Expected the adapter that the run began with in {path / CHECKPOINTS}, after at most {num_rounds} rounds, "
            f"got one of {len(shapes[0])} tensors after {state.round_index}"
        )


def about_experiment(experiment: Experiment) -> dict[str, Any]:
    """Return what a run is made of, as far as it is known before anything is loaded."""
    text = json.dumps(experiment.resolved(), sort_keys=True)
    return {"config_sha256": hashlib.sha256(text.encode()).hexdigest(), "versions": versions()}


def about_federation(federation: Federation) -> dict[str, Any]:
    """Return what else a run is made of."""
    of_clients = {"client_unit": True} if federation.client_mechanism is not None else {}
    return {
        "seed": federation.seed,
        "base_sha256": federation.base.fingerprint,
        "data_sha256": federation.data_sha256,
        "start_sha256": federation.start.adapter.fingerprint(),
        "private": federation.mechanism is not None,
        **of_clients,
    }


WHAT = {
    "config_sha256": "config.yaml as it was when the run began",
    "seed": "the seed of the run",
    "base_sha256": "the base model of the run",
    "data_sha256": "the examples of the run",
    "start_sha256": "the adapter that the run began with",
    "private": "the arm that the checkpoint is of",
    "client_unit": "the arm that the checkpoint is of",
}


def require_same(facts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse to go on with something else than what a run was made of.

    Raises:
        InputError: which names it.
    """
    for name, found in (about.get("versions") or {}).items():
        before = facts["versions"].get(name)
        if before != found:
            raise InputError(
                f"Expected {name} {before} as when the run began, got {found}: a run goes on with "
                "the same versions only; install them, or start it anew"
            )
    for key, found in about.items():
        if key != "versions" and facts.get(key) != found:
            raise InputError(
                f"Expected {WHAT[key]} ({facts.get(key)!s:.16}), got another ({found!s:.16}); start the run anew"
            )
