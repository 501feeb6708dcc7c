"""Sealed folders: tensors and facts on disk, whole or absent, and every changed bit is seen.

A sealed folder holds one safetensors file a group of tensors that is not empty, and `manifest.json`: facts, the groups,
the size and SHA-256 of every file, and a SHA-256 of itself. safetensors alone reads most flipped bits as other numbers.

Written are a folder beside it (`.NAME.partial`), its files, their fsync, the folder's, and only then one rename. A
folder that exists is replaced by two renames: it becomes `.NAME.old`, the new one takes its name, the old one goes.
Between the two, readers find the old one under its other name. So whenever a writer dies, what is read is the old
folder or the new one; what it left lying is removed when that name is next written or removed.

One writer a name. A reader in the very moment of a replacement may find the folder changing: it raises, read again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.errors.messages import one_line
from fedlr.files import fill, sync_folder, writing

VERSION = 1
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
REPLACED = re.compile(r"\.(.+)\.old")


class Corrupt(InputError):
    """A sealed folder that is not what was written; the text names the file."""


def write_sealed(folder: Path, tensors: Mapping[str, Mapping[Slot, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write a folder that is whole or absent, in place of the one of that name if there is one.

    Args:
        folder: where; parents are made.
        tensors: by group, then by slot; any dtype of safetensors and any shape. Values, dtypes and order come back.
        facts: JSON; tuples come back as lists.

    Raises:
        NotWritten: the disk is full or cannot be written. What was there before still is.
        ValueError, TypeError: the facts are no JSON.

    Guarantees: when this returns, the folder survives a crash of the process and of the machine.
    """
    partial, old = _partial(folder), _old(folder)
    files = {group: _file(group, slots) for group, slots in tensors.items() if slots}
    manifest = _manifest(list(tensors), files, facts)
    with writing(folder):
        try:
            _make(folder.parent)
            _clean(folder)
            os.mkdir(partial)
            for name, data in [*files.values(), (MANIFEST, manifest)]:
                _write(partial / name, data)
            sync_folder(partial)
            if folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
            sync_folder(folder.parent)
            if old.exists():
                shutil.rmtree(old)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_sealed(folder: Path) -> tuple[dict[str, dict[Slot, Tensor]], dict[str, Any]]:
    """Return the tensors, by group and slot, and the facts of a folder, all of it verified.

    Raises:
        Corrupt: a file is missing, too many, or not what was written.
        InputError: there is no such folder, or another version of fedlr wrote it.
    """
    place = _place(folder)
    manifest = _read_manifest(place)
    expected = {MANIFEST, *(_file_name(group) for group in manifest["files"])}
    if unknown := sorted(set(os.listdir(place)) - expected):
        raise Corrupt(f"Expected only files that {place / MANIFEST} names, got {place / unknown[0]} too")
    filled = {group: _tensors(place / _file_name(group), file) for group, file in manifest["files"].items()}
    return {group: filled.get(group, {}) for group in manifest["groups"]}, manifest["facts"]


def sealed_names(parent: Path) -> list[str]:
    """Return the names of the folders that can be read in a folder, sorted: what a crash left lying is none.

    Any folder counts whose name starts with no dot.
    """
    try:
        found = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    replaced = [match[1] for name in found if (match := REPLACED.fullmatch(name))]
    return sorted({name for name in found if not name.startswith(".")}.union(replaced))


def remove_sealed(folder: Path) -> None:
    """Remove a folder, so that it is whole or absent at every moment, and what crashes left of it.

    Raises:
        NotWritten: the disk refused it.
    """
    with writing(folder):
        _clean(folder)
        if folder.exists():
            os.rename(folder, _gone(folder))
            _clean(folder)


