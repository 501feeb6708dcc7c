"""A simulated run from start to finish: train, compare with the baselines, leave the results behind."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from secrets import randbits
from typing import Any

from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.config.auto_rates import alone_rounds, found_text
from fedlr.config.schedules import client_rates, rates_after
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import make_folder
from fedlr.models.export import export_adapter
from fedlr.models.released import released_files
from fedlr.privacy.all_runs import all_runs, with_all_runs
from fedlr.privacy.earlier import start_note, with_earlier
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.statement import run_statement, with_choices, with_origin, with_public
from fedlr.privacy.trials import of_choice, with_trials
from fedlr.privacy.units import rounded_up
from fedlr.rounds.evaluate import MOST_SCORED
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import RoundDiagnostics, ServerState, scored
from fedlr.runs.asked import write_asked
from fedlr.runs.choices import choices_of
from fedlr.runs.directory import (
    CLIENT_ACCURACY,
    CLIENTS,
    CONTACT_SHEET,
    LEDGER,
    METRICS,
    SERVER_LEDGER,
    append_lines,
    create_run_dir,
    finish_run,
    sole_writer,
    write_json,
    write_origin,
)
from fedlr.runs.recorder import client_rows, held_out_labels, metrics_row, summarise
from fedlr.runs.report import write_report
from fedlr.runs.selection import told
from fedlr.runs.trackers import check_tracker, nowhere, tracked
from fedlr.simulations.all_runs import charge_run
from fedlr.simulations.alone import accuracy_on, of_own_rows, train_alone
from fedlr.simulations.checkpoints import Checkpoints
from fedlr.simulations.choosing import Chooser, charge_the_rest, evaluator_of
from fedlr.simulations.client_accuracy import score_clients
from fedlr.simulations.client_unit import (
    ledgers_of,
    noise_as_of_one,
    noise_of_update,
    spent_on_clients,
)
from fedlr.simulations.contact_sheet import contact_sheet
from fedlr.simulations.federation import Federation, assemble, describe
from fedlr.simulations.ledgers import create_ledger, create_server_ledger, open_ledger, spent_in_rounds
from fedlr.simulations.progress import Progress
from fedlr.simulations.rounds import rounds_of
from fedlr.simulations.runtime import SimulatedPool, make_pool, pool_here
from fedlr.streams import Purpose, SeededRandomness, stream
from fedlr.training.threads import torch_threads


def simulate(experiment: Experiment, *, say: Callable[[str], None], is_trial: bool = False) -> Path:
    """Run an experiment and return its directory; `is_trial`: as one of those of `fedlr tune` with privacy.trials.

    Everything that can be wrong with the configuration or the data is found before the directory exists.

    Raises:
        InputError: for an experiment that cannot run.
    """
    if (trials := experiment.privacy.trials) is not None and not is_trial:  # else it states a choice that was not made
        raise InputError(f"Expected privacy.trials=null to simulate, got {trials:g}: trials are of fedlr tune")
    if experiment.runtime.kind == "flower":
        from fedlr.simulations.flower_run import simulate_with_flower

        return simulate_with_flower(experiment, say=say)
    if experiment.runtime.kind == "superlink":
        raise InputError(
            "Expected runtime=local or runtime=flower to simulate, got superlink: `fedlr server run` asks devices, and "
            "`fedlr federation` plays a whole federation on this machine"
        )
    check_tracker(experiment.tracking.tracker, is_offline=experiment.runtime.offline)
    seed = randbits(32) if experiment.seed is None else experiment.seed
    with torch_threads(1):
        federation = assemble(experiment, seed=seed, say=say)
        for note in federation.notes:
            say(f"note: {note}")
        if found := found_text(experiment, federation.experiment):
            say(found)
        if federation.earlier is not None:
            say(f"note: {start_note(federation.earlier)}")
        run_dir = create_run_dir(experiment)
        with sole_writer(run_dir):
            write_asked(run_dir, experiment)
            write_origin(run_dir, federation.experiment)
            write_json(run_dir / "partition.json", describe(federation))
            ledger = create_ledger(federation, run_dir / LEDGER)
            servers = create_server_ledger(federation, run_dir / SERVER_LEDGER)
            progress = Progress(federation.experiment, say=say, metric=federation.task.metric)
            charge(federation, run_dir, say=say)
            run(federation, run_dir, ledger=ledger, server_ledger=servers, progress=progress)
    return run_dir


def charge(federation: Federation, run_dir: Path, *, say: Callable[[str], None]) -> None:
    """Charge a run that is ready to the ledger of all runs, if it has one; of one that is refused no folder stays.

    Raises:
        InputError: the runs together would exceed the budget, or the ledger cannot be used.
    """
    try:
        charged = charge_run(federation)
    except InputError:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    if charged is not None:
        sum_told = f"epsilon {rounded_up(charged['epsilon'])} of {charged['budget']:g}"
        say(f"all {charged['num_runs']} runs on these data, this one counted in full: {sum_told}")


def run(
    federation: Federation,
    run_dir: Path,
    *,
    ledger: PrivacyLedger | None,
    progress: Progress,
    server_ledger: PrivacyLedger | None = None,
) -> None:
    """Train, compare, and leave everything behind in `run_dir`; what of it is there already is not done again.

    Raises:
        InputError: at the end, when all is written: not one update could be used, or nothing moved.
    """
    tracking, offline = federation.experiment.tracking, federation.experiment.runtime.offline
    with tracked(tracking.tracker, run_dir, is_offline=offline, say=progress.say) as track:
        state, rows, seconds = run_rounds(
            federation, run_dir, ledger=ledger, progress=progress, track=track, server_ledger=server_ledger
        )
    run_baselines(federation, run_dir, progress=progress)
    if federation.client_tests is not None:
        write_json(
            run_dir / CLIENT_ACCURACY, score_clients(federation.client_tests, partial(accuracy_on, federation, state))
        )
    if sheet := contact_sheet(federation, state):
        write_json(run_dir / CONTACT_SHEET, sheet)
    result = summary(federation, state, rows, seconds=seconds)
    result |= of_choice(leave_behind(federation, run_dir, state, result["released"]))
    result |= {"base_sha256": federation.base.fingerprint, "adapter_files": released_files(run_dir / "adapter")}
    finish_run(run_dir, result, draw=write_report)
    progress.judged(result["verdict"], result["released"])
    if result["problem"]:
        raise InputError(f"{result['problem']} (all that there is of the run is in {run_dir})")


def summary(
    federation: Federation, state: ServerState, rows: list[dict[str, Any]], *, seconds: float
) -> dict[str, Any]:
    """Return summary.json from the metrics of all rounds."""
    return summarise(
        federation.experiment,
        federation.start,
        state,
        rows,
        method=federation.method,
        seed=federation.seed,
        num_trained_values=federation.num_trained_values,
        seconds=seconds,
        held_out=held_out_labels(federation.test.labels, federation.label_names),
        head_is_drawn=federation.base.head_is_drawn,
        noise_sd=noise_as_of_one(federation),
        client_delta=federation.client_budget.delta if federation.client_budget else None,
        metric=federation.task.metric,
        num_validation=len(federation.test if federation.validation is None else federation.validation),
    )


def run_rounds(
    federation: Federation,
    folder: Path,
    *,
    ledger: PrivacyLedger | None,
    progress: Progress,
    track: Callable[[Mapping[str, Any]], None] = nowhere,
    name: str = "federated",
    server_ledger: PrivacyLedger | None = None,
) -> tuple[ServerState, list[dict[str, Any]], float]:
    """Train the federation, from its latest checkpoint if there is one; return the state that is released, metrics and
    seconds.

    It writes one line of metrics per round, which `track` gets too, and one line for each client asked; with the client
    unit (`server_ledger`) none, as who took part is told to nobody.
    """
    e = federation.experiment
    checkpoints = Checkpoints(federation, folder, ledger, server_ledger)
    found = checkpoints.take_up(say=progress.say)
    state = found.state if found else federation.start
    for row in checkpoints.metrics:
        track(row)
    chooser = Chooser(federation, checkpoints.metrics)
    if found:
        chooser.take_back(found, where=folder)
        progress.taken_up(state.round_index)
        if chooser.is_over:
            return chooser.released(state), checkpoints.metrics, checkpoints.seconds_before
    records = RoundRecords(federation, folder, checkpoints, chooser, state, ledger, server_ledger, track)
    with closing(make_pool(federation, ledger)) as pool:
        if found:
            pool.kept.take_back(found.more)
        else:
            progress.arm(f"{name}, {'private' if ledger or server_ledger else 'no privacy'}", e, records.state(state))
            checkpoints.save(state, pool.kept, chooser, num_lines=records.num_lines)
        rounds = rounds_of(federation, state, pool, server_ledger=server_ledger)
        for state, diagnostics in rounds:
            row = records.round(state, diagnostics, pool)
            checkpoints.save(state, pool.kept, chooser, num_lines=records.num_lines)
            progress.round_done(row, num_clients=e.cohort_size if diagnostics.is_secret else len(diagnostics.cohort))
            if chooser.is_over:
                break
    progress.arm_done(e, num_rounds=state.round_index, is_private=ledger is not None)
    return chooser.released(state), checkpoints.metrics, checkpoints.seconds()


class RoundRecords:
    """The lines that a run writes about its states and clients, and the counts that go on from round to round."""

    def __init__(
        self,
        federation: Federation,
        folder: Path,
        checkpoints: Checkpoints,
        chooser: Chooser,
        state: ServerState,
        ledger: PrivacyLedger | None,
        server_ledger: PrivacyLedger | None,
        track: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`checkpoints` has the lines until now, and `state` is that after them."""
        self._federation, self._folder, self._chooser, self._track = federation, folder, chooser, track
        self._ledger, self._server_ledger = ledger, server_ledger
        self._rows, self._num_asked = checkpoints.metrics, len(checkpoints.clients)
        self._enrolled = range(federation.experiment.num_clients)
        # A round changes what its cohort has spent, and nobody else's: enrolled clients cost nothing.
        self._spent = spent_in_rounds(ledger, self._enrolled, state.round_index)
        self._participations = Counter(row["client_id"] for row in checkpoints.clients if row["status"] == "trained")
        self._personal: list[Mapping[Slot, Tensor]] = []
        self._noise_sd = noise_of_update(federation)

    @property
    def num_lines(self) -> dict[str, int]:
        """How many lines belong to the rounds until now, by file."""
        return {METRICS: len(self._rows), CLIENTS: self._num_asked}

    def state(self, state: ServerState, diagnostics: RoundDiagnostics | None = None) -> dict[str, Any]:
        """Score a state where it is due, write its line of metrics, and return it."""
        e = self._federation.experiment
        found = self._chooser.score(state, personal=self._personal)
        if found.is_over and state.round_index < e.num_rounds:
            charge_the_rest(self._federation, self._ledger, num_rounds=state.round_index)
            self._spent.update(spent_in_rounds(self._ledger, self._enrolled, e.num_rounds))
        row = metrics_row(
            state,
            found.evaluation,
            spent=self._spent.values(),
            spent_on_clients=spent_on_clients(self._server_ledger, state.round_index),
            diagnostics=diagnostics,
            evaluate_s=found.seconds,
            noise_sd=self._noise_sd,
            is_last=found.is_over or found.is_best,
            validation=found.validation,
            rates=rates_after(e, state.round_index),
        )
        self._rows.append(row)
        append_lines(self._folder / METRICS, [row])
        self._track(row)
        return row

    def round(self, state: ServerState, diagnostics: RoundDiagnostics, pool: SimulatedPool) -> dict[str, Any]:
        """Write the lines of a round, the state's and those of the clients that were asked; return the state's."""
        if self._federation.method.personal:
            keepers = (pool.kept.personal.get(client) for client in self._enrolled)
            self._personal = list(islice(filter(None, keepers), MOST_SCORED))
        asked_now = self._enrolled if diagnostics.is_secret else diagnostics.cohort
        self._spent.update(spent_in_rounds(self._ledger, asked_now, state.round_index))
        row = self.state(state, diagnostics)
        self._participations.update(diagnostics.trained)
        asked = client_rows(
            diagnostics,
            spent=self._spent,
            round_index=state.round_index - 1,
            num_steps=self._federation.experiment.trainer.num_steps,
            participations=self._participations,
            seconds=pool.seconds if self._federation.experiment.data.public else None,
        )
        append_lines(self._folder / CLIENTS, asked)
        self._num_asked += len(diagnostics.cohort)
        return row


