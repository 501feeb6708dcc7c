"""A file of rows that can only grow, in which every row's hash covers all rows before it.

One row is one line of JSON; its last two keys are `prev`, the hash of the row before, and `hash`, the SHA-256
of its own other keys as canonical JSON (sorted keys, no spaces). Whoever edits, drops or swaps a row in the
middle breaks every hash after it. What a chain cannot show is a lost tail: a copy made yesterday is as valid
as today's file, unless someone else remembers `head`.

A crash, or a full disk, in the middle of a write leaves a last line without its line feed. Under the lock no
writer can be at work, so such a fragment is known for what it is: it is cut off and kept, as text, in a row
of kind "torn".
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.files import sync_folder, write_all, writing

Row = Mapping[str, Any]

GENESIS = "0" * 64  # `prev` of the first row

_PLAIN = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Tail:
    """How far a chain was verified: all up to `offset` bytes, `num_rows` rows, the last of which hashes to `head`."""

    offset: int = 0
    num_rows: int = 0
    head: str = GENESIS


def parse(data: bytes, tail: Tail, *, name: str) -> tuple[list[Row], Tail, bytes]:
    """Verify the rows that follow a tail.

    Args:
        data: the file's bytes from `tail.offset` on.
        tail: what was verified before.
        name: the file's name, for the error.

    Returns:
        The rows, the new tail, and the fragment after the last line feed (empty when nothing was torn).

    Raises:
        InputError: a row is not what was written there; the text names the row, from 0.
    """
    *lines, fragment = data.split(b"\n")
    rows: list[Row] = []
    head = tail.head
    for line in lines:
        row = decoded(line)
        if row is None or row.get("prev") != head or not _is_intact(row, line):
            raise InputError(
                f"Expected row {tail.num_rows + len(rows)} of {name} to continue the hash chain; the file was changed "
                "after it was written, and nothing in it from that row on can be trusted"
            )
        rows.append(row)
        head = row["hash"]
    return rows, Tail(tail.offset + len(data) - len(fragment), tail.num_rows + len(rows), head), fragment


def append(file: int, tail: Tail, rows: Sequence[Row]) -> Tail:
    """Write rows after a tail, all of them in one write and one fsync, and return the new tail.

    Guarantees: when this returns, the rows survive a crash of the process and of the machine. When it raises,
        any number of them may be in the file; they are found when it is next read.
    """
    lines, head = [], tail.head
    for row in rows:
        line, head = _encoded({**row, "prev": head})
        lines.append(line + b"\n")
    data = b"".join(lines)
    tail = Tail(tail.offset + len(data), tail.num_rows + len(lines), head)
    write_all(file, data)
    os.fsync(file)
    return tail


def create(path: Path, first: Row) -> None:
    """Create the file with its first row, readable by its owner only.

    Raises:
        InputError: the file exists already; it is never overwritten.
        NotWritten: the disk refused it, and there is no file.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    except FileExistsError as error:
        raise InputError(
            f"Expected no ledger at {path} to create one, got an existing file; open it instead"
        ) from error
    except OSError:
        with writing(path):
            raise
    with writing(path):
        try:
            append(file, Tail(), [first])
            sync_folder(path.parent)  # the file's name is in the folder: that must reach the disk too
        except OSError:
            with suppress(OSError):
                path.unlink()  # nobody has opened it: a part of a header would stand in the way of a whole one
            raise
        finally:
            os.close(file)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[int]:
    """Open the file and hold its lock: alone, or together with other readers only.

    Each call opens the file anew, so two threads or a forked child exclude each other as two processes do.
    The lock is flock's: advisory (a program that does not ask for it is not stopped), per machine, and gone
    when its holder dies.

    Raises:
        InputError: the file does not exist, or cannot be read. A missing ledger is not an empty one.
        NotWritten: the disk refused what was written under the lock.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"Expected a ledger at {path}, got no file: a folder, or something else of that name")
    try:
        file = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_APPEND)
    except FileNotFoundError as error:
        raise InputError(
            f"Expected a ledger at {path}, got no file; a missing ledger is not an unspent budget, "
            "so one is only made by PrivacyLedger.create"
        ) from error
    except OSError as error:
        raise InputError(f"Expected a ledger at {path} that can be read, got: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        with nullcontext() if shared else writing(path):
            yield file
    finally:
        os.close(file)


def read_from(file: int, offset: int, *, name: str) -> bytes:
    """Return the bytes from an offset to the end.

    Raises:
        InputError: the file is shorter than it was.
    """
    size = os.fstat(file).st_size
    if size < offset:
        raise InputError(f"Expected {name} to only grow, got {size} bytes where {offset} were verified before")
    chunks = []
    while chunk := os.pread(file, 1 << 20, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def torn_payload(fragment: bytes) -> Row | None:
    """Return what a torn row said, where its fragment still holds all of it but the hashes; else None."""
    payload, separator, _ = fragment.partition(b',"prev":')
    return decoded(payload + b"}") if separator else None


def _encoded(row: Row) -> tuple[bytes, str]:
    """Return the line of a row, without its line feed, and the row's hash."""
    payload = {key: value for key, value in row.items() if key != "hash"}
    digest = hashlib.sha256(_CANONICAL.encode(payload).encode()).hexdigest()
    return _PLAIN.encode({**payload, "hash": digest}).encode(), digest


def _is_intact(row: Row, line: bytes) -> bool:
    try:
        return _encoded(row)[0] == line
    except ValueError:  # a changed exponent can read as infinity, which no row holds
        return False


def decoded(line: bytes) -> dict[str, Any] | None:
    """Return a line's JSON object; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) else None