def _manifest(groups: Sequence[str], files: Mapping[str, tuple[str, bytes]], facts: Mapping[str, Any]) -> bytes:
    entries = {
        group: {"name": name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for group, (name, data) in files.items()
    }
    content = {"version": VERSION, "groups": groups, "files": entries, "facts": facts}
    return _encoded({**content, "sha256": hashlib.sha256(_encoded(content)).hexdigest()})


def _encoded(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _read_manifest(place: Path) -> dict[str, Any]:
    path = place / MANIFEST
    data = _bytes(path)
    try:
        content: dict[str, Any] = json.loads(data)
        stated = content.pop("sha256")
        # Encoded anew: a byte that JSON reads over, such as a space, was not changed either.
        intact = _encoded({**content, "sha256": stated}) == data
        intact = intact and hashlib.sha256(_encoded(content)).hexdigest() == stated
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no JSON, or another object
        intact = False
    if not intact:
        raise Corrupt(f"Expected {path} as it was written, got a changed file: it does not have its own SHA-256")
    if content.get("version") != VERSION:
        raise InputError(f"Expected version {VERSION} of sealed folders in {path}, got {content.get('version')!r:.40}")
    groups, files, facts = content.get("groups"), content.get("files"), content.get("facts")
    is_ours = isinstance(groups, list) and isinstance(files, dict) and isinstance(facts, dict)
    names: list[object] = groups if isinstance(groups, list) else []
    if not is_ours or not all(isinstance(group, str) for group in names) or not {*(files or {})} <= {*names}:
        raise Corrupt(f"Expected groups, files and facts in {path}, got something else under their names")
    return content


def _file(group: str, slots: Mapping[Slot, Tensor]) -> tuple[str, bytes]:
    """Return a group's file: its name and its bytes."""
    # Copies: safetensors refuses views that share memory.
    stored = {
        json.dumps([index, *slot]): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for index, (slot, tensor) in enumerate(slots.items())
    }
    return _file_name(group), save(stored)


def _file_name(group: str) -> str:
    return quote(group, safe="") + SUFFIX


def _tensors(path: Path, stated: Mapping[str, Any]) -> dict[Slot, Tensor]:
    if not isinstance(stated, dict) or not isinstance(sha256 := stated.get("sha256"), str):
        raise Corrupt(f"Expected the SHA-256 of {path} in its manifest, got none")
    data = _bytes(path, stated.get("num_bytes"))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Corrupt(f"Expected SHA-256 {sha256:.16}... of {path}, got a changed file")
    try:
        named = sorted((json.loads(key), tensor) for key, tensor in load(data).items())
        slots = {Slot(place, role): tensor for (_, place, role), tensor in named}
        are_texts = all(isinstance(part, str) for slot in slots for part in slot)
    except (SafetensorError, ValueError, TypeError, RecursionError, RuntimeError) as error:
        raise Corrupt(f"Expected tensors by slot in {path}, got: {one_line(error):.100}") from error
    if not are_texts:
        raise Corrupt(f"Expected tensors by slot in {path}, got other names")
    return slots


def _bytes(path: Path, num_bytes: int | None = None) -> bytes:
    try:
        if num_bytes is not None and path.stat().st_size != num_bytes:
            raise Corrupt(f"Expected {num_bytes} bytes in {path}, got {path.stat().st_size}")
        return path.read_bytes()
    except OSError as error:
        raise Corrupt(f"Expected a readable {path}, got: {error.strerror or error}") from error


def _place(folder: Path) -> Path:
    """Return where a folder is to be read: under its name, or where a writer that died put it aside."""
    for place in (folder, _old(folder), folder):  # again: a writer may have been between its two renames
        if place.is_dir():
            return place
    raise InputError(f"Expected a sealed folder, got {folder}, which is none")


def _clean(folder: Path) -> None:
    """Remove what crashes left, and give a folder that was put aside its name back if nothing took it."""
    for leftover in (_partial(folder), _gone(folder)):
        if leftover.exists():
            shutil.rmtree(leftover)
    if _old(folder).exists():
        if folder.exists():
            shutil.rmtree(_old(folder))
        else:
            os.rename(_old(folder), folder)


def _write(path: Path, data: bytes) -> None:
    fill(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), data)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        os.mkdir(folder)
        sync_folder(folder.parent)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _gone(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.gone")