def run_baselines(federation: Federation, run_dir: Path, *, progress: Progress) -> None:
    """Run what the final table compares with: the same run without privacy, and each client alone."""
    tracking = federation.experiment.tracking
    folder = run_dir / "baselines"
    if tracking.run_no_privacy and federation.experiment.privacy.is_private:
        make_folder(folder / "no_privacy")
        run_rounds(federation.without_privacy(), folder / "no_privacy", ledger=None, progress=progress)
    if tracking.run_centralised:
        make_folder(folder / "centralised")
        run_rounds(federation.centralised(), folder / "centralised", ledger=None, progress=progress, name="centralised")
    if tracking.run_alone and not (folder / "alone.json").exists():
        run_alone(federation, folder, progress=progress)


def run_alone(federation: Federation, folder: Path, *, progress: Progress) -> None:
    """Train each client alone; what was cut off begins again, and its charges stay."""
    make_folder(folder)
    path = folder / f"alone-{LEDGER}"
    if path.exists() and federation.experiment.privacy.randomness == "os":
        progress.say("the clients alone were cut off, and their noise cannot be drawn again: they are left out")
        return
    progress.alone()
    federation = federation.at_rate_of("alone_lr").over(alone_rounds(federation.experiment))
    ledger = open_ledger(federation, path) if path.exists() else create_ledger(federation, path)
    # Processes of their own compute the rates of the whole run's rounds.
    make = make_pool if client_rates(federation.experiment).is_constant else pool_here
    with closing(make(with_other_noise(federation), ledger)) as pool:
        evaluator = evaluator_of(federation)
        arms = train_alone(federation, pool, client_done=progress.client_done)
        found = [
            (evaluator.score(scored(arm.state))[0], arm.num_updates, of_own_rows(federation, evaluator, client_id, arm))
            for client_id, arm in enumerate(arms)
        ]
    spent = ledger.spent_all(range(len(found))) if ledger else {}
    metric = federation.task.metric
    clients = [
        {
            "client_id": client_id,
            "accuracy": evaluation.accuracy,
            "score": evaluation.headline(metric),
            "epsilon": spent.get(client_id),
            "num_updates": num_updates,
            **own,
        }
        for client_id, (evaluation, num_updates, own) in enumerate(found)
    ]
    write_json(folder / "alone.json", {"privacy": "dp" if ledger else "none", "clients": clients})
    scores = [evaluation.headline(metric) for evaluation, *_ in found]
    progress.alone_done(scores, num_idle=sum(not num_updates for _, num_updates, _ in found))


