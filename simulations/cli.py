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
MOST_JOBS = 256  # of them side by side
MULTIRUN = ("-m", "--multirun")
COMPARISON, SUMMARY, AUDIT = "comparison.html", "summary.json", "audit.json"
command = partial(any_command, interrupted="stopped; `fedlr resume RUN_DIR` finishes a run from its last checkpoint")


@command
def simulate(arguments: list[str]) -> None:
    """Run an experiment: fedlr simulate experiment=NAME [KEY=VALUE ...] [-m KEY=V1,V2 ... [--jobs N]] [--skip-done]

    experiments: demo (real text, minutes), study (for sweeps over methods and seeds), tiny (seconds), fedsvd_paper (a
    GPU and a hub).
    -m, --multirun runs every combination of comma-separated values and ends with one table.
    --jobs N has N runs side by side, each in a process of its own; their results are the same as alone.
    --skip-done repeats no finished run of the same configuration and seed, and finishes one that was cut off: a sweep
    that was interrupted goes on.
    --tuned FILE takes the settings that `fedlr tune` chose for each arm.
    """
    num_jobs, skip_done = jobs_option(arguments), flag(arguments, "--skip-done")
    tuned = option(arguments, "--tuned", "a file of `fedlr tune`")
    jobs = expand(arguments)
    if tuned is not None:
        from fedlr.runs.tuned import read_tuned

        choice = read_tuned(usable_path(tuned))
        jobs = [[*overrides, *choice.words_of(overrides)] for overrides in jobs]
    experiments = [ready(overrides) for overrides in jobs]
    for experiment in experiments:
        check_output_dir(experiment)
        if experiment.privacy.trials is not None:
            raise InputError(
                f"Expected privacy.trials=null to simulate, got {experiment.privacy.trials:g}: trials are of fedlr tune"
            )
    check_side_by_side(experiments, num_jobs)
    from fedlr.simulations.sweep import run_sweep

    found = run_sweep(jobs, experiments, num_jobs=num_jobs, skip_done=skip_done, say=say)
    from fedlr.runs.report import comparison_table, write_comparison  # draws: not before there is something to draw

    run_dirs = [run_dir for run_dir in found if run_dir is not None]
    if run_dirs:
        say(f"\n{comparison_table(run_dirs)}")
    if len(run_dirs) > 1:
        say(f"comparison in {write_comparison(run_dirs, free_name(shared_folder(run_dirs) / COMPARISON))}")
    elif run_dirs:
        say(f"report in {run_dirs[0] / 'report.html'}")
    if failed := len(jobs) - len(run_dirs):
        raise InputError(f"{failed} of {len(jobs)} runs failed; the reasons are above")


@command
def tune(arguments: list[str]) -> None:
    """Choose settings on validation rows: fedlr tune experiment=NAME --grid KEY=V1,V2 ... --on validation [-m KEY=A,B]

    Runs the grid for every seed and every arm (the other keys that -m sweeps), each arm with as many tries, scored on
    the rows that data.num_validation or data.validation_path set apart, and writes what was best for each arm into
    tuned.yaml, which `fedlr simulate --tuned FILE` takes. The runs lie in outputs/NAME-tune; a grid that was
    interrupted goes on. --jobs N has N runs side by side; --out FILE names another file.
    In a private run each try spends a budget of its own on the same rows, and tuned.yaml tells of all of them: their
    epsilons add up. privacy.trials=MEAN chooses the best of a random number of trials instead, deletes the others, and
    states the epsilon of the choice; the chosen run is in outputs/NAME-selection.
    """
    from fedlr.runs.tuned import write_tuned
    from fedlr.simulations.sweep import run_sweep
    from fedlr.simulations.tune import ON_VALIDATION, check_on, chosen, grid_of, runs_of, told

    typed = list(arguments)
    points = options(arguments, "--grid", "KEY=VALUE,VALUE")
    check_on(option(arguments, "--on", "the rows to choose on"))
    num_jobs = jobs_option(arguments, is_sweep=True)
    named = new_file(option(arguments, "--out", "a file name"), "--out", ".yaml")
    words = [word for word in arguments if word not in MULTIRUN]
    grid = grid_of(words, points)
    expand(arguments)  # refuses several values of a key without -m
    jobs = expand([*words, *points, "-m"])
    if ready([*jobs[0], *ON_VALIDATION]).privacy.trials is not None:
        from fedlr.simulations.private_tune import choose_privately

        if grid.arms or num_jobs > 1 or named is not None or len(expand(arguments)) > 1:
            raise InputError("Expected a --grid alone with privacy.trials, got -m, --jobs or --out: it is one choice")
        return say(f"the chosen run is {choose_privately(jobs, command=typed, say=say)}")
    jobs = runs_of(jobs, name=ready(jobs[0]).name)
    out = named or new_file("tuned.yaml", "--out", ".yaml")
    assert out is not None
    experiments = [ready(overrides) for overrides in jobs]
    check_side_by_side(experiments, num_jobs)
    found = run_sweep(jobs, experiments, num_jobs=num_jobs, skip_done=True, say=say)
    tuned = chosen(grid, jobs, found, command=typed)
    write_tuned(tuned, out)
    say(f"\n{told(tuned)}\nwrote {out}; `fedlr simulate --tuned {out}` takes it")


