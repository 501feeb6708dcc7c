"""`fedlr simulate`, `resume`, `plan`, `compare`, `report`, `statement`: the researcher's commands.

Overrides are Hydra's: `fedlr simulate experiment=demo privacy.epsilon=3`, and `-m` runs every combination of
comma-separated values: `fedlr simulate experiment=tiny -m method=fedsvd,ffa_lora seed=1,2,3`.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.runs.commands import command as any_command
from fedlr.runs.commands import option, ready

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

MOST_RUNS = 2_000  # of a sweep
MULTIRUN = ("-m", "--multirun")
COMPARISON, SUMMARY = "comparison.html", "summary.json"
command = partial(any_command, interrupted="stopped; `fedlr resume RUN_DIR` finishes a run from its last checkpoint")


@command
def simulate(arguments: list[str]) -> None:
    """Run an experiment: fedlr simulate experiment=NAME [KEY=VALUE ...] [-m KEY=V1,V2 ...]

    experiments: demo (real text, minutes), study (for sweeps over methods and seeds), tiny (seconds), fedsvd_paper (a
    GPU and a hub).
    -m, --multirun runs every combination of comma-separated values and ends with one table.
    """
    jobs = expand(arguments)
    experiments = [ready(overrides) for overrides in jobs]
    for experiment in experiments:
        check_output_dir(experiment)
    from fedlr.runs.report import comparison_table, write_comparison

    run_dirs = run_all(jobs, experiments)
    if run_dirs:
        say(f"\n{comparison_table(run_dirs)}")
    if len(run_dirs) > 1:
        say(f"comparison in {write_comparison(run_dirs, free_name(shared_folder(run_dirs) / COMPARISON))}")
    elif run_dirs:
        say(f"report in {run_dirs[0] / 'report.html'}")
    if failed := len(jobs) - len(run_dirs):
        raise InputError(f"{failed} of {len(jobs)} runs failed; the reasons are above")


@command
def resume(arguments: list[str]) -> None:
    """Finish a run that was killed, from its latest checkpoint: fedlr resume RUN_DIR [--own-part PATH ...]

    With seeded randomness the results are those of an uninterrupted run. Configuration, versions, data and base model
    must be the same, and the ledger the newest. A directory that somebody sent runs no code of theirs: functions of
    your own that the run's configuration names are imported only if you name them here.
    """
    from fedlr.runs.directory import recorded_experiment

    own_parts = []
    while (own_part := option(arguments, "--own-part", "the name of a function of your own")) is not None:
        own_parts.append(own_part)
    run_dir = existing_run(only_one(arguments))
    go_offline(recorded_experiment(run_dir, own_parts=own_parts).runtime.offline)
    from simulations.resume import resume as finish

    finish(run_dir, say=say, own_parts=own_parts)
    say(f"report in {run_dir / 'report.html'}")


@command
def plan(arguments: list[str]) -> None:
    """Say what an experiment will spend, before it runs: fedlr plan experiment=NAME [KEY=VALUE ...]

    Epsilon for expected and for worst-case participation, bytes a round, memory and time on this machine.
    """
    experiments = [ready(overrides) for overrides in expand(arguments)]
    from simulations.plan import make_plan

    for number, experiment in enumerate(experiments):
        say(("\n" if number else "") + make_plan(experiment))


@command
def compare(arguments: list[str]) -> None:
    """Put finished runs side by side: fedlr compare RUN_DIR RUN_DIR ... [--against METHOD] [--metric NAME] [--out FILE]

    A folder that holds runs, such as outputs/NAME, stands for all finished ones in it.
    --against METHOD pairs the runs of that method with all others by seed, data and privacy, and adds the mean
    difference of every arm with its paired 95 % interval, as a table and a picture.
    --metric NAME compares by balanced_accuracy, macro_f1 or auc instead of accuracy.
    Without --out the page is comparison.html here, or comparison-2.html and so on: nothing is overwritten.
    """
    from fedlr.runs.report import comparison_table, write_comparison

    against, named = option(arguments, "--against", "a method"), option(arguments, "--out", "a file name")
    metric = option(arguments, "--metric", "the name of a score") or "accuracy"
    out = free_name(Path(COMPARISON)) if named is None else new_page(named)
    run_dirs = list(dict.fromkeys(run_dir for argument in arguments for run_dir in finished_runs(argument)))
    if len(run_dirs) < 2:
        raise InputError(f"Expected two or more run directories, or a folder of them, got {len(run_dirs)}")
    print(comparison_table(run_dirs, against=against, metric=metric))
    print(f"comparison in {write_comparison(run_dirs, out, against=against, metric=metric)}")


@command
def report(arguments: list[str]) -> None:
    """Draw report.html again from a run's files: fedlr report RUN_DIR"""
    from fedlr.runs.report import write_report

    print(f"report in {write_report(existing_run(only_one(arguments)))}")


@command
def statement(arguments: list[str]) -> None:
    """Recompute the privacy statement from the ledger alone: fedlr statement RUN_DIR

    Prints it as JSON, and fails if the run's privacy.json says anything else.
    """
    from fedlr.privacy.statement import recompute

    print(json.dumps(recompute(existing_run(only_one(arguments))), indent=2))


