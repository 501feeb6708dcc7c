"""`fedlr simulate`, `plan`, `compare`, `report`, `statement`: the researcher's commands.

Overrides are Hydra's: `fedlr simulate experiment=demo privacy.epsilon=3`, and `-m` runs every combination of
comma-separated values: `fedlr simulate experiment=tiny -m method=fedsvd,ffa_lora seed=1,2,3`.
"""

import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.errors import InputError

if TYPE_CHECKING:
    from fedlr.experiment import Experiment

MULTIRUN = ("-m", "--multirun")
Command = Callable[[Sequence[str]], int]


def command(function: Callable[[list[str]], None]) -> Command:
    """Make a command out of a function: bad input is one line and exit code 2, an interrupt is 130."""

    @wraps(function)
    def run(arguments: Sequence[str]) -> int:
        arguments = list(arguments)
        if {"-h", "--help"} & set(arguments):
            print(function.__doc__)
            return 0
        try:
            quiet_libraries()
            function(arguments)
        except InputError as error:
            print(f"fedlr {function.__name__}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nstopped; what was finished is in the run's directory, the ledger included", file=sys.stderr)
            return 130
        return 0

    return run


@command
def simulate(arguments: list[str]) -> None:
    """Run an experiment: fedlr simulate experiment=NAME [KEY=VALUE ...] [-m KEY=V1,V2 ...]

    experiments: demo (real text, minutes), tiny (seconds), fedsvd_paper (a GPU and a hub).
    -m, --multirun runs every combination of comma-separated values and ends with one table.
    """
    jobs = expand(arguments)
    experiments = [compose_offline(overrides) for overrides in jobs]
    from simulations.simulate import simulate as run

    run_dirs = []
    for number, (overrides, experiment) in enumerate(zip(jobs, experiments, strict=True), start=1):
        if len(jobs) > 1:
            print(f"\n[{number}/{len(jobs)}] {' '.join(overrides)}", flush=True)
        run_dirs.append(run(experiment, say=say))
        say(f"\nresults in {run_dirs[-1]}")
    from fedlr.report import comparison_table, write_comparison

    print()
    print(comparison_table(run_dirs))
    if len(run_dirs) > 1:
        page = Path(experiments[0].tracking.output_dir) / "comparison.html"
        print(f"comparison in {write_comparison(run_dirs, page)}")
    else:
        print(f"report in {run_dirs[0] / 'report.html'}")


@command
def plan(arguments: list[str]) -> None:
    """Say what an experiment will spend, before it runs: fedlr plan experiment=NAME [KEY=VALUE ...]

    Epsilon for expected and for worst-case participation, bytes a round, memory and time on this machine.
    """
    from simulations.plan import make_plan

    for overrides in expand(arguments):
        print(make_plan(compose_offline(overrides)))


@command
def compare(arguments: list[str]) -> None:
    """Put finished runs side by side: fedlr compare RUN_DIR RUN_DIR ... [--out comparison.html]"""
    from fedlr.report import comparison_table, write_comparison

    out = Path("comparison.html")
    if "--out" in arguments:
        place = arguments.index("--out")
        if place + 1 == len(arguments):
            raise InputError("Expected a file name after --out, got none")
        out = Path(arguments.pop(place + 1))
        arguments.pop(place)
    if len(arguments) < 2:
        raise InputError(f"Expected two or more run directories, got {len(arguments)}")
    run_dirs = [existing_run(argument) for argument in arguments]
    print(comparison_table(run_dirs))
    print(f"comparison in {write_comparison(run_dirs, out)}")


@command
def report(arguments: list[str]) -> None:
    """Draw report.html again from a run's files: fedlr report RUN_DIR"""
    from fedlr.report import write_report

    print(f"report in {write_report(existing_run(only_one(arguments)))}")


@command
def statement(arguments: list[str]) -> None:
    """Recompute the privacy statement from the ledger alone: fedlr statement RUN_DIR

    Prints it as JSON, and fails if the run's privacy.json says anything else.
    """
    from fedlr.privacy.statement import privacy_statement
    from simulations.run_dir import LEDGER, read_json

    run_dir = existing_run(only_one(arguments))
    told = read_json(run_dir / "privacy.json")
    if not (run_dir / LEDGER).exists() and told.get("epsilon", {}).get("maximum") == "inf":
        print(json.dumps(told, indent=2))
        return
    enrolled = range(read_json(run_dir / "summary.json")["num_clients"])
    recomputed = privacy_statement(run_dir / LEDGER, enrolled)
    print(json.dumps(recomputed, indent=2))
    if recomputed != told:
        raise InputError(f"Expected {run_dir / 'privacy.json'} to say what its ledger says, got another statement")


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run, the last swept key changing fastest.

    >>> expand(["name=x", "-m", "seed=1,2"])
    [['name=x', 'seed=1'], ['name=x', 'seed=2']]
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    texts = [argument for argument in arguments if argument not in MULTIRUN]
    if flags := [text for text in texts if text.startswith("-")]:
        raise InputError(f"Expected KEY=VALUE overrides or {' or '.join(MULTIRUN)}, got {flags[0]!r}")
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except HydraException as error:
        raise InputError(f"Expected KEY=VALUE overrides: {' '.join(str(error).split())}") from error
    swept = [override for override in overrides if override.is_sweep_override()]
    if swept and len(texts) == len(arguments):
        raise InputError(f"Expected -m to run several values, got {swept[0].input_line} without it")
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
    ]
    return [list(combination) for combination in itertools.product(*choices)]


def compose_offline(overrides: Sequence[str]) -> "Experiment":
    """Compose an experiment; offline, hub libraries are told so before anything asks them."""
    from fedlr.experiment import compose_experiment

    experiment = compose_experiment(overrides)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "1" if experiment.runtime.offline else "0"
    return experiment


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of the run's own lines; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|opacus|torch)\b")


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(line, flush=True)


def existing_run(argument: str) -> Path:
    """Return a run's directory."""
    path = Path(argument)
    if not path.is_dir():
        raise InputError(f"Expected a run directory (outputs/NAME/TIME), got {argument!r}")
    return path


def only_one(arguments: Sequence[str]) -> str:
    """Return the single argument of a command."""
    if len(arguments) != 1:
        raise InputError(f"Expected one run directory, got {len(arguments)} arguments")
    return arguments[0]
