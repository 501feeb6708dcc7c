"""Runs that die: one process imports, forks a run after another, and lets each kill itself at a moment of its round.

`python -m tests.simulations.killed_runs FOLDER JOBS_JSON` takes, by name, overrides and kills. For each it leaves an
uninterrupted run in `FOLDER/NAME/reference` and one a kill in `FOLDER/NAME/POINT-N`, resumed, with `truth.jsonl`: every
client and round whose rows were about to be read, in the order of events, over all processes. No report is drawn: it is
a function of the other files.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fedlr.rounds.pools.fused
import fedlr.rounds.pools.local
import fedlr.runs.verified_folder
import fedlr.simulations.checkpoints
import fedlr.simulations.resume
import fedlr.simulations.simulate
from fedlr.config.schema import compose_experiment
from fedlr.rounds.pools.local import Accounts
from fedlr.simulations.federation import assemble
from fedlr.simulations.resume import resume
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import SMALL

# The moments of a round at which a run can die (reliability, R-F2), and three after the last one.
POINTS = ("sampled", "sent", "half received", "all received", "aggregated", "mid-checkpoint", "after")
LATE = ("alone", "exported", "summarised")


def die() -> None:
    """Die as under `kill -9`: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(place: Any, name: str, number: int, act: Callable[[], None], *, before: bool) -> None:
    """Do something before or after the call of that number, from 1."""
    real, calls = getattr(place, name), []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if before and len(calls) == number:
            act()
        found = real(*args, **options)
        if not before and len(calls) == number:
            act()
        return found

    setattr(place, name, wrapped)


def arm_point(point: str, number: int) -> None:
    """Let this process die at a moment of its round of that number, from 1."""
    if point == "sampled":
        on_call(Accounts, "reserve", number, die, before=True)
    elif point == "sent":
        on_call(Accounts, "reserve", number, die, before=False)
    elif point in ("half received", "all received"):
        for pool in (fedlr.rounds.pools.fused.FusedPool, fedlr.rounds.pools.local.LocalPool):
            pool.train = dying(pool.train, number, after=2 if point == "half received" else None)  # type: ignore[method-assign]
    elif point == "aggregated":
        on_call(fedlr.simulations.simulate, "metrics_row", number + 1, die, before=True)
    elif point == "mid-checkpoint":
        within = lambda: on_call(fedlr.runs.verified_folder, "_write", 1 + number % 2, die, before=bool(number % 2))  # noqa: E731
        on_call(fedlr.simulations.checkpoints, "save_checkpoint", number + 1, within, before=True)
    elif point == "after":
        on_call(fedlr.simulations.checkpoints, "save_checkpoint", number + 1, die, before=False)
    elif point == "alone":
        on_call(fedlr.simulations.simulate, "train_alone", 1, lambda: arm_point("sent", 2), before=True)
    elif point == "exported":
        on_call(fedlr.simulations.simulate, "export_adapter", 1, die, before=False)
    elif point == "summarised":
        on_call(fedlr.simulations.simulate, "write_report", 1, die, before=True)


def dying(train: Callable[..., Iterator[Any]], number: int, *, after: int | None) -> Callable[..., Iterator[Any]]:
    """Return a pool's `train` that dies in its call of that number, after so many answers; None: after all."""
    calls = []

    def wrapped(*args: Any) -> Iterator[Any]:
        calls.append(None)
        for answer, outcome in enumerate(train(*args), start=1):
            if len(calls) == number and answer == after:
                die()
            yield outcome
        if len(calls) == number:
            die()

    return wrapped


def tell_truth(path: Path) -> None:
    """Write down who is about to read rows, before any is read."""

    def telling(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            clients = options["client_ids"] if "client_ids" in options else [options["client_id"]]
            if options["mechanism"] is not None:
                with path.open("a") as file:
                    file.write("".join(json.dumps([c, options["round_index"]]) + "\n" for c in clients))
            return real(*args, **options)

        return wrapped

    fedlr.rounds.pools.fused.train_cohort = telling(fedlr.rounds.pools.fused.train_cohort)
    fedlr.rounds.pools.local.train_client = telling(fedlr.rounds.pools.local.train_client)


def forked(act: Callable[[], object]) -> int:
    """Do something in a process of its own, and return how that ended."""
    if (child := os.fork()) == 0:
        try:
            act()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def only_run(folder: Path) -> Path:
    """Return the one run in an output folder."""
    (run_dir,) = folder.glob("*/*/")
    return run_dir


def main(folder: Path, overrides: Sequence[str], kills: Sequence[tuple[str, int]]) -> None:
    """Run, kill and resume one federation; see above."""

    def begin(name: str, point: str | None, number: int) -> None:
        tell_truth(folder / name / "truth.jsonl")
        if point is not None:
            arm_point(point, number)
        tracking = composed.tracking.model_copy(update={"output_dir": str(folder / name)})
        fedlr.simulations.simulate.simulate(composed.model_copy(update={"tracking": tracking}), say=lambda line: None)

    def finish(name: str) -> None:
        tell_truth(folder / name / "truth.jsonl")
        resume(only_run(folder / name), say=lambda line: None)

    composed = compose_experiment([*SMALL, *overrides])
    assemble(composed, seed=0)  # what is calibrated here is not again in every fork; nothing may train in this process
    for name, point, number in [("reference", None, 0), *((run_name(*kill), *kill) for kill in kills)]:
        (folder / name).mkdir(parents=True)
        ended = forked(lambda: begin(name, point, number))  # noqa: B023
        assert ended == (0 if point is None else -signal.SIGKILL), f"{folder / name}: {ended}"
        if point is not None:
            ended = forked(lambda: finish(name))  # noqa: B023
            assert ended == 0, f"{folder / name}: resume ended with {ended}"


def run_name(point: str, number: int) -> str:
    """Return the folder of a kill."""
    return f"{point}-{number}".replace(" ", "_")


def no_report(run_dir: Path) -> Path:
    """Stand for what takes most of a tiny run's time."""
    (run_dir / "report.html").touch()
    return run_dir / "report.html"


if __name__ == "__main__":
    fedlr.simulations.simulate.write_report = fedlr.simulations.resume.write_report = no_report
    with torch_threads(1):
        for job, (overrides, kills) in json.loads(sys.argv[2]).items():
            main(Path(sys.argv[1]) / job, overrides, kills)
