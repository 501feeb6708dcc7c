"""What a run was asked for, and whether it is there already.

config.yaml has numbers where `auto` or null was asked for, so it does not tell whether a command was run before;
`asked.yaml` has the configuration as the command gave it. Two runs are the same when they were asked for the same,
but for what changes no number (how many threads, where the cache is, how often a checkpoint is written).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.models.products import library_of
from fedlr.runs.directory import FINISHED, VERSIONS, read_json, recorded_tree, summary_so_far, versions

ASKED = "asked.yaml"
# By section, the keys that change no number of a run.
CHANGE_NOTHING: Mapping[str, tuple[str, ...]] = {
    "data": ("fetched_by",),
    "model": ("fetched_by",),
    "runtime": ("num_workers", "num_processes", "memory_gb", "cache_dir", "offline"),
    "tracking": ("output_dir", "checkpoint_every", "tracker"),
}
# By section, the keys that came after runs were written, and what those runs did.
ADDED: Mapping[str, Mapping[str, Any]] = {
    "privacy": {
        "release_noise": "float",
        "mechanism": "dp_sgd",
        "bands": None,
        "ledger": None,
        "ledger_epsilon": None,
    },
}


@dataclass(frozen=True)
class Earlier:
    """A run that was asked for the same: finished, or cut off; `changed` says what is not as it was then."""

    run_dir: Path
    is_finished: bool
    problem: str | None
    changed: str | None


def write_asked(run_dir: Path, experiment: Experiment) -> None:
    """Write the configuration as it was asked for, before anything in it is found."""
    write_whole(run_dir / ASKED, yaml.safe_dump(experiment.resolved(), sort_keys=False))


def earlier_run(experiment: Experiment) -> Earlier | None:
    """Return a run of the same configuration and seed in the folder where this one would be written.

    A finished one comes before one that was cut off, and of each kind the latest. None where there is none, where the
    seed is null (each run is then another), and where a table of the data was changed since.
    """
    if experiment.seed is None:
        return None
    folder = Path(experiment.tracking.output_dir) / experiment.name
    found = [one for one in _same(folder, compared(experiment.resolved())) if not _has_newer_data(experiment, one)]
    library = library_of(experiment.runtime.matmul)
    described = (_described(run_dir, library) for run_dir in sorted(found))
    earlier = [one for one in described if one is not None]
    return next((one for one in reversed(earlier) if one.is_finished), earlier[-1] if earlier else None)


def compared(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys that change no number, and with those that were added since.

    >>> compared({"seed": 1, "runtime": {"num_workers": 2, "device": "cpu"}})
    {'seed': 1, 'runtime': {'device': 'cpu'}}
    """
    return {
        key: {k: v for k, v in {**ADDED.get(key, {}), **value}.items() if k not in CHANGE_NOTHING.get(key, ())}
        if isinstance(value, Mapping)
        else value
        for key, value in tree.items()
    }


def _same(folder: Path, wanted: Mapping[str, Any]) -> Iterator[Path]:
    plain = yaml.safe_load(yaml.safe_dump(wanted))
    for path in folder.glob(f"*/{ASKED}"):
        try:
            tree = recorded_tree(path)
        except InputError:
            continue  # cut off while it was written: no run that could be used
        if compared(_with_library(tree, plain)) == plain:
            yield path.parent


def _with_library(tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration that asks for the library that is wanted where it is from before there was a choice.

    Such a run multiplied with MKL; where that is another than now, `_other_versions` says so.
    """
    runtime = tree.get("runtime")
    if not isinstance(runtime, Mapping):
        return tree
    return {**tree, "runtime": {"matmul": wanted["runtime"]["matmul"], **runtime}}


def _described(run_dir: Path, library: str) -> Earlier | None:
    try:
        summary = summary_so_far(run_dir)
        changed = _other_versions(run_dir, library) if (run_dir / VERSIONS).exists() else None
    except InputError:
        return None  # a broken file: nothing to rely on
    problem = (summary or {}).get("problem")
    is_finished = summary is not None and summary[FINISHED] is True
    return Earlier(run_dir, is_finished, None if problem is None else str(problem), changed)


def _other_versions(run_dir: Path, library: str) -> str | None:
    then, now = {"matmul": "mkl", **read_json(run_dir / VERSIONS)}, {**versions(), "matmul": library}
    other = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
    return "; ".join(other) or None


def _has_newer_data(experiment: Experiment, run_dir: Path) -> bool:
    """Say whether a table that a run reads was written after it began; of what is no file nothing is known."""
    section = experiment.data.section() | {"test_path": experiment.data.test_path}
    named = [value for key, value in section.items() if key.endswith("path") and isinstance(value, str)]
    began = (run_dir / ASKED).stat().st_mtime
    files = [Path(name) for pattern in named for name in ([pattern, *glob(f"{pattern}/*")] + glob(pattern))]
    return any(path.stat().st_mtime > began for path in files if path.is_file())
