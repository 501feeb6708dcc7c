"""Files that are whole or absent: the one place that writes what a run, a server or a device leaves on its disk.

A file is written under a temporary name, flushed to the disk, and renamed; a folder likewise. Lines are appended
whole, or taken back. Whatever the disk refuses (full, read-only, broken, not ours) is one `NotWritten` that names the
file, and what was there before is still there.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedlr.errors import InputError, PassingError


def cache_folder() -> Path:
    """Return where this user keeps what can be made again: $FEDLR_CACHE, $XDG_CACHE_HOME/fedlr, or ~/.cache/fedlr."""
    if named := os.environ.get("FEDLR_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlr"


class NotWritten(InputError):
    """The disk is full or cannot be written; the text names the file."""


def is_full(error: BaseException) -> bool:
    """Say whether an error is that of a full disk; safetensors has a type of its own for it."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC})" in str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into one line.

    Raises:
        NotWritten: which names the path.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        refused = NotWritten(
            f"Expected to write {path}, got: {why}; what was written before is whole: make room or mend the disk, then "
            "go on from there"
        )
        if is_full(error):
            refused.exit_code = PassingError.exit_code  # with room made it goes on by itself
        raise refused from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or absent, in place of the one of that name if there is one.

    Raises:
        NotWritten: what was there before still is.

    Guarantees: when this returns, the file survives a crash of the process and of the machine.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            fill(file, content)
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def create_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file that must not exist, with its rights from its first byte on; it is whole or absent.

    Raises:
        NotWritten: the disk refused it.
        FileExistsError: it exists; it is as it was.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise
    except OSError:
        with writing(path):
            raise
    with writing(path):
        try:
            fill(file, content)
            sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file, which is made if it is not there: all of it, or nothing.

    Not flushed to the disk: `sync_file` does that before a checkpoint counts on it.

    Raises:
        NotWritten: the file is as long as it was.
    """
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                write_all(file, content)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise
        finally:
            os.close(file)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes its name, once all in it is on the disk, where no folder of that name is.

    Raises:
        NotWritten: there is no such folder, and nothing is left of it.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                sync_folder(path) if path.is_dir() else sync_file(path)
            sync_folder(partial)
            os.rename(partial, folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def make_folder(folder: Path, *, mode: int = 0o777) -> Path:
    """Make a folder and its parents, where they are not there, and return it.

    Raises:
        NotWritten: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    return folder


def sync_file(path: Path) -> None:
    """Make what a file holds survive a crash of the machine; a file that is not there has nothing to."""
    if path.exists():
        with writing(path), path.open("rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Write all of it to an open file: one write may take a part only, and say so by a number alone."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def fill(file: int, content: str | bytes) -> None:
    """Write all of it to an open file, flush it to the disk and close it."""
    try:
        write_all(file, content.encode() if isinstance(content, str) else content)
        os.fsync(file)
    finally:
        os.close(file)
