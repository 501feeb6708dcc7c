"""A server's run from start to finish, or from where it was killed to finish: the round loop and what it leaves behind.

The directory is that of a simulation, and so are the lines of its files. What is committed is the checkpoint: lines of
a round that had none yet are taken back when the run goes on, and the round is asked again under the same experiment;
devices that had released their part of it send the same again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import randbits
from typing import Any

from safetensors.torch import save

from fedlr.adapters.client_ranks import num_rows_and_columns
from fedlr.adapters.state import side_tensors
from fedlr.config.schedules import rates_after
from fedlr.config.schema import Experiment
from fedlr.errors import InputError, PassingError
from fedlr.files import make_folder, sync_file, write_whole
from fedlr.models.export import export_adapter
from fedlr.models.released import released_files
from fedlr.privacy.earlier import with_earlier
from fedlr.privacy.reported import reported_statement
from fedlr.privacy.statement import with_choices, with_origin
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import RoundDiagnostics, ServerState, federated_rounds, scored
from fedlr.runs.checkpoint import latest_checkpoint, reading_facts, save_checkpoint
from fedlr.runs.choices import choices_of
from fedlr.runs.directory import (
    CHECKPOINTS,
    CLIENTS,
    IDENTITY,
    METRICS,
    append_lines,
    create_run_dir,
    cut_lines,
    finish_run,
    new_identity,
    read_identity,
    write_json,
    write_origin,
)
from fedlr.runs.recorder import client_rows, is_scored, metrics_row, score_text, summarise
from fedlr.runs.report import write_report
from fedlr.runs.selection import told
from fedlr.runs.verdict import verdict_lines
from fedlr.server.federation import Served, assemble
from fedlr.server.going_on import check_same, may_be_drawn
from fedlr.server.reports import Reports
from fedlr.training.threads import torch_threads

ADAPTERS = "adapters"


@dataclass
class Progress:
    """Where a run is; everything in it is in the last checkpoint."""

    state: ServerState
    reports: Reports = field(default_factory=Reports)  # by client, of its own ledger
    participations: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0  # that rounds took, over all starts

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the state."""
        return {
            **self.reports.facts(),
            "participations": {str(client): count for client, count in self.participations.items()},
            "seconds": self.seconds,
        }

    @classmethod
    def of(cls, state: ServerState, facts: Mapping[str, Any]) -> "Progress":
        """Return what `facts` told."""
        return cls(
            state,
            Reports.of(facts),
            Counter({int(client): int(count) for client, count in facts["participations"].items()}),
            float(facts["seconds"]),
        )


