"""`fedlr server ...`: what an operator types."""

import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedlr.errors import InputError, PassingError
from fedlr.runs.commands import command, dispatch, quiet_flower, ready

if TYPE_CHECKING:
    from fedlr.server.run import Run

COMMANDS = {
    "certificate": ("fedlr.server.certificates", "certificate"),
    "enrol": ("fedlr.server.enrol", "enrol"),
    "revoke": ("fedlr.server.enrol", "revoke"),
    "devices": ("fedlr.server.devices", "devices"),
    "terms": ("fedlr.server.terms", "terms"),
    "proxy": ("fedlr.server.proxy", "proxy"),
    "run": ("fedlr.server.cli", "run"),
    "view": ("fedlr.server.view.commands", "view"),
    "watch": ("fedlr.server.view.commands", "watch"),
    "adapter": ("fedlr.server.view.commands", "adapter"),
}
MOST_FAILURES = 20  # runs in a row that ended without a finished round
LONGEST_PAUSE_S = 10.0  # between two of them


def server(arguments: Sequence[str]) -> int:
    """Run a federation of devices, and look at it: fedlr server COMMAND ...

    certificate   make an authority and this server's certificates
    enrol         let a device in, by its public key
    revoke        shut a device out
    devices       list who is enrolled and who is connected
    terms         write what an experiment asks of devices, for their doctor
    proxy         the public door: devices reach the SuperLink through it, and nothing else
    run           run an experiment on the enrolled devices, or go on with one
    view          serve the operator's view of a run, read-only
    watch         follow a run, live, through its view
    adapter       fetch the adapter of any round through the view

    Each takes --help.
    """
    return dispatch("server", server.__doc__, COMMANDS, arguments)


@command
def run(arguments: list[str]) -> None:
    """Run an experiment on the enrolled devices: fedlr server run [--run-dir DIR] experiment=NAME [KEY=VALUE ...]

    runtime=superlink is the default here. With --run-dir a run that was killed goes on where its last checkpoint is:
    the same command starts it and restarts it. Without, the directory is outputs/NAME/TIME.
    """
    run_dir = None
    if "--run-dir" in arguments:
        place = arguments.index("--run-dir")
        if place + 1 == len(arguments):
            raise InputError("Expected a directory after --run-dir, got none")
        run_dir = Path(arguments.pop(place + 1))
        arguments.pop(place)
    chosen = [] if any(word.startswith("runtime=") for word in arguments) else ["runtime=superlink"]
    experiment = ready([*chosen, *arguments])
    if experiment.runtime.kind != "superlink":
        raise InputError(f"Expected runtime=superlink for fedlr server run, got {experiment.runtime.kind}")
    from fedlr.files import make_folder
    from fedlr.runs.directory import sole_writer
    from fedlr.server.going_on import check_enrolled
    from fedlr.server.roster import load_roster
    from fedlr.server.run import Run

    if not experiment.deployment.rehearsal or Path(experiment.deployment.roster).exists():
        roster = load_roster(Path(experiment.deployment.roster))
        check_enrolled(
            experiment, [entry.client_id for entry in roster.clients], [entry.client_id for entry in roster.revoked]
        )
        print(f"{len(roster.clients)} devices are enrolled; loading the model and the held-out rows", flush=True)
    signal.signal(signal.SIGTERM, stopped)
    with ExitStack() as held:
        if run_dir is not None:
            make_folder(run_dir)
            held.enter_context(sole_writer(run_dir))
        this = Run(experiment, run_dir, say=lambda line: print(line, flush=True))
        if run_dir is None:
            held.enter_context(sole_writer(this.run_dir))
        finish(this)


def stopped(number: int, frame: object) -> NoReturn:
    """Say that the run was asked to stop, and stop it where it is; its last checkpoint is whole."""
    signal.signal(number, signal.SIG_IGN)
    print("stopping, as asked; the same command goes on from the last checkpoint", flush=True)
    raise SystemExit(128 + number)


def finish(this: "Run") -> None:
    """Ask for all rounds, in one Flower run after another where the SuperLink loses them, and leave the results."""
    from fedlr.server.app import serve
    from fedlr.server.link import LinkLost, flower_run

    quiet_flower()
    deployment, failures = this.experiment.deployment, 0
    while not this.is_done:
        done = this.progress.state.round_index
        try:
            this.say(f"asking the SuperLink at {deployment.superlink} for a run")
            with flower_run(deployment) as grid:
                serve(this, grid)
        except LinkLost as error:
            failures = 0 if this.progress.state.round_index > done else failures + 1
            this.say(f"  no run at the SuperLink ({error}); going on in another")
            if failures >= MOST_FAILURES:
                raise PassingError(
                    f"Expected a SuperLink at {deployment.superlink}, got {failures} runs without a round ({error}); "
                    "look at its log and start this again"
                ) from error
            time.sleep(min(failures, LONGEST_PAUSE_S))
    problem = this.leave_behind()
    this.say(f"\nresults in {this.run_dir}")
    if problem:
        raise InputError(problem)
