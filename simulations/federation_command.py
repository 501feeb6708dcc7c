"""`fedlr federation`: a whole federation on this machine, and the simulation of it, compared number by number."""

import os
import signal
from pathlib import Path

from safetensors.torch import load_file

from fedlr.config.schema import Experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.runs.commands import command, ready
from fedlr.runs.directory import create_run_dir, read_json
from fedlr.simulations.cli import say
from fedlr.simulations.rehearsal import Rehearsal
from fedlr.tasks.evaluation import Metric

TIMEOUT_S = 1800.0
LARGEST_DIFFERENCE = 1e-6
# As devices do, each client alone and each row by itself; in groups sums of float32 round differently.
ALONE = ("runtime.memory_gb=1e-9", "trainer.token_budget=1")


@command
def federation(arguments: list[str]) -> None:
    """Start a whole federation on this machine, run it, stop it: fedlr federation [experiment=NAME] [KEY=VALUE ...]

    A SuperLink, a proxy, a server and a device for every client, over TLS with keys, each a process. Then the same
    experiment is simulated, and the two adapters are compared. The default is experiment=federation.
    """
    if not any(word.startswith("experiment=") for word in arguments):
        arguments = ["experiment=federation", *arguments]
    overrides = [word for word in arguments if not word.startswith("runtime=")]
    experiment = ready([*overrides, "runtime=superlink", "deployment.rehearsal=true"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: everything is stopped
    folder = create_run_dir(experiment)
    with Rehearsal(experiment, overrides, folder, say=say) as rehearsal:
        rehearsal.watch(timeout_s=TIMEOUT_S)
    say("everything is stopped\n\nthe same in one process:")
    difference = compare_with_simulation(rehearsal.run_dir, overrides, folder)
    say(f"largest difference of the two adapters: {difference:.1e} (allowed: {LARGEST_DIFFERENCE:g})")
    say(f"report in {rehearsal.run_dir / 'report.html'}")
    if difference > LARGEST_DIFFERENCE:
        raise InputError(
            f"Expected the federation and the simulation to agree to {LARGEST_DIFFERENCE:g}, got {difference:.1e}"
        )


def compare_with_simulation(run_dir: Path, overrides: list[str], folder: Path) -> float:
    """Simulate the experiment of a run, and return the largest difference of any number of the two adapters."""
    from fedlr.simulations.simulate import simulate

    experiment: Experiment = compose_experiment([*overrides, *ALONE, f"tracking.output_dir={folder / 'simulation'}"])
    simulated = simulate(experiment, say=lambda line: None)
    summaries = [read_json(path / "summary.json") for path in (run_dir, simulated)]
    for what, summary in zip(("federation", "simulation"), summaries, strict=True):
        metric = Metric(**summary["metric"])
        value = "not finite" if summary["final_score"] is None else metric.text(summary["final_score"])
        say(f"  {what:<11} {metric.name} {value}   {summary['seconds']:.1f} s")
    return adapter_difference(run_dir / "adapter", simulated / "adapter")


def adapter_difference(one: Path, other: Path) -> float:
    """Return the largest difference of any number of two exported adapters.

    Raises:
        InputError: they are of different shapes.
    """
    tensors = [load_file(os.fspath(path / "adapter_model.safetensors")) for path in (one, other)]
    shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in tensors]
    if shapes[0] != shapes[1]:
        raise InputError(f"Expected two adapters of the same shapes, got {shapes[0]} and {shapes[1]}")
    return max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in tensors[0])
