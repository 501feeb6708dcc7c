"""Sealed folders: exact round trips, every damage seen, and crashes that leave the old folder or the new one.

A crash is an exception that no code of ours catches, at the n-th call that changes the disk, before the call or after
it, and for writes in the middle of it. What the machine had not synced when it lost power is checked on the order of
calls: every file and both folders are synced before or after the rename as they must be.

Mutants this file kills: a writer that writes in place, and one that removes the old folder first.
"""

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.runs import verified_folder as sealed
from fedlr.runs.verified_folder import Corrupt, read_sealed, remove_sealed, sealed_names, write_sealed

Groups = dict[str, dict[Slot, Tensor]]
CHANGES = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


class Crash(BaseException):
    """The process dies here."""


def groups(seed: int = 0) -> Groups:
    """Tensors of two groups, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    layers = {Slot(f"layer.{n}", role): torch.randn(2, 3, generator=generator) for n in range(2) for role in "BA"}
    return {"adapter": layers, "memory-momentum": {Slot("x", "v"): torch.randn(4, generator=generator).bfloat16()}}


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """All that a tensor is, comparable: NaN too."""
    return (
        tensor.dtype,
        tensor.shape,
        tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else [],
    )


def same(one: Groups, other: Groups) -> bool:
    """Whether two readings agree to the bit, in dtypes, shapes and orders too."""
    exact = [
        [(name, [(slot, bits(t)) for slot, t in slots.items()]) for name, slots in g.items()] for g in (one, other)
    ]
    return exact[0] == exact[1]


NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_read_is_what_was_written_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(dtype: torch.dtype, shape: list[int]) -> Tensor:
        raw = torch.randint(0, 256, (*shape, 8), generator=generator, dtype=torch.uint8)  # any bits: NaN, inf
        return (
            (raw % 2).bool()[..., 0]
            if dtype == torch.bool
            else raw.view(dtype)[..., 0].clone(memory_format=torch.contiguous_format)
        )

    slots = st.dictionaries(
        st.builds(Slot, NAMES, NAMES), st.builds(tensor, st.sampled_from(DTYPES), SHAPES), max_size=4
    )
    tensors = data.draw(st.dictionaries(NAMES, slots, max_size=3))
    facts = data.draw(st.dictionaries(NAMES, st.none() | st.floats(allow_nan=False, allow_infinity=False) | NAMES))
    folder = tmp_path_factory.mktemp("any") / "one"
    write_sealed(folder, tensors, facts)
    found, found_facts = read_sealed(folder)
    assert same(found, tensors) and found_facts == facts


def test_views_that_share_memory_come_back(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    write_sealed(tmp_path / "one", {"g": {Slot("a", "r"): whole.T, Slot("b", "r"): whole[:1]}}, {})
    found = read_sealed(tmp_path / "one")[0]["g"]
    assert found[Slot("a", "r")].equal(whole.T) and found[Slot("b", "r")].equal(whole[:1])


def flips(data: bytes, number: int, seed: int) -> Iterator[bytes]:
    """The data with one bit flipped, each time another."""
    draw = random.Random(seed)
    for place in draw.sample(range(8 * len(data)), min(number, 8 * len(data))):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def test_3000_flipped_bits_and_all_truncations_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_sealed(folder, groups(), {"round": 7})
    files = sorted(folder.iterdir())
    assert len(files) == 3
    seen = tried = 0
    for path in files:
        data = path.read_bytes()
        for changed in [
            *flips(data, 1000, seed=1),
            *(data[:size] for size in range(len(data))),
            data + b" ",
            data + b"\n",
        ]:
            path.write_bytes(changed)
            tried += 1
            with pytest.raises(Corrupt, match=path.name):
                read_sealed(folder)
            seen += 1
        path.write_bytes(data)
    assert seen == tried >= 3000 and same(read_sealed(folder)[0], groups())


def test_a_file_that_is_missing_or_too_many_is_named(tmp_path: Path) -> None:
    for path in ("adapter.safetensors", "manifest.json"):
        write_sealed(tmp_path / "one", groups(), {})
        (tmp_path / "one" / path).unlink()
        with pytest.raises(Corrupt, match=path):
            read_sealed(tmp_path / "one")
    write_sealed(tmp_path / "one", groups(), {})
    (tmp_path / "one" / "extra.txt").touch()
    with pytest.raises(Corrupt, match=r"extra\.txt"):
        read_sealed(tmp_path / "one")
    with pytest.raises(InputError, match="which is none") as error:
        read_sealed(tmp_path / "other")
    assert not isinstance(error.value, Corrupt)


class Disk:
    """Counts the calls that change the disk, and acts at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[int, str], str | None]) -> None:
        self.calls: list[tuple[str, str]] = []
        self._act, self._names = act, dict[int, str]()
        for name in CHANGES:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            target = self._names.get(args[0], "?") if isinstance(args[0], int) else str(args[0])
            self.calls.append((name, target))
            action = self._act(len(self.calls) - 1, name)
            if action == "before":
                raise Crash
            if action == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if action == "half" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])  # type: ignore[arg-type, call-overload]
                raise Crash
            found = real(*args, **options)
            if name == "open":
                self._names[found] = target  # type: ignore[index]
            if action:
                raise Crash
            return found

        return call


