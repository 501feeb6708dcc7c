"""A simulated run from start to finish: train, compare with the baselines, leave the results behind."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from secrets import randbits
from typing import Any

from torch import Tensor

from fedlr.adapter import Slot
from fedlr.assembly import torch_threads
from fedlr.errors import InputError
from fedlr.evaluate import MOST_SCORED, Evaluator
from fedlr.experiment import Experiment
from fedlr.export import export_adapter
from fedlr.pools.local import sharing_base
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.statement import no_privacy_statement, privacy_statement
from fedlr.records import client_rows, metrics_row, summarise
from fedlr.report import write_report
from fedlr.rounds import RoundDiagnostics, ServerState, federated_rounds
from fedlr.run_dir import LEDGER, append_lines, create_run_dir, write_json, write_origin
from fedlr.streams import Purpose, SeededRandomness, stream
from simulations.alone import train_alone
from simulations.federation import Federation, assemble, describe
from simulations.progress import Progress
from simulations.runtime import make_pool


def simulate(experiment: Experiment, *, say: Callable[[str], None]) -> Path:
    """Run an experiment and return its directory.

    Everything that can be wrong with the configuration or the data is found before the directory exists.

    Raises:
        InputError: for an experiment that cannot run.
    """
    if experiment.runtime.kind == "flower":
        from simulations.flower_run import simulate_with_flower

        return simulate_with_flower(experiment, say=say)
    if experiment.runtime.kind == "superlink":
        raise InputError(
            "Expected runtime=local or runtime=flower to simulate, got superlink: `fedlr server run` asks devices, and "
            "`fedlr federation` plays a whole federation on this machine"
        )
    seed = randbits(32) if experiment.seed is None else experiment.seed
    with torch_threads(1):
        federation = assemble(experiment, seed=seed, say=say)
        for note in federation.notes:
            say(f"note: {note}")
        run_dir = create_run_dir(experiment)
        write_origin(run_dir, experiment)
        write_json(run_dir / "partition.json", describe(federation))
        run(federation, run_dir, progress=Progress(experiment, say=say))
    return run_dir


def run(federation: Federation, run_dir: Path, *, progress: Progress) -> None:
    """Train, compare, and leave everything behind in `run_dir`."""
    started = time.perf_counter()
    ledger = create_ledger(federation, run_dir / LEDGER)
    state, rows = run_rounds(federation, run_dir, ledger=ledger, progress=progress)
    seconds = time.perf_counter() - started
    run_baselines(federation, run_dir, progress=progress)
    leave_behind(federation, run_dir, state)
    write_json(run_dir / "summary.json", summary(federation, state, rows, seconds=seconds))
    write_report(run_dir)


def summary(
    federation: Federation, state: ServerState, rows: list[dict[str, Any]], *, seconds: float
) -> dict[str, Any]:
    """Return summary.json from the metrics of all rounds."""
    return summarise(
        federation.experiment,
        state,
        rows,
        method=federation.method.name,
        seed=federation.seed,
        num_trained_values=federation.num_trained_values,
        seconds=seconds,
    )


def run_rounds(
    federation: Federation, folder: Path, *, ledger: PrivacyLedger | None, progress: Progress
) -> tuple[ServerState, list[dict[str, Any]]]:
    """Train the federation; write one line of metrics a round, and one line for each client asked."""
    e = federation.experiment
    state = federation.start
    evaluator = evaluator_of(federation)
    # A round changes what its cohort has spent, and nobody else's: enrolled clients cost nothing.
    spent = ledger.spent_all(range(e.num_clients)) if ledger else {}
    participations: Counter[int] = Counter()
    rows: list[dict[str, Any]] = []
    personal: list[Mapping[Slot, Tensor]] = []

    def record(state: ServerState, diagnostics: RoundDiagnostics | None = None) -> dict[str, Any]:
        evaluation, evaluate_s = evaluator.score(state, personal=personal)
        rows.append(
            metrics_row(state, evaluation, spent=spent.values(), diagnostics=diagnostics, evaluate_s=evaluate_s)
        )
        append_lines(folder / "metrics.jsonl", rows[-1:])
        return rows[-1]

    progress.arm("federated, private" if ledger else "federated, no privacy", record(state))
    with closing(make_pool(federation, ledger)) as pool:
        rounds = federated_rounds(
            state,
            pool=pool,
            method=federation.method,
            num_rounds=e.num_rounds,
            num_clients=e.num_clients,
            cohort_size=e.cohort_size,
            max_participations=e.max_participations,
            seed=federation.seed,
            train_head=e.adapter.train_head,
            ranks=federation.ranks,
        )
        for state, diagnostics in rounds:
            if federation.method.personal:
                keepers = (pool.kept.personal.get(client) for client in range(e.num_clients))
                personal[:] = islice(filter(None, keepers), MOST_SCORED)
            if ledger:
                spent.update(ledger.spent_all(diagnostics.cohort))
            row = record(state, diagnostics)
            participations.update(diagnostics.trained)
            asked = client_rows(
                diagnostics,
                spent=spent,
                round_index=state.round_index - 1,
                num_steps=e.trainer.num_steps,
                participations=participations,
                seconds=pool.seconds if e.data.public else None,
            )
            append_lines(folder / "clients.jsonl", asked)
            progress.round_done(row, num_clients=len(diagnostics.cohort))
    return state, rows


def run_baselines(federation: Federation, run_dir: Path, *, progress: Progress) -> None:
    """Run what the final table compares with: the same run without privacy, and each client alone."""
    tracking = federation.experiment.tracking
    folder = run_dir / "baselines"
    if tracking.run_no_privacy and federation.mechanism is not None:
        (folder / "no_privacy").mkdir(parents=True)
        run_rounds(federation.without_privacy(), folder / "no_privacy", ledger=None, progress=progress)
    if tracking.run_alone:
        folder.mkdir(exist_ok=True)
        progress.alone()
        ledger = create_ledger(federation, folder / f"alone-{LEDGER}")
        with closing(make_pool(with_other_noise(federation), ledger)) as pool:
            evaluator = evaluator_of(federation)
            states = train_alone(federation, pool, client_done=progress.client_done)
            accuracies = [evaluator.score(state)[0].accuracy for state in states]
        spent = ledger.spent_all(range(len(accuracies))) if ledger else {}
        clients = [
            {"client_id": client_id, "accuracy": accuracy, "epsilon": spent.get(client_id)}
            for client_id, accuracy in enumerate(accuracies)
        ]
        write_json(folder / "alone.json", {"privacy": "dp" if ledger else "none", "clients": clients})
        progress.alone_done(accuracies)


def leave_behind(federation: Federation, run_dir: Path, state: ServerState) -> None:
    """Write the privacy statement and the adapter."""
    if federation.budget is None:
        statement = no_privacy_statement(federation.experiment.num_clients)
    else:
        statement = privacy_statement(run_dir / LEDGER, list(range(federation.experiment.num_clients)))
    write_json(run_dir / "privacy.json", statement)
    export_adapter(
        sharing_base(federation.model),
        state.adapter,
        run_dir / "adapter",
        name=federation.experiment.name,
        method=federation.method.name,
        base=federation.base.source,
        base_sha256=federation.base.fingerprint,
        statement=statement,
        personal=federation.method.personal,
    )


def create_ledger(federation: Federation, path: Path) -> PrivacyLedger | None:
    """Create the ledger of a run; None without privacy."""
    if federation.budget is None:
        return None
    privacy = federation.experiment.privacy
    return PrivacyLedger.create(
        path,
        federation.budget,
        accountant=privacy.accountant,
        dataset_id=federation.source,
        randomness=privacy.randomness,
    )


def with_other_noise(federation: Federation) -> Federation:
    """Return the federation with streams of its own: the noise of one run must not cancel that of another."""
    if not isinstance(federation.randomness, SeededRandomness):
        return federation
    seed = int(stream(federation.seed, Purpose.BASELINE).integers(2**32))
    return replace(federation, randomness=SeededRandomness(seed))


def evaluator_of(federation: Federation) -> Evaluator:
    """Return what scores states on the held-out texts."""
    return Evaluator(
        federation.working,
        federation.test,
        side=federation.side,
        num_threads=federation.experiment.runtime.num_workers,
    )