def leave_behind(
    federation: Federation, run_dir: Path, state: ServerState, released: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the privacy statement, which is returned, and the adapter."""
    num_clients = federation.experiment.num_clients
    statement = run_statement(
        run_dir, num_clients, placed_by=federation.placed_by, expected=ledgers_of(federation.experiment)
    )
    statement = with_public(with_origin(statement, federation.origin), federation.taken_as_public)
    statement = with_choices(statement, choices_of(federation.experiment, released))
    statement = with_earlier(with_trials(statement, run_dir), federation.earlier)
    shared = federation.experiment.privacy.ledger
    statement = with_all_runs(statement, None if shared is None else all_runs(shared))
    write_json(run_dir / "privacy.json", statement)
    for leftover in ("adapter", "adapter.partial"):
        shutil.rmtree(run_dir / leftover, ignore_errors=True)
    export_adapter(
        sharing_base(federation.model),
        state.adapter,
        run_dir / "adapter",
        name=federation.experiment.name,
        method=federation.method.name,
        base=federation.base,
        max_length=federation.experiment.data.max_length,
        statement=statement,
        personal=federation.method.personal,
        has_pairs=federation.has_pairs,
        released=told(released),
    )
    return statement


def with_other_noise(federation: Federation) -> Federation:
    """Return the federation with streams of its own: the noise of one run must not cancel that of another."""
    if not isinstance(federation.randomness, SeededRandomness):
        return federation
    seed = int(stream(federation.randomness.seed, Purpose.BASELINE).integers(2**32))
    return replace(federation, randomness=SeededRandomness(seed))
