"""A disk that fills up at the n-th thing that is asked of it, whichever library asks."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
from safetensors import SafetensorError

CHANGING = ("write", "pwrite", "fsync", "mkdir", "rename", "replace", "link", "symlink")  # cutting off needs no room
FULL = os.strerror(errno.ENOSPC)


@contextmanager
def full_from(number: int, folder: Path, *, num_refused: float = float("inf")) -> Iterator[list[str]]:
    """Let what would change the disk fail, from the call of that number (0 is the first), for so many calls.

    Counted are opens for writing below `folder`, and whatever else would change a disk; of a write that fails a half
    is written. What is removed makes room, and goes well. Yields a line for each call.
    """
    calls: list[str] = []

    def refuse(what: str, path: object) -> bool:
        calls.append(f"{what} {os.path.relpath(str(path), folder) if isinstance(path, str | Path) else path}")
        return number <= len(calls) - 1 < number + num_refused

    def injected(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if (name == "mkdir" and os.path.lexists(args[0])) or not refuse(name, args[0]):
                return real(*args, **options)
            if name in ("write", "pwrite") and len(args[1]) > 1:
                real(args[0], args[1][: len(args[1]) // 2], *args[2:])
            raise OSError(errno.ENOSPC, FULL)

        return call

    real_open, real_io = os.open, io.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        is_written = flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(folder))
        if is_written and flags & os.O_CREAT and refuse("open", path):
            raise OSError(errno.ENOSPC, FULL, str(path))
        return real_open(path, flags, *args, **options)

    def opened_by_name(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and str(path).startswith(str(folder)) and refuse("open", path):
            raise OSError(errno.ENOSPC, FULL, str(path))
        return real_io(path, mode, *args, **options)

    def saved(tensors: Any, path: Any, *args: Any, **options: Any) -> None:
        if refuse("save", path):
            raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error {errno.ENOSPC})")
        real_save(tensors, path, *args, **options)

    real_save = peft.peft_model.safe_save_file  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGING:
            patch.setattr(os, name, injected(name, getattr(os, name)))
        patch.setattr(os, "open", opened)
        patch.setattr(io, "open", opened_by_name)
        patch.setattr(builtins, "open", opened_by_name)
        patch.setattr(peft.peft_model, "safe_save_file", saved)
        yield calls
