"""The whole lines of a file that another process appends to, that may not exist yet, and that a resume may cut back."""

import os
from collections import deque
from io import FileIO
from pathlib import Path

from fedlr.server.view.refusals import Unreadable

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20


class WholeLines:
    """Hands out a file's lines one by one, each once, and none before its newline is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._offset, self._last = 0, b""  # behind the last line that was read ahead, and that line
        self._ahead: deque[bytes] = deque()

    def close(self) -> None:
        """Close the file; the next line is the first one again."""
        if self._file is not None:
            self._file.close()
        self._file, self._offset, self._last = None, 0, b""
        self._ahead.clear()

    def peek(self) -> bytes | None:
        """Return the next line without its newline and leave it there; None where there is no whole one yet.

        Raises:
            Unreadable: if the line is longer than 64 MiB.
        """
        if not self._ahead:
            self._read_ahead()
        return self._ahead[0] if self._ahead else None

    def take(self) -> bytes | None:
        """Return the next line as `peek` does, and go on."""
        line = self.peek()
        if line is not None:
            self._ahead.popleft()
        return line

    def has_changed(self) -> bool:
        """Say whether what was read is no longer there: the file was cut back, replaced or removed."""
        if self._file is None:
            return False
        try:
            same_file = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return True
        start = self._offset - len(self._last)
        return not same_file or os.pread(self._file.fileno(), len(self._last), start) != self._last

    def _read_ahead(self) -> None:
        if self._file is None:
            try:
                self._file = FileIO(self._path)
            except FileNotFoundError:
                return
        # Never keep half a line: a resume may cut it off and write another in its place.
        size = BLOCK_BYTES
        block = os.pread(self._file.fileno(), size, self._offset)
        while b"\n" not in block and len(block) == size:
            if size >= MAX_LINE_BYTES:
                raise Unreadable("a line of the run's files is too long")
            size *= 2
            block = os.pread(self._file.fileno(), size, self._offset)
        whole = block[: block.rfind(b"\n") + 1]
        if whole:
            self._ahead.extend(whole[:-1].split(b"\n"))
            self._offset += len(whole)
            self._last = self._ahead[-1] + b"\n"


def last_whole_line(path: Path) -> bytes | None:
    """Return a file's last line that is whole, without its newline; None if it has none or is not there."""
    try:
        file = FileIO(path)
    except FileNotFoundError:
        return None
    with file:
        end, size = file.seek(0, os.SEEK_END), BLOCK_BYTES
        block = os.pread(file.fileno(), size, max(0, end - size))
        while block.count(b"\n") < 2 and size < end:
            size *= 2
            block = os.pread(file.fileno(), size, max(0, end - size))
    *whole, _ = block.split(b"\n")
    return whole[-1] if whole else None
