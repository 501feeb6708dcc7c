"""Checkpoints: what a server carries from round to round, on disk, so that a run that was killed goes on.

`checkpoints/round-00007/` is the state after 7 rounds, a sealed folder (`runs.verified_folder`). The last three are
kept. The ledger is no part of them: whoever restores an old state must not restore an old spending with it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlr.adapters.state import SIDE_A, SIDE_B, AdapterState, LoraFactors, Slot, side_tensors
from fedlr.errors import InputError
from fedlr.rounds.round import ServerState
from fedlr.runs.verified_folder import Corrupt, read_sealed, remove_sealed, sealed_names, write_sealed

NUM_KEPT = 3
PREFIX = "round-"
ADAPTER, SIDE, MEMORY, MORE = "adapter", "side", "memory-", "more-"


@dataclass(frozen=True)
class Checkpoint:
    """A state, the facts that were written with it, and tensors by the names that the writer gave them."""

    state: ServerState
    facts: Mapping[str, Any]
    more: Mapping[str, Mapping[Slot, Tensor]] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: ServerState,
    facts: Mapping[str, Any],
    *,
    more: Mapping[str, Mapping[Slot, Tensor]] | None = None,
) -> Path:
    """Write a state as `folder/round-NNNNN/` and return that path; older ones than the last three are removed.

    A state that was saved for the same round is replaced, and those of later rounds are removed: they belong to a
    future that is not this one's.

    Raises:
        InputError: the disk is full or cannot be written; the checkpoints before are whole.
        ValueError: the facts are no JSON.
    """
    adapter, path = state.adapter, checkpoint_path(folder, state.round_index)
    tensors = {ADAPTER: adapter.tensors, SIDE: side_tensors(adapter.side)}
    tensors |= {MEMORY + name: slots for name, slots in adapter.memory.items()}
    tensors |= {MORE + name: slots for name, slots in (more or {}).items()}
    about = {"round_index": state.round_index, "scale": adapter.scale, "adapter_sha256": adapter.fingerprint()}
    write_sealed(path, tensors, {**about, "facts": dict(facts)})
    saved = checkpoint_rounds(folder)
    past = [round_index for round_index in saved if round_index <= state.round_index]
    for round_index in set(saved) - set(past[-NUM_KEPT:]):
        remove_sealed(checkpoint_path(folder, round_index))
    return path


def latest_checkpoint(folder: Path, *, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is intact; None where none was ever written.

    Raises:
        Corrupt: there are checkpoints, and all are damaged; the text names what is wrong with the newest.
        InputError: another version of fedlr wrote them.
    """
    rounds, damage = checkpoint_rounds(folder), ""
    for round_index in reversed(rounds):
        try:
            checkpoint = read_checkpoint(checkpoint_path(folder, round_index))
        except Corrupt as error:
            damage = damage or str(error)
            say(f"the checkpoint of round {round_index} is damaged: {error}")
        else:
            if damage:
                say(f"going on from the one before it, of round {round_index}")
            return checkpoint
    if rounds:
        raise Corrupt(
            f"Expected an intact checkpoint in {folder}, got {len(rounds)} damaged ones; the newest: {damage}"
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return one checkpoint, verified.

    Raises:
        Corrupt: it is damaged.
        InputError: there is none, or another version of fedlr wrote it.
    """
    tensors, about = read_sealed(path)
    try:
        side = tensors[SIDE]
        layers = {slot.path: LoraFactors(side[Slot(slot.path, SIDE_A)], side[Slot(slot.path, SIDE_B)]) for slot in side}
        scale, round_index, facts = float(about["scale"]), about["round_index"], about["facts"]
        adapter = AdapterState(tensors[ADAPTER], scale, side=layers, memory=_named(tensors, MEMORY))
        found = adapter.fingerprint()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise Corrupt(f"Expected the state of a run in {path}, got other content ({type(error).__name__})") from error
    if found != about.get("adapter_sha256"):
        raise Corrupt(f"Expected the adapter {about.get('adapter_sha256')!s:.16}... in {path}, got another")
    if checkpoint_path(path.parent, round_index if type(round_index) is int else -1).name != path.name:
        raise Corrupt(f"Expected the round of its name in {path}, got {round_index!r:.40}")
    if not isinstance(facts, dict):
        raise Corrupt(f"Expected facts by name in {path}, got {type(facts).__name__}")
    return Checkpoint(ServerState(adapter, round_index), facts, _named(tensors, MORE))


@contextmanager
def reading_facts(run_dir: Path) -> Iterator[None]:
    """Turn what reading another program's facts raises into one line.

    Raises:
        InputError: which names the run.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"Expected the facts of a run in the checkpoints of {run_dir}, got {type(error).__name__}: {error!s:.80}"
        ) from error


def checkpoint_rounds(folder: Path) -> list[int]:
    """Return the rounds of the checkpoints in a folder, intact or not, ascending."""
    names = (name.removeprefix(PREFIX) for name in sealed_names(folder) if name.startswith(PREFIX))
    return sorted(int(name) for name in names if name.isdecimal())


def checkpoint_path(folder: Path, round_index: int) -> Path:
    """Return where the state after that many rounds is.

    >>> checkpoint_path(Path("checkpoints"), 7).as_posix()
    'checkpoints/round-00007'
    """
    return folder / f"{PREFIX}{round_index:05d}"


def _named(tensors: Mapping[str, Mapping[Slot, Tensor]], prefix: str) -> dict[str, Mapping[Slot, Tensor]]:
    return {name.removeprefix(prefix): slots for name, slots in tensors.items() if name.startswith(prefix)}