class Run:
    """One experiment in one directory.

    Args:
        experiment: the checked configuration.
        run_dir: where it lives; None makes `output_dir/name/time`. One that holds a run is gone on with.
        say: told one line at a time.

    Raises:
        InputError: the experiment cannot run, or the directory holds another one, or one that began with another base
            model, start or noise, or whose lines were lost.
    """

    def __init__(self, experiment: Experiment, run_dir: Path | None, *, say: Callable[[str], None]) -> None:
        found = None if run_dir is None else read_identity(run_dir)
        if run_dir is not None and found is not None:
            check_same(experiment, run_dir)
        elif run_dir is not None and (run_dir / METRICS).exists():
            raise InputError(f"Expected a new directory, or one of a server's run, got {run_dir} of another run")
        identity = found or new_identity(randbits(32) if experiment.seed is None else experiment.seed)
        self.served: Served = assemble(
            experiment, seed=identity["seed"], experiment_id=identity["experiment_id"], say=say
        )
        self.say, self.experiment = say, self.served.experiment
        if run_dir is not None and found is not None:
            check_same(self.experiment, run_dir)  # with the numbers of what was auto
        self.run_dir = create_run_dir(experiment) if run_dir is None else run_dir
        if found is None:
            make_folder(self.run_dir)
            write_origin(self.run_dir, self.experiment)
            write_json(self.run_dir / "partition.json", {"public": False})
            write_json(self.run_dir / IDENTITY, identity)  # the last: without it there is no run
        self.progress = self._resumed() or self._started()

    @property
    def is_done(self) -> bool:
        """Whether all rounds are done."""
        return self.progress.state.round_index >= self.experiment.num_rounds

    def rounds(self, pool: Any, members: Callable[[], Collection[int]] | None = None) -> None:
        """Ask for the rounds that are left; `pool` is a ClientPool that adds to `progress.reports`.

        `members` are the numbers of the devices that are enrolled now; None: all that the experiment has.

        Raises:
            InputError: too few devices are enrolled.
            PassingError: a round was abandoned too often; the checkpoint holds all that was reached.
        """
        e, done, attempts = self.experiment, self.progress, 0
        rounds = federated_rounds(
            done.state,
            pool=pool,
            method=self.served.method,
            num_rounds=e.num_rounds,
            num_clients=e.num_clients,
            cohort_size=e.cohort_size,
            max_participations=e.max_participations,
            seed=self.served.seed,
            train_head=e.adapter.train_head,
            ranks=e.adapter.ranks(e.num_clients, rows_and_columns=num_rows_and_columns(self.served.start.adapter)),
            quorum=e.deployment.min_updates,
            max_update_ratio=e.max_update_ratio,
            average_last=e.average_last,
            codec=self.served.terms.built_codec(),
            members=None if members is None else lambda: may_be_drawn(e, members(), done.participations),
        )
        with torch_threads(1):
            for state, diagnostics in rounds:
                if state.round_index == done.state.round_index:
                    attempts += 1
                    self._abandoned(diagnostics, attempts)
                else:
                    attempts = 0
                    self._finished(state, diagnostics)

    def leave_behind(self) -> str | None:
        """Write statement, adapter, summary and report; return why all was for nothing, if it was (`runs.outcome`)."""
        e, served, state = self.experiment, self.served, scored(self.progress.state)
        rows = [json.loads(line) for line in (self.run_dir / METRICS).read_text().splitlines()]
        numbers: dict[str, Any] = {"num_trained_values": served.num_trained_values, "seconds": self.progress.seconds}
        numbers |= {
            "held_out": served.held_out,
            "head_is_drawn": served.base.head_is_drawn,
            "noise_sd": served.noise_sd,
            "metric": served.metric,
        }
        summary = summarise(e, served.start, state, rows, method=served.method, seed=served.seed, **numbers)
        statement = reported_statement(
            e.privacy.delta if served.mechanism else None,
            self.progress.reports.epsilon,
            self.progress.reports.last_heads(),
            num_clients=e.num_clients,
            randomness=e.privacy.randomness,
            mechanism=served.mechanism,
            signed=self.progress.reports.signed,
        )
        statement = with_choices(with_origin(statement, served.origin), choices_of(e, summary["released"]))
        statement = with_earlier(statement, served.earlier)
        write_json(self.run_dir / "privacy.json", statement)
        for name in ("adapter", "adapter.partial"):  # of a process that was killed here
            shutil.rmtree(self.run_dir / name, ignore_errors=True)
        export_adapter(
            sharing_base(served.model),
            state.adapter,
            self.run_dir / "adapter",
            name=e.name,
            method=served.method.name,
            base=served.base,
            max_length=e.data.max_length,
            statement=statement,
            personal=served.method.personal,
            has_pairs=served.terms.pairs,
            released=told(summary["released"]),
        )
        summary |= {
            "base_sha256": served.base.fingerprint,
            "adapter_files": released_files(self.run_dir / "adapter"),
        }
        finish_run(self.run_dir, summary, draw=write_report)
        for line in verdict_lines(summary["verdict"]):
            self.say(line)
        problem: str | None = summary["problem"]
        return problem

    def _started(self) -> Progress:
        progress = Progress(self.served.start)
        for name in (METRICS, CLIENTS):
            (self.run_dir / name).unlink(missing_ok=True)
        self._record(progress, None)
        self._commit(progress)
        return progress

    def _resumed(self) -> Progress | None:
        checkpoint = latest_checkpoint(self.run_dir / CHECKPOINTS, say=self.say)
        if checkpoint is None:
            return None
        facts = checkpoint.facts
        for what, found in self._about().items():
            if facts.get(what) != found:
                raise InputError(
                    f"Expected {what} {facts.get(what)!s:.12} of the run in {self.run_dir}, got {found:.12}: the base "
                    "model, or a package, is another than when it began; put it back, or begin anew elsewhere"
                )
        with reading_facts(self.run_dir):
            progress = Progress.of(checkpoint.state, facts)
        done = progress.state.round_index
        rows = cut_lines(self.run_dir / METRICS, lambda row: int(row["rounds_completed"]) <= done)
        if len(rows) != done + 1:
            raise InputError(
                f"Expected {done + 1} lines of {done} rounds in {self.run_dir / METRICS}, got {len(rows)}: lines were "
                "lost or changed, so the run cannot go on"
            )
        cut_lines(self.run_dir / CLIENTS, lambda row: int(row["round_index"]) < done)
        self.say(f"going on after round {done} of {self.experiment.num_rounds} in {self.run_dir}")
        return progress

    def _about(self) -> dict[str, str]:
        """Return what devices are asked for and given, which must not change while the run lasts."""
        return {
            "terms_sha256": self.served.terms.sha256(),
            "start_sha256": self.served.start.adapter.fingerprint(),
        }

    def _commit(self, progress: Progress) -> None:
        """Write the checkpoint, after the lines that belong to it."""
        for name in (METRICS, CLIENTS):
            sync_file(self.run_dir / name)
        facts = {**progress.facts(), **self._about()}
        save_checkpoint(self.run_dir / CHECKPOINTS, progress.state, facts)

    def _finished(self, state: ServerState, diagnostics: RoundDiagnostics) -> None:
        done = self.progress
        done.state = state
        done.participations.update(diagnostics.trained)
        row = self._record(done, diagnostics)
        done.seconds += row["seconds"]["round"]
        folder = make_folder(self.run_dir / ADAPTERS)
        released = {**state.adapter.tensors, **side_tensors(state.adapter.side)}
        stored = {f"{slot.path}|{slot.role}": t.contiguous().clone() for slot, t in released.items()}
        write_whole(folder / f"round-{state.round_index:05d}.safetensors", save(stored))
        self._commit(done)
        lost = len(diagnostics.cohort) - len(diagnostics.trained)
        score = "not scored" if row["accuracy"] is None else score_text(row, self.served.metric)
        self.say(
            f"  round {state.round_index}/{self.experiment.num_rounds}  {score}   "
            f"{row['seconds']['round']:.1f} s   {len(diagnostics.trained)} updates"
            + (f"   {lost} without ({', '.join(sorted({d.reason for d in diagnostics.dropouts}))})" if lost else "")
        )

    def _abandoned(self, diagnostics: RoundDiagnostics, attempts: int) -> None:
        e, reasons = self.experiment, sorted({dropout.reason for dropout in diagnostics.dropouts})
        number = self.progress.state.round_index
        self.say(
            f"  round {number + 1} abandoned: {len(diagnostics.trained)} of {e.deployment.min_updates} updates "
            f"({', '.join(reasons)}); the model is as it was"
        )
        if attempts >= e.deployment.max_attempts:
            raise PassingError(
                f"Expected {e.deployment.min_updates} updates in round {number} within "
                f"deployment.max_attempts={attempts} attempts, got fewer each time ({', '.join(reasons)}); the run "
                "goes on from its checkpoint when it is started again"
            )

    def _record(self, progress: Progress, diagnostics: RoundDiagnostics | None) -> dict[str, Any]:
        """Write the lines of a state, and of the round that led to it."""
        e, evaluation, evaluate_s = self.experiment, None, 0.0
        round_index = progress.state.round_index
        if is_scored(round_index, every=e.tracking.evaluate_every, num_rounds=e.num_rounds):
            evaluation, evaluate_s = self.served.evaluator.score(scored(progress.state))
        spent = progress.reports.epsilon.values()
        rates = rates_after(e, round_index)
        known: dict[str, Any] = {
            "rates": rates,
            "diagnostics": diagnostics,
            "evaluate_s": evaluate_s,
            "noise_sd": self.served.noise_sd,
        }
        is_last = round_index == e.num_rounds
        row = metrics_row(progress.state, evaluation, spent=spent, is_last=is_last, **known)
        append_lines(self.run_dir / METRICS, [row])
        if diagnostics is not None:
            rows = client_rows(
                diagnostics,
                spent=progress.reports.epsilon,
                round_index=round_index - 1,
                num_steps=e.trainer.num_steps,
                participations=progress.participations,
                seconds=None,
            )
            append_lines(self.run_dir / CLIENTS, rows)
        return row
