"""A run directory: it appears with the first result and every file in it is whole.

`metrics.jsonl` and `clients.jsonl` grow by whole lines; the other files are written once, under a temporary name first.
A run that was killed goes on in its directory, from a checkpoint: lines of later rounds are cut off then.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import yaml

from fedlr import __version__
from fedlr.config.parts import require_registered
from fedlr.config.schema import CONFIGS, Experiment, check_experiment
from fedlr.errors import InputError, PassingError
from fedlr.errors.messages import one_line, shown
from fedlr.files import append_whole, is_full, write_whole, writing
from fedlr.runs.plain_yaml import plain_yaml

LEDGER, METRICS, CLIENTS = "ledger.jsonl", "metrics.jsonl", "clients.jsonl"
SERVER_LEDGER = "server_ledger.jsonl"  # of the client unit
CLIENT_ACCURACY = "client_accuracy.json"
CONTACT_SHEET = "contact_sheet.json"
AUDIT = "audit.json"
SUMMARY, REPORT, FINISHED = "summary.json", "report.html", "finished"
VERSIONS = "versions.json"
CHECKPOINTS = "checkpoints"
IDENTITY = "identity.json"  # of an experiment that devices take part in: they know it by its id
PACKAGES = ("torch", "opacus", "peft", "transformers", "flwr", "dp-accounting", "datasets", "numpy")


class BeingWritten(InputError):
    """Another process writes the run."""


def create_run_dir(experiment: Experiment) -> Path:
    """Make `output_dir/name/time/`, never one that exists."""
    parent = Path(experiment.tracking.output_dir) / experiment.name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        path = parent / f"{stamp}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            refused = InputError(
                f"Expected tracking.output_dir to be a folder that can be written, got "
                f"{experiment.tracking.output_dir!r}: {error.strerror}"
            )
            if is_full(error):
                refused.exit_code = PassingError.exit_code
            raise refused from error
        return path
    raise FileExistsError(f"Expected a free name below {parent}, found none for {stamp}")


def new_identity(seed: int) -> dict[str, Any]:
    """Return the id by which devices will know an experiment, and the seed of what is public."""
    return {"experiment_id": token_hex(16), "seed": seed}


@contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Hold a run's directory, as no other process may write to it; the lock is gone when its holder dies.

    Raises:
        BeingWritten: another process holds it.
        InputError: it cannot be read.
    """
    try:
        folder = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"Expected a run directory that can be read, got {run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BeingWritten(
            f"Expected a run that no process is writing, got {run_dir}, which one is: wait for it"
        ) from error
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or absent."""
    write_whole(path, json_text(value) + "\n")


def json_text(value: Mapping[str, Any]) -> str:
    """Return indented JSON with a line for each object or list of a list: thousands of clients stay a table.

    >>> print(json_text({"name": "tiny", "clients": [{"client_id": 0, "counts": [3, 4]}, {"client_id": 1}]}))
    {
      "name": "tiny",
      "clients": [
        {"client_id": 0, "counts": [3, 4]},
        {"client_id": 1}
      ]
    }
    """
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {_indented(item)}" for key, item in value.items()) + "\n}"


def _indented(value: Any) -> str:
    if isinstance(value, list) and value and any(all(isinstance(i, kind) for i in value) for kind in (Mapping, list)):
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
    return json.dumps(value, indent=2).replace("\n", "\n  ")


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """Return what `new_identity` made for a run; None where there is none.

    Raises:
        InputError: it is broken.
    """
    path = run_dir / IDENTITY
    if not path.exists():
        return None
    found = read_json(path)
    name, seed = found.get("experiment_id"), found.get("seed")
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name) or type(seed) is not int or seed < 0:
        raise InputError(f"Expected the experiment_id and the seed of a run in {path}, got {shown(found)}")
    return found


def finish_run(run_dir: Path, summary: Mapping[str, Any], *, draw: Callable[[Path], object]) -> None:
    """Write summary.json, draw the report from the run's files, and say, last of all, that the run is finished.

    The key `finished` of summary.json alone says so: a disk that is full in between leaves a run to go on with.

    Raises:
        NotWritten: the disk refused one of them.
    """
    write_json(run_dir / SUMMARY, {**summary, FINISHED: False})
    draw(run_dir)
    mark_finished(run_dir, summary)


def mark_finished(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Say that nothing of a run is left to do; the last thing that is written."""
    write_json(run_dir / SUMMARY, {**summary, FINISHED: True})


