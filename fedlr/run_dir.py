"""A run directory: it appears with the first result and every file in it is whole.

`metrics.jsonl` and `clients.jsonl` grow by whole lines; the other files are written once, under a temporary name first.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import yaml

from fedlr import __version__
from fedlr.errors import InputError
from fedlr.experiment import CONFIGS, Experiment

LEDGER = "ledger.jsonl"
IDENTITY = "identity.json"  # of an experiment that devices take part in: they know it by its id
PACKAGES = ("torch", "opacus", "peft", "transformers", "flwr", "dp-accounting", "datasets", "numpy")


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
            raise InputError(
                f"Expected tracking.output_dir to be a folder that can be written, got "
                f"{experiment.tracking.output_dir!r}: {error.strerror}"
            ) from error
        return path
    raise FileExistsError(f"Expected a free name below {parent}, found none for {stamp}")


def new_identity(seed: int) -> dict[str, Any]:
    """Return the id by which devices will know an experiment, and the seed of what is public."""
    return {"experiment_id": token_hex(16), "seed": seed}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or absent."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Mapping[str, Any]) -> str:
    """Return indented JSON in which a list of objects has a line an object: thousands of clients stay a table.

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
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
    return json.dumps(value, indent=2).replace("\n", "\n  ")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        InputError: if there is none, or it is broken.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Expected a finished run with a readable {path.name}, got {path} ({error})") from error
    return value


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines, all in one write: a buffer would cut a long line in two where a run is killed."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def write_origin(run_dir: Path, experiment: Experiment) -> None:
    """Write the resolved configuration and the versions that ran it."""
    write_text(run_dir / "config.yaml", yaml.safe_dump(experiment.resolved(), sort_keys=False))
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    origin = {"fedlr": __version__, "git": git_revision(), "python": platform.python_version(), **versions}
    write_json(run_dir / "versions.json", origin)


def git_revision() -> str | None:
    """Return the commit of the source tree, marked when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
