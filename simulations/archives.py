"""Archives that are opened within bounds: how much they hold, how far they grow, and where their names point.

Every archive here comes from a package that is pinned by its hash; the bounds are for the day one is not. They are
looked at before a byte of a member is used: entries are counted, declared sizes added up, and no name may leave the
folder, be absolute, or be a link or a device.
"""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from fedlr.errors import InputError

MOST_BYTES = 1 << 30
MOST_GROWTH = 100  # times its packed size
MOST_ENTRIES = 1000
SMALL = 1 << 20  # up to which a growth says nothing: a few lines that repeat pack well


@contextmanager
def tar(
    archive: bytes | Path | IO[bytes], *, size: int | None = None, most_entries: int = MOST_ENTRIES
) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, packed or not.

    Args:
        archive: its bytes, its file, or a stream that can be read again from its start.
        size: bytes of a stream.
        most_entries: that it may have.

    Raises:
        InputError: it is beyond the bounds, or no archive.
    """
    content = archive.read_bytes() if isinstance(archive, Path) else archive
    stream: IO[bytes]
    if isinstance(content, bytes):
        stream, size = io.BytesIO(content), len(content)
    else:
        stream = content
    assert size is not None
    try:
        with tarfile.open(fileobj=stream) as opened:
            bounds = _Bounds("a tar archive", size, most_entries)
            for member in opened:  # one header after the other, so that a bomb ends here
                bounds.take(member.name, member.size)
                if not (member.isfile() or member.isdir()):
                    raise InputError(f"Expected files in a tar archive, got a link or device {member.name!r:.80}")
            yield opened
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"Expected a tar archive, got {error!s:.80}") from None


@contextmanager
def wheel(path: Path, *, most_entries: int = MOST_ENTRIES) -> Iterator[zipfile.ZipFile]:
    """Open a wheel, or another zip archive.

    Raises:
        InputError: it is beyond the bounds, or no archive.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            bounds = _Bounds(path.name, path.stat().st_size, most_entries)
            for member in opened.infolist():
                bounds.take(member.filename, member.file_size)
                if member.external_attr >> 16 & 0o170000 == 0o120000:
                    raise InputError(f"Expected files and folders in {path.name}, got a link {member.filename!r:.80}")
            yield opened
    except zipfile.BadZipFile as error:
        raise InputError(f"Expected a zip archive in {path.name}, got {error!s:.80}") from None


def gunzipped(packed: bytes) -> bytes:
    """Return what a gzip file holds.

    Raises:
        InputError: it is beyond the bounds.
    """
    most = min(MOST_BYTES, max(SMALL, MOST_GROWTH * len(packed)))
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise InputError(f"Expected a gzip file of at most {most} bytes, got more")
    return found


class _Bounds:
    """What an archive has declared so far."""

    def __init__(self, name: str, packed_bytes: int, most_entries: int) -> None:
        self._name, self._most_entries = name, most_entries
        self._most_bytes = min(MOST_BYTES, max(SMALL, MOST_GROWTH * packed_bytes))
        self._num_bytes = self._num_entries = 0

    def take(self, name: str, num_bytes: int) -> None:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"Expected names inside a folder in {self._name}, got {name!r:.80}")
        self._num_entries += 1
        self._num_bytes += num_bytes
        if self._num_entries > self._most_entries:
            raise InputError(f"Expected at most {self._most_entries} entries in {self._name}, got more")
        if num_bytes < 0 or self._num_bytes > self._most_bytes:
            raise InputError(f"Expected at most {self._most_bytes} bytes in {self._name}, unpacked, got more")