def run_all(jobs: Sequence[Sequence[str]], experiments: Sequence["Experiment"]) -> list[Path]:
    """Run every experiment and return the directories; in a sweep, one that cannot start does not stop the others."""
    from simulations.simulate import simulate as run

    run_dirs = []
    for number, (overrides, experiment) in enumerate(zip(jobs, experiments, strict=True), start=1):
        title = f"[{number}/{len(jobs)}] {' '.join(overrides)}"
        if len(jobs) > 1:
            say(f"\n{title}")
        try:
            run_dirs.append(run(experiment, say=say))
        except InputError as error:
            if len(jobs) == 1:
                raise
            print(f"{title}: {error}", file=sys.stderr, flush=True)
        else:
            say(f"\nresults in {run_dirs[-1]}")
    return run_dirs


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run, the last swept key changing fastest.

    >>> expand(["name=x", "-m", "seed=1,2"])
    [['name=x', 'seed=1'], ['name=x', 'seed=2']]
    """
    from fedlr.config.schema import parse_overrides

    texts = [argument for argument in arguments if argument not in MULTIRUN]
    if flags := [text for text in texts if text.startswith("-")]:
        raise InputError(f"Expected KEY=VALUE or {' or '.join(MULTIRUN)}, got {flags[0]!r}")
    overrides = parse_overrides(texts)
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept and len(texts) == len(arguments):
        typed = str(swept[0].input_line)
        key, _, value = typed.partition("=")
        raise InputError(f"Expected -m to run several values, got {typed} without it; a list is {key}=[{value}]")
    keys = [override.key_or_group for override in overrides]
    if twice := [override.key_or_group for override in swept if keys.count(override.key_or_group) > 1]:
        raise InputError(f"Expected a key with several values once, got {twice[0]} again")
    choices = [
        [f"{o.get_key_element()}={value}" for value in itertools.islice(o.sweep_string_iterator(), MOST_RUNS + 1)]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
    ]
    if math.prod(map(len, choices)) > MOST_RUNS:
        raise InputError(f"Expected a sweep of at most {MOST_RUNS:,} runs, got more: sweep in parts")
    return [list(combination) for combination in itertools.product(*choices)]


def check_output_dir(experiment: "Experiment") -> None:
    """Refuse a folder that cannot be made, before the work of a run."""
    wanted = experiment.tracking.output_dir
    place = Path(wanted) / experiment.name
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
    except OSError as error:
        raise InputError(
            f"Expected tracking.output_dir to be a folder that can be made, got {shown(wanted)}: {error.strerror}"
        ) from error
    if not place.is_dir():
        raise InputError(f"Expected tracking.output_dir to be a folder, got {wanted!r}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"Expected tracking.output_dir to be writable, got {wanted!r}: {place} is not")


def shared_folder(run_dirs: Sequence[Path]) -> Path:
    """Return where a comparison of the runs belongs: outputs/NAME for one name, outputs for several."""
    names = {run_dir.parent for run_dir in run_dirs}
    return names.pop() if len(names) == 1 else run_dirs[0].parent.parent


def free_name(path: Path) -> Path:
    """Return the path, or with -2, -3 and so on where it is taken: a comparison never replaces another.

    >>> free_name(Path("no-such-folder/comparison.html")).name
    'comparison.html'
    """
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def new_page(argument: str) -> Path:
    """Return the path of a page that is to be written."""
    path = usable_path(argument)
    if path.exists():
        raise InputError(f"Expected --out to be a new file, got {argument!r}, which exists")
    if path.suffix != ".html" or not path.parent.is_dir():
        raise InputError(f"Expected --out to be an .html file in a folder that exists, got {argument!r}")
    return path


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(line, flush=True)


def usable_path(argument: str) -> Path:
    """Return a path that the system can look for."""
    path = Path(argument)
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"Expected a path that this system takes, got {shown(argument)}: {error.strerror}") from error
    return path


def existing_run(argument: str) -> Path:
    """Return a run's directory."""
    path = usable_path(argument)
    if not path.is_dir():
        raise InputError(f"Expected a run directory (outputs/NAME/TIME), got {argument!r}")
    return path


def finished_runs(argument: str) -> list[Path]:
    """Return a run's directory, or the finished ones in a folder of runs, by their time."""
    path = existing_run(argument)
    if (path / SUMMARY).exists() or not any(path.glob(f"*/{SUMMARY}")):
        return [path]
    runs = sorted(run_dir for run_dir in path.iterdir() if (run_dir / "config.yaml").exists())
    done = [run_dir for run_dir in runs if (run_dir / SUMMARY).exists()]
    if len(done) < len(runs):
        say(f"note: {len(runs) - len(done)} of {len(runs)} runs in {path} are not finished, and are left out")
    return done


def only_one(arguments: Sequence[str]) -> str:
    """Return the single argument of a command."""
    if len(arguments) != 1:
        raise InputError(f"Expected one run directory, got {len(arguments)} arguments")
    return arguments[0]