@command
def resume(arguments: list[str]) -> None:
    """Finish a run that was killed, from its latest checkpoint: fedlr resume RUN_DIR [--own-part PATH ...]

    With seeded randomness the results are those of an uninterrupted run. Configuration, versions, data and base model
    must be the same, and the ledger the newest. A directory that somebody sent runs no code of theirs: functions of
    your own that the run's configuration names are imported only if you name them here.
    """
    from fedlr.runs.directory import recorded_experiment

    own_parts = options(arguments, "--own-part", "the name of a function of your own")
    run_dir = existing_run(only_one(arguments))
    go_offline(recorded_experiment(run_dir, own_parts=own_parts).runtime.offline)
    from fedlr.simulations.resume import resume as finish

    finish(run_dir, say=say, own_parts=own_parts)
    say(f"report in {run_dir / 'report.html'}")


@command
def plan(arguments: list[str]) -> None:
    """Say what an experiment will spend, before it runs: fedlr plan experiment=NAME [KEY=VALUE ...]

    Epsilon for expected and for worst-case participation, bytes a round, memory and time on this machine.
    """
    experiments = [ready(overrides) for overrides in expand(arguments)]
    from fedlr.simulations.plan import make_plan

    for number, experiment in enumerate(experiments):
        say(("\n" if number else "") + make_plan(experiment))


@command
def compare(arguments: list[str]) -> None:
    """Put finished runs side by side: fedlr compare RUN_DIR RUN_DIR ... [--against METHOD] [--metric NAME] [--out FILE]

    A folder that holds runs, such as outputs/NAME, stands for all finished ones in it.
    --against METHOD pairs the runs of that method with all others by seed, data and privacy, and adds the mean
    difference of every arm with its paired 95 % interval, as a table and a picture.
    --metric NAME compares by accuracy, balanced_accuracy, macro_f1 or auc instead of what the task puts first.
    --latex FILE writes the table of a paper (booktabs): methods by data and epsilon, mean and standard deviation over
    seeds, bold where the seeds say so. --csv FILE writes a line a run. --svg FOLDER writes the pictures as files.
    Without --out the page is comparison.html here, or comparison-2.html and so on: nothing is overwritten.
    """
    from fedlr.runs.report import PaperFiles, comparison_table, write_comparison

    against, named = option(arguments, "--against", "a method"), option(arguments, "--out", "a file name")
    metric = option(arguments, "--metric", "the name of a score")
    files = PaperFiles(
        csv=new_file(option(arguments, "--csv", "a file name"), "--csv", ".csv"),
        latex=new_file(option(arguments, "--latex", "a file name"), "--latex", ".tex"),
        svg=new_folder(option(arguments, "--svg", "a folder"), "--svg"),
    )
    out = new_file(named, "--out", ".html") or free_name(Path(COMPARISON))
    run_dirs = list(dict.fromkeys(run_dir for argument in arguments for run_dir in finished_runs(argument)))
    if len(run_dirs) < 2:
        raise InputError(f"Expected two or more run directories, or a folder of them, got {len(run_dirs)}")
    print(comparison_table(run_dirs, against=against, metric=metric))
    for path in files.write(run_dirs, metric=metric, against=against):
        print(f"wrote {path}")
    print(f"comparison in {write_comparison(run_dirs, out, against=against, metric=metric)}")


@command
def report(arguments: list[str]) -> None:
    """Draw report.html again from a run's files: fedlr report RUN_DIR"""
    from fedlr.runs.report import write_report

    print(f"report in {write_report(existing_run(only_one(arguments)))}")