def summary_so_far(run_dir: Path) -> dict[str, Any] | None:
    """Return summary.json of a run whose rounds are done, with whether it is finished; None before.

    Raises:
        InputError: it is broken.
    """
    if not (run_dir / SUMMARY).exists():
        return None
    summary = read_json(run_dir / SUMMARY)
    # Before it had the key, a run was finished when it had a report.
    return {FINISHED: (run_dir / REPORT).exists(), **summary}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, a file of a run.

    Raises:
        InputError: if there is none, or it is broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__} and no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        why = one_line(error)
        raise InputError(f"Expected a finished run with a readable {path.name}, got {path} ({why:.200})") from error
    return value


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines, all in one write: a buffer would cut a long line in two where a run is killed."""
    append_whole(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def cut_lines(path: Path, stays: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    """Cut JSON lines off, from the first that does not stay or is not whole, and return the others.

    Raises:
        InputError: a whole line is none of a run, or the file cannot be read.
    """
    kept: list[dict[str, Any]] = []
    size = 0
    for line in _whole_lines(path):
        try:
            row = json.loads(line)
            stays_here = stays(row)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            what = f"line {len(kept) + 1} of {path}"
            raise InputError(f"Expected a line that a run wrote in {what}, got {line[:40]!r}") from error
        if not stays_here:
            break
        kept.append(row)
        size += len(line)
    if path.exists():
        with writing(path):
            os.truncate(path, size)
    return kept


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that end, none where it is not there: the last may have been cut by a full disk."""
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise InputError(f"Expected lines in {path}, got: {error.strerror or error}") from error
    return [line for line in lines if line.endswith(b"\n")]


OWN_PART = (
    ": nothing that a run directory names is imported. If it is yours and you trust it, name it yourself: "
    "`fedlr resume RUN_DIR --own-part {name}`"
)


def recorded_experiment(run_dir: Path, *, own_parts: Collection[str] = ()) -> Experiment:
    """Return the configuration of a run, which may be a stranger's: it names parts of fedlr, or none but `own_parts`.

    Raises:
        InputError: its config.yaml is missing, broken, or of another version of fedlr, or names another part.
    """
    path = run_dir / "config.yaml"
    tree = recorded_tree(path)
    require_registered(tree, source=str(path), own_parts=own_parts, way_out=OWN_PART)
    return check_experiment(tree)


def recorded_tree(path: Path) -> dict[str, Any]:
    """Return a run's configuration as plain values.

    Raises:
        InputError: the file is missing or broken.
    """
    try:
        tree = plain_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = one_line(error)
        raise InputError(f"Expected a run directory with a readable {path.name}, got {path}: {why:.200}") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"Expected keys and values in {path}, got {type(tree).__name__}")
    return tree


def write_origin(run_dir: Path, experiment: Experiment) -> None:
    """Write the resolved configuration, the versions that ran it, and which library multiplied."""
    write_whole(run_dir / "config.yaml", yaml.safe_dump(experiment.resolved(), sort_keys=False))
    write_json(run_dir / VERSIONS, {**versions(), "matmul": experiment.runtime.matmul})


def versions() -> dict[str, str | None]:
    """Return the versions of all that a run's numbers depend on."""
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"fedlr": __version__, "git": git_revision(), "python": platform.python_version(), **packages}


def git_revision() -> str | None:
    """Return the commit of the source tree, marked when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
