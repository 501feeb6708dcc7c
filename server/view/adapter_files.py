"""Which adapters a run directory holds, and the bytes of one with their SHA-256.

- `adapters/round-00007.safetensors`: what the server released after 7 rounds, of every round
- `checkpoints/round-00007/adapter.safetensors`: of the last rounds, with its SHA-256 in `manifest.json`
- `adapter/adapter_model.safetensors`: of the last round, as PEFT names it, once the run has ended
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedlr.server.view.operator_pb2 import LAYOUT_CHECKPOINT, LAYOUT_PEFT, LAYOUT_RELEASED, AdapterHeader, Layout
from fedlr.server.view.refusals import NotThere, Unreadable
from fedlr.server.view.round_feed import SUMMARY
from fedlr.server.view.run_status import last_round

RELEASED, CHECKPOINTS, EXPORTED = "adapters", "checkpoints", "adapter/adapter_model.safetensors"
IN_CHECKPOINT, SIDE_IN_CHECKPOINT, MANIFEST = "adapter.safetensors", "side.safetensors", "manifest.json"
ROUND_NAME = re.compile(r"round-(\d{5,9})(\.safetensors)?")
SHOWN_ROUNDS = 5


@dataclass(frozen=True)
class AdapterFile:
    """A file that holds the adapter after `rounds_completed` rounds."""

    path: Path
    rounds_completed: int
    layout: Layout


def open_adapter(run_dir: Path, rounds_completed: int | None) -> tuple[AdapterHeader, FileIO]:
    """Open the adapter of a round (None: the latest), checked against its manifest if it has one.

    The header is true of the open file, whatever takes its place in the directory meanwhile. The caller closes it.

    Raises:
        NotThere: if there is none; the text says which rounds have one.
        Unreadable: if the file is not the one of its manifest.
    """
    found = find_adapter(run_dir, rounds_completed)
    try:
        file = FileIO(found.path)
    except FileNotFoundError:
        raise NotThere(f"the adapter of round {found.rounds_completed} was removed just now; ask again") from None
    try:
        return _header(found, file), file
    except BaseException:
        file.close()
        raise


def _header(found: AdapterFile, file: FileIO) -> AdapterHeader:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size_bytes = file.tell()
    if found.layout == LAYOUT_CHECKPOINT and sha256 != _sha256_of_manifest(found.path.parent):
        raise Unreadable(f"the adapter of round {found.rounds_completed} is not the one of its manifest")
    file.seek(0)
    return AdapterHeader(
        rounds_completed=found.rounds_completed, size_bytes=size_bytes, sha256=sha256, layout=found.layout
    )


def find_adapter(run_dir: Path, rounds_completed: int | None) -> AdapterFile:
    """Return where the adapter of a round is; None: of the latest, as PEFT names it if the run has ended.

    Raises:
        NotThere: if there is none; the text says which rounds have one.
    """
    by_round = _of_rounds(run_dir)
    exported = _exported(run_dir)
    if exported is not None:
        by_round.setdefault(exported.rounds_completed, exported)
    if rounds_completed is None and by_round:
        return exported or by_round[max(by_round)]
    if rounds_completed in by_round:
        return by_round[rounds_completed]
    wanted = "" if rounds_completed is None else f" of round {rounds_completed}"
    raise NotThere(f"no adapter{wanted}: the run has {spans(sorted(by_round))}")


def spans(rounds: list[int]) -> str:
    """Say which rounds a rising list holds, the latest spans if there are many.

    >>> spans([0, 1, 2, 7, 9, 10])
    'those of rounds 0-2, 7, 9-10'
    >>> spans([])
    'none yet'
    """
    runs: list[list[int]] = []
    for number in rounds:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    shown = ["..."] * (len(texts) > SHOWN_ROUNDS) + texts[-SHOWN_ROUNDS:]
    return f"those of rounds {', '.join(shown)}" if texts else "none yet"


def _of_rounds(run_dir: Path) -> dict[int, AdapterFile]:
    """Return the adapters that are kept by round: the released one before the checkpoint's."""
    folders = [(n, path) for n, path in _numbered(run_dir / CHECKPOINTS, suffix=None) if not _has_side(path)]
    checkpoints = {number: path / IN_CHECKPOINT for number, path in folders}
    released = _numbered(run_dir / RELEASED, suffix=".safetensors")
    found = {n: AdapterFile(path, n, LAYOUT_CHECKPOINT) for n, path in checkpoints.items() if path.exists()}
    return found | {n: AdapterFile(path, n, LAYOUT_RELEASED) for n, path in released}


def _numbered(folder: Path, *, suffix: str | None) -> Iterator[tuple[int, Path]]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        match = ROUND_NAME.fullmatch(name)
        if match and match[2] == suffix:
            yield int(match[1]), folder / name


def _exported(run_dir: Path) -> AdapterFile | None:
    """Return the adapter for PEFT. Before summary.json is there it may be half a file."""
    path = run_dir / EXPORTED
    if not (run_dir / SUMMARY).exists() or not path.exists():
        return None
    rounds_completed = last_round(run_dir).get("rounds_completed")
    if type(rounds_completed) is not int:
        raise Unreadable("the last line of metrics.jsonl is from another version")
    return AdapterFile(path, rounds_completed, LAYOUT_PEFT)


def _has_side(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a side product, without which its adapter is another function."""
    try:
        return bool(load_file(checkpoint / SIDE_IN_CHECKPOINT))
    except (OSError, SafetensorError):
        return False  # whatever is wrong with it, its manifest will tell


def _sha256_of_manifest(checkpoint: Path) -> str:
    """Return the SHA-256 that a checkpoint states for its adapter."""
    try:
        return str(json.loads((checkpoint / MANIFEST).read_bytes())["files"]["adapter"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Unreadable("the manifest of a checkpoint is missing or broken") from None
