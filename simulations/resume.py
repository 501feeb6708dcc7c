"""A run that was killed, finished: exactly as if nothing had happened, or not at all."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.runs.checkpoint import Checkpoint, latest_checkpoint
from fedlr.runs.directory import (
    CHECKPOINTS,
    FINISHED,
    LEDGER,
    SERVER_LEDGER,
    mark_finished,
    recorded_experiment,
    sole_writer,
    summary_so_far,
)
from fedlr.runs.report import write_report
from fedlr.simulations.all_runs import open_all_runs, require_charge
from fedlr.simulations.checkpoints import about_experiment, about_federation, check_facts, require_same
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import open_ledger, open_server_ledger
from fedlr.simulations.progress import Progress
from fedlr.simulations.simulate import run
from fedlr.training.threads import torch_threads


def resume(run_dir: Path, *, say: Callable[[str], None], own_parts: Collection[str] = ()) -> None:
    """Finish a run from its latest checkpoint.

    The directory may be a stranger's: of its files none is run, and no name in them is imported but fedlr's own parts
    and `own_parts`, which the user typed.

    Guarantees: with seeded randomness the adapter and all lines are those of a run that nobody killed, times apart, and
        the ledger charges the same. Under randomness of the operating system the clients of a round that was reserved
        and not saved are refused in it, and stay charged.

    Raises:
        InputError: the run is finished, or a process is still at it; there is no intact checkpoint; the configuration,
            the versions, the data or the base model are not those it began with; the ledger is missing, was changed, or
            is older than the checkpoint; privacy.ledger does not hold the run's charge. Nothing is changed then.
    """
    with sole_writer(run_dir):
        if (summary := summary_so_far(run_dir)) is not None:
            if summary[FINISHED] is True:
                raise InputError(f"Expected a run that was cut off, got {run_dir}, which is finished")
            write_report(run_dir)  # refuses what is no summary, before anything is changed
            mark_finished(run_dir, summary)
            return
        experiment = recorded_experiment(run_dir, own_parts=own_parts)
        if experiment.runtime.kind != "local":
            raise InputError(
                f"Expected a run of runtime=local, got runtime={experiment.runtime.kind}: `fedlr server run "
                "--run-dir RUN_DIR` goes on with a run of devices, and Flower's simulation begins again"
            )
        checkpoint = required_checkpoint(run_dir, experiment, say=say)
        with torch_threads(1):
            with advising_no_key():
                federation = assemble(experiment, seed=checkpoint.facts["seed"], say=say)
            require_same(checkpoint.facts, about_federation(federation))
            require_charge(open_all_runs(federation), checkpoint.facts.get("all_runs_head"))
            ledger = open_ledger(federation, run_dir / LEDGER)
            if ledger:
                ledger.require(checkpoint.facts["ledger_head"])
                say_refusals(federation, ledger, checkpoint, say=say)
            servers = open_server_ledger(federation, run_dir / SERVER_LEDGER)
            if servers:
                servers.require(checkpoint.facts["server_ledger_head"])
            run(
                federation,
                run_dir,
                ledger=ledger,
                server_ledger=servers,
                progress=Progress(experiment, say=say, metric=federation.task.metric),
            )


@contextmanager
def advising_no_key() -> Iterator[None]:
    """Add to what a start advises that a run which is resumed cannot be given other values.

    Raises:
        InputError: that of the start, which names a library, a processor, a file or a model that is not here.
    """
    try:
        yield
    except InputError as error:
        told = InputError(
            f"{error}; `fedlr resume` takes no key: a run goes on as it began, or not at all, so bring back here what "
            "it had, or start it anew"
        )
        told.exit_code = error.exit_code
        raise told from error


def required_checkpoint(run_dir: Path, experiment: Experiment, *, say: Callable[[str], None]) -> Checkpoint:
    """Return the checkpoint that a run goes on from, of the same configuration and versions.

    Raises:
        InputError: there is none, or it is another run's.
    """
    checkpoint = latest_checkpoint(run_dir / CHECKPOINTS, say=lambda line: None)
    if checkpoint is None:
        why = (
            "tracking.checkpoint_every is null" if experiment.tracking.checkpoint_every is None else "none was written"
        )
        raise InputError(f"Expected a checkpoint in {run_dir / CHECKPOINTS}, got none ({why}): start the run anew")
    check_facts(checkpoint, run_dir)
    require_same(checkpoint.facts, about_experiment(experiment))
    return checkpoint


def say_refusals(
    federation: Federation, ledger: PrivacyLedger, checkpoint: Checkpoint, *, say: Callable[[str], None]
) -> None:
    """Say who was charged for rounds that were lost and cannot be repeated."""
    if ledger.is_seeded:
        return
    clients = range(federation.experiment.num_clients)
    before, spent = ledger.spent_all(clients, num_rounds=checkpoint.state.round_index), ledger.spent_all(clients)
    if lost := sum(before[client] != spent[client] for client in clients):
        say(
            f"note: {lost} clients were charged for rounds that were lost; noise of the operating system cannot be "
            "drawn again, so they stay charged and are refused in those rounds (already_reserved)"
        )
