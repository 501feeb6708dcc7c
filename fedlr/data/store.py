"""Where a large table of numbers stays: in memory, in an unnamed temporary file, or in a folder for later runs too.

A stored table is one raw file: a header of 4096 bytes (JSON, padded with spaces), then the rows as they lie in memory.
It is mapped, never parsed and never unpickled, so reading it runs no code. What comes back is the same to the bit in
all three places.

Notable choices:
- A file is believed only if its header names the same key, its size is right and the SHA-256 of its rows is that of
  the header; all of it is read once when it is opened. That finds damage, not forgery: whoever may write into the
  folder may write a file with a right hash. Damage is said aloud and the table is made again.
- A table is written under another name and renamed when it is complete. Nothing is synced to the disk: what a power cut
  leaves behind has a wrong hash.
- Two processes that want the same table take turns: the second finds it made.
- Files have mode 0600, folders that are made here 0700. A table is as private as what it was made of.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedlr.errors import InputError

HEADER_BYTES = 4096  # a page: the rows begin at an address that can be mapped
FORMAT = 1

Table = NDArray[Any]
Key = Mapping[str, str | int]
Put = Callable[[int, Table], None]  # (first row, rows); from several threads, as long as no row is put twice


@dataclass(frozen=True)
class TableStore:
    """Keeps tables in `folder`; without one in memory, or in a temporary file if they are larger than `max_bytes`."""

    folder: Path | None = None
    max_bytes: int | None = None  # None: no limit; means nothing with a folder
    say: Callable[[str], None] = lambda line: None  # told of a file that is damaged

    def table(
        self, key: Callable[[], Key], *, shape: tuple[int, int], dtype: DTypeLike, fill: Callable[[Put], None]
    ) -> Table:
        """Return the table of this key: the stored one, or one that `fill` makes.

        Args:
            key: gives everything that the numbers depend on, as hashes and small numbers; asked only with a folder.
            shape: (rows, columns).
            dtype: of the numbers.
            fill: puts every row, once.

        Raises:
            InputError: if the folder, or the disk behind it, cannot take the table.
        """
        num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if num_bytes == 0:
            return np.empty(shape, dtype)
        try:
            if self.folder is not None:
                return self._kept(self.folder, key(), shape, np.dtype(dtype), fill)
            if not self.is_in_memory(num_bytes):
                return _unnamed(shape, np.dtype(dtype), fill)
        except OSError as error:
            place = self.folder or _temporary_folder()
            raise InputError(
                f"Expected runtime.cache_dir to be a folder on a disk with {num_bytes / 1e9:.1f} GB free, got {place}: "
                f"{error.strerror or error}"
            ) from error
        rows = np.empty(shape, dtype)

        def put(first: int, block: Table) -> None:
            rows[first : first + len(block)] = block

        fill(put)
        return rows

    def is_in_memory(self, num_bytes: int) -> bool:
        """Return whether a table of this size stays in memory.

        >>> TableStore(max_bytes=100).is_in_memory(101)
        False
        """
        return self.folder is None and (self.max_bytes is None or num_bytes <= self.max_bytes)

    def _kept(
        self, folder: Path, key: Key, shape: tuple[int, int], dtype: np.dtype[Any], fill: Callable[[Put], None]
    ) -> Table:
        header = {"format": FORMAT, "key": dict(key), "shape": list(shape), "dtype": dtype.str}
        name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]
        path, partial = folder / f"{name}.table", folder / f"{name}.partial"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (found := _opened(path, header)) is not None:
            return found
        with _only_writer(partial) as file:
            # Another process may have made it while this one waited.
            if (found := _opened(path, header, say=self.say)) is not None:
                partial.unlink()
                return found
            os.ftruncate(file, 0)
            try:
                fill(_putter(file, dtype.itemsize * shape[1]))
                os.lseek(file, HEADER_BYTES, os.SEEK_SET)
                with os.fdopen(os.dup(file), "rb") as stream:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                _write(file, json.dumps({**header, "sha256": sha256}).encode().ljust(HEADER_BYTES), 0)
            except BaseException:
                partial.unlink()
                raise
            partial.rename(path)
        return _mapped(path, shape, dtype)


def _opened(path: Path, header: Mapping[str, Any], *, say: Callable[[str], None] = lambda line: None) -> Table | None:
    """Return a stored table after checking all of it; None where there is none to believe."""
    if not path.exists():
        return None
    shape, dtype = (header["shape"][0], header["shape"][1]), np.dtype(header["dtype"])
    problem = "size"
    if path.stat().st_size == HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize:
        rows = _mapped(path, shape, dtype)
        sha256 = hashlib.sha256(rows.data.cast("B")).hexdigest()
        if _header(path) == {**header, "sha256": sha256}:
            return rows
        problem = "header or content"
    say(f"{path} is damaged (another {problem} than was written): it is made again")
    return None


@contextmanager
def _only_writer(path: Path) -> Iterator[int]:
    """Open a file that one process at a time writes, and wait for that one."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_called(file, path):
                yield file
                return
        finally:
            os.close(file)


def _is_called(file: int, path: Path) -> bool:
    """Return whether an open file still has its name: whoever held its lock before may have renamed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _unnamed(shape: tuple[int, int], dtype: np.dtype[Any], fill: Callable[[Put], None]) -> Table:
    """Make a table in a file that has no name, and whose blocks are free again when the table is dropped."""
    with tempfile.TemporaryFile(dir=_temporary_folder()) as stream:
        fill(_putter(stream.fileno(), shape[1] * dtype.itemsize))
        return np.memmap(stream, dtype, mode="r", offset=HEADER_BYTES, shape=shape)


def _temporary_folder() -> str:
    """Return TMPDIR, or /var/tmp where it is: /tmp is often memory, which is what has run out."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())


def _putter(file: int, row_bytes: int) -> Put:
    def put(first: int, block: Table) -> None:
        _write(file, np.ascontiguousarray(block).data.cast("B"), HEADER_BYTES + first * row_bytes)

    return put


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it: not through the map, where a full disk is a signal that kills and not an error."""
    while len(data):
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _mapped(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> Table:
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=shape)


def _header(path: Path) -> object:
    with path.open("rb") as stream:
        try:
            return json.loads(stream.read(HEADER_BYTES))
        except ValueError:
            return None