def calls_of(action: Callable[[], object]) -> list[tuple[str, str]]:
    """The calls of an action that change the disk, each with its file."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, lambda number, name: None)
        action()
    return disk.calls


def act_at(number: int, how: str, action: Callable[[], object]) -> None:
    """Do something whose call of that number does not come through."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, lambda n, name: how if n == number else None)
        action()


def prepared(folder: Path, *, replaces: bool) -> Callable[[], None]:
    """Return an action that writes a folder, of which an older one may be there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if replaces:
        write_sealed(folder, groups(1), {"which": "old"})
    return lambda: write_sealed(folder, groups(2), {"which": "new"})


def left_by_crashes(tmp_path: Path, *, replaces: bool) -> Iterator[Path]:
    """Write a folder, and die: once for every moment at which a writer can."""
    calls = calls_of(prepared(tmp_path / "counted" / "one", replaces=replaces))
    assert len(calls) >= (21 if replaces else 15)
    for number, how in itertools.product(range(len(calls)), ("before", "half", "after")):
        folder = tmp_path / f"{number}-{how}" / "one"
        action = prepared(folder, replaces=replaces)
        with pytest.raises(Crash):
            act_at(number, how, action)
        yield folder


@pytest.mark.parametrize("replaces", [False, True])
def test_a_crash_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path, replaces: bool) -> None:
    assert outcomes(tmp_path, replaces=replaces) == ({"old", "new"} if replaces else {"none", "new"})


def outcomes(tmp_path: Path, *, replaces: bool) -> set[str]:
    """Return what was found after crashes; whatever it was, the next write leaves one folder and nothing else."""
    found = set()
    for folder in left_by_crashes(tmp_path, replaces=replaces):
        if sealed_names(folder.parent):
            tensors, facts = read_sealed(folder)
            assert same(tensors, groups({"old": 1, "new": 2}[facts["which"]]))
        found.add(facts["which"] if sealed_names(folder.parent) else "none")
        write_sealed(folder, groups(3), {})
        assert os.listdir(folder.parent) == ["one"] and same(read_sealed(folder)[0], groups(3))
    return found


def in_place(folder: Path, tensors: Groups, facts: dict[str, str]) -> None:
    """Mutant: writes into the folder itself."""
    files = {group: sealed._file(group, slots) for group, slots in tensors.items()}
    folder.mkdir(exist_ok=True)
    for name, data in [*files.values(), (sealed.MANIFEST, sealed._manifest(list(files), files, facts))]:
        (folder / name).unlink(missing_ok=True)
        sealed._write(folder / name, data)


def removed_first(folder: Path, tensors: Groups, facts: dict[str, str]) -> None:
    """Mutant: removes the old folder before it writes the new one."""
    remove_sealed(folder)
    sealed.write_sealed(folder, tensors, facts)


@pytest.mark.parametrize("mutant", [in_place, removed_first])
def test_the_crashes_find_writers_that_are_not_atomic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None]
) -> None:
    monkeypatch.setitem(globals(), "write_sealed", mutant)
    with pytest.raises((AssertionError, InputError)):
        assert "none" not in outcomes(tmp_path, replaces=True)


def test_all_files_and_their_folder_are_synced_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    calls = calls_of(prepared(tmp_path / "one", replaces=False))
    partial, renamed = str(tmp_path / ".one.partial"), calls.index(("rename", str(tmp_path / ".one.partial")))
    written = {target: number for number, (name, target) in enumerate(calls) if name in ("write", "open")}
    files = [target for target in written if target.startswith(partial)]
    assert len(files) == 4  # two groups, the manifest, and the folder itself
    assert all(written[target] < calls.index(("fsync", target)) < renamed for target in files)
    assert calls.index(("fsync", str(tmp_path))) > renamed


def test_a_full_disk_at_any_write_is_one_clear_error_and_leaves_the_old_folder(tmp_path: Path) -> None:
    calls = calls_of(prepared(tmp_path / "counted" / "one", replaces=True))
    renamed = max(number for number, (name, _) in enumerate(calls) if name == "rename")
    for number in range(renamed + 1):
        folder = tmp_path / str(number) / "one"
        action = prepared(folder, replaces=True)
        with pytest.raises(InputError, match="No space left on device") as refused:
            act_at(number, "full", action)
        assert refused.value.exit_code == 75  # whoever watches the server starts it again
        assert same(read_sealed(folder)[0], groups(1)) and ".one.partial" not in os.listdir(folder.parent)
        action()  # there is room again
        assert same(read_sealed(folder)[0], groups(2))


def test_a_removed_folder_is_whole_or_absent_at_every_moment(tmp_path: Path) -> None:
    def removal(folder: Path) -> Callable[[], None]:
        prepared(folder, replaces=True)
        return lambda: remove_sealed(folder)

    for number in range(len(calls_of(removal(tmp_path / "counted" / "one")))):
        folder = tmp_path / str(number) / "one"
        action = removal(folder)
        with pytest.raises(Crash):
            act_at(number, "after", action)
        assert sealed_names(folder.parent) == []
        remove_sealed(folder)
        assert os.listdir(folder.parent) == []
