"""The model that an arm of a run releases, found while it trains, and what an arm that stops early is charged.

Which one it is follows from the lines of metrics.jsonl alone (`fedlr.runs.selection`); its tensors are kept here, and
in every checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlr.adapters.state import SIDE_A, SIDE_B, AdapterState, LoraFactors, Slot, side_tensors
from fedlr.errors import InputError
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.cohorts import cohorts, cyclic_cohort
from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.round import ServerState, scored
from fedlr.runs.checkpoint import Checkpoint, reading_facts
from fedlr.runs.recorder import is_scored
from fedlr.runs.selection import BEST, VALIDATION, Selection
from fedlr.simulations.federation import Federation
from fedlr.tasks.evaluation import Evaluation

TENSORS, SIDE = "best", "best-side"  # in a checkpoint


@dataclass(frozen=True)
class Scored:
    """What is known of a state before its line is written."""

    evaluation: Evaluation | None  # None: it is not scored
    validation: Mapping[str, float | None] | None
    seconds: float
    is_best: bool  # so far
    is_over: bool  # the arm ends here


class Chooser:
    """Scores the states of one arm, keeps the one that it would release, and says when it stops.

    Args:
        federation: the arm.
        rows: its lines of metrics.jsonl, which the caller adds to.
    """

    def __init__(self, federation: Federation, rows: Sequence[Mapping[str, Any]]) -> None:
        self._federation, self._rows = federation, rows
        self._selection = Selection.of(federation.experiment, federation.task.metric)
        self._test = evaluator_of(federation)
        validation = federation.validation
        self._validation = None if validation is None else evaluator_of(replace(federation, test=validation))
        self._best: ServerState | None = None

    def score(self, state: ServerState, *, personal: Sequence[Mapping[Slot, Tensor]]) -> Scored:
        """Score a state if it is one of those that are, and keep it if it is the best so far."""
        e, number = self._federation.experiment, state.round_index
        if not is_scored(number, every=e.tracking.evaluate_every, num_rounds=e.num_rounds):
            return Scored(None, None, 0.0, is_best=False, is_over=False)
        told = scored(state)
        evaluation, seconds = self._test.score(told, personal=personal)
        if not self._selection.is_active:
            return Scored(evaluation, None, seconds, is_best=False, is_over=number == e.num_rounds)
        on_validation = evaluation
        if self._validation is not None:  # else all scores are of validation rows
            on_validation, more_s = self._validation.score(told, personal=personal)
            seconds += more_s
        validation = self._selection.line(on_validation)
        row = {"rounds_completed": number, VALIDATION: validation}
        is_best = self._selection.best([*self._rows, row]) is row
        if is_best and self._selection.release == BEST:
            self._best = replace(told, adapter=replace(told.adapter, memory={}))
        is_over = number == e.num_rounds or self._selection.is_over([*self._rows, row])
        return Scored(evaluation, validation, seconds, is_best=is_best, is_over=is_over)

    @property
    def is_over(self) -> bool:
        """Whether the lines so far are all that there will be."""
        num_rounds = self._federation.experiment.num_rounds
        return bool(self._rows) and (
            self._rows[-1]["rounds_completed"] == num_rounds or self._selection.is_over(self._rows)
        )

    def released(self, state: ServerState) -> ServerState:
        """Return what the arm leaves behind: the best model so far, else what is scored of its last state."""
        return scored(state) if self._best is None else self._best

    def tensors(self) -> dict[str, Mapping[Slot, Tensor]]:
        """Return the best model for a checkpoint; nothing where none is kept."""
        if self._best is None:
            return {}
        return {TENSORS: self._best.adapter.tensors, SIDE: side_tensors(self._best.adapter.side)}

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint says of the best model; nothing where none is kept."""
        if self._best is None:
            return {}
        adapter = self._best.adapter
        about = {"round_index": self._best.round_index, "scale": adapter.scale, "sha256": adapter.fingerprint()}
        return {"best": about}

    def take_back(self, checkpoint: Checkpoint, *, where: Path) -> None:
        """Take back what a checkpoint has of the best model.

        Raises:
            InputError: it is not the one of the lines.
        """
        about: Mapping[str, Any] = checkpoint.facts.get("best") or {}
        row = self._selection.best(self._rows)
        if self._selection.release != BEST or (not about and row is None):
            return
        found = None
        with reading_facts(where):
            if about and row is not None and about["round_index"] == row["rounds_completed"]:
                side = checkpoint.more[SIDE]
                paths = sorted({slot.path for slot in side})
                layers = {path: LoraFactors(side[Slot(path, SIDE_A)], side[Slot(path, SIDE_B)]) for path in paths}
                found = AdapterState(checkpoint.more[TENSORS], about["scale"], side=layers)
        start = self._federation.start.adapter
        if found is None or found.fingerprint() != about["sha256"] or found.tensors.keys() != start.tensors.keys():
            raise InputError(
                f"Expected the best model of the lines so far in the checkpoint of {where}, got another, or none: "
                "files were changed, so the run cannot go on"
            )
        self._best = ServerState(found, about["round_index"])


def charge_the_rest(federation: Federation, ledger: PrivacyLedger | None, *, num_rounds: int) -> None:
    """Charge the clients of the rounds that were announced and, as the run stops after `num_rounds`, are not asked.

    Guarantees: epsilon is the one of a run that does not stop, which is what holds: a smaller number, of the rounds
        that were asked, would have been chosen by what these released. A client that could not pay is not charged: it
        would have refused. A second call charges nothing.
    """
    e, mechanism = federation.experiment, federation.mechanism
    if ledger is None or mechanism is None:
        return
    draws: Iterator[tuple[int, ...]] = cohorts(
        seed=federation.seed,
        num_clients=e.num_clients,
        cohort_size=e.cohort_size,
        max_participations=e.max_participations,
    )
    if e.cohort == "cyclic":
        draws = map(partial(cyclic_cohort, num_clients=e.num_clients, cohort_size=e.cohort_size), count())
    for round_index, cohort in enumerate(islice(draws, e.num_rounds)):
        if round_index >= num_rounds:
            ledger.reserve(round_index, mechanism, e.trainer.num_steps, cohort)


def evaluator_of(federation: Federation) -> Evaluator:
    """Return what scores states on the held-out rows."""
    return Evaluator(
        federation.working,
        federation.test,
        task=federation.task,
        side=federation.side,
        num_threads=federation.experiment.runtime.num_workers,
    )