@command
def statement(arguments: list[str]) -> None:
    """Recompute the privacy statement from the ledger alone: fedlr statement RUN_DIR [--verify [--roster FILE]]

    Prints it as JSON, and fails if the run's privacy.json says anything else. What devices report of ledgers of their
    own cannot be computed here: it is printed as it stands, and --verify checks who signed it, with --roster against
    the keys that the server enrolled.
    """
    from fedlr.privacy.statement import recompute
    from fedlr.simulations.signatures import is_reported, stated, verify

    roster, is_checked = option(arguments, "--roster", "the server's roster"), flag(arguments, "--verify")
    run_dir = existing_run(only_one(arguments))
    if roster is not None and not is_checked:
        raise InputError(f"Expected --verify beside --roster {shown(roster)}, got none")
    found = (
        stated(run_dir) if is_reported(run_dir) else recompute(run_dir, say=lambda line: print(line, file=sys.stderr))
    )
    if not is_checked:
        print(json.dumps(found, indent=2))
        return
    for line in verify(run_dir, None if roster is None else Path(roster)):
        print(line)


def options(arguments: list[str], name: str, what: str) -> list[str]:
    """Take every option of that name out of the arguments and return their values."""
    found = []
    while (value := option(arguments, name, what)) is not None:
        found.append(value)
    return found


def jobs_option(arguments: list[str], *, is_sweep: bool = False) -> int:
    """Take --jobs N out of the arguments; 1 without it.

    >>> jobs_option(words := ["-m", "--jobs", "2", "seed=1,2"]), words
    (2, ['-m', 'seed=1,2'])
    """
    typed = option(arguments, "--jobs", "a number of runs side by side")
    if typed is None:
        return 1
    if not (typed.isascii() and typed.isdigit() and 1 <= int(typed[:9]) <= MOST_JOBS):
        raise InputError(f"Expected --jobs to be a number from 1 to {MOST_JOBS}, got {shown(typed)}")
    if not (is_sweep or set(MULTIRUN) & set(arguments)):
        raise InputError(f"Expected -m beside --jobs {typed}, got one run: a sweep has several values of a key")
    return int(typed)


def flag(arguments: list[str], name: str) -> bool:
    """Take an option without a value out of the arguments and return whether it was there."""
    is_there = name in arguments
    arguments[:] = [argument for argument in arguments if argument != name]
    return is_there


def check_side_by_side(experiments: Sequence["Experiment"], num_jobs: int) -> None:
    """Refuse runs side by side that start processes of their own."""
    for experiment in experiments if num_jobs > 1 else ():
        runtime = experiment.runtime
        if runtime.kind != "local" or runtime.num_processes > 1:
            way = f"runtime={runtime.kind}" if runtime.kind != "local" else "runtime.num_processes above 1"
            raise InputError(f"Expected --jobs 1 with {way}, got {num_jobs}: its processes share the cores already")


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


def new_file(argument: str | None, name: str, suffix: str) -> Path | None:
    """Return the path of a file that is to be written; None where none is wanted."""
    if argument is None:
        return None
    path = usable_path(argument)
    if path.exists():
        raise InputError(f"Expected {name} to be a new file, got {argument!r}, which exists")
    if path.suffix != suffix or not path.parent.is_dir():
        raise InputError(f"Expected {name} to be a {suffix} file in a folder that exists, got {argument!r}")
    return path


def new_folder(argument: str | None, name: str) -> Path | None:
    """Return the path of a folder that is there or can be made; None where none is wanted."""
    if argument is None:
        return None
    path = usable_path(argument)
    if not (path.is_dir() or (not path.exists() and path.parent.is_dir())):
        raise InputError(f"Expected {name} to be a folder, or a new one in a folder that exists, got {argument!r}")
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
    # An audit of a configuration leaves a folder without a run.
    runs = [run_dir for run_dir in runs if (run_dir / SUMMARY).exists() or not (run_dir / AUDIT).exists()]
    done = [run_dir for run_dir in runs if (run_dir / SUMMARY).exists()]
    if len(done) < len(runs):
        say(f"note: {len(runs) - len(done)} of {len(runs)} runs in {path} are not finished, and are left out")
    return done


def only_one(arguments: Sequence[str]) -> str:
    """Return the single argument of a command."""
    if len(arguments) != 1:
        raise InputError(f"Expected one run directory, got {len(arguments)} arguments")
    return arguments[0]
