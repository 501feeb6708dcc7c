"""Archives beyond the bounds are refused before a member is used (R-D5).

Mutants killed: names, kinds, entries, sizes or growth that nobody looks at.
"""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fedlr.simulations.archives
from fedlr.errors import InputError
from tests.training.small_models import mutant

Entry = tuple[str, bytes, bytes]  # name, content, kind
FILE, LINK = tarfile.REGTYPE, tarfile.SYMTYPE


def tar_of(*entries: Entry) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as file:
        for name, content, kind in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (len(content) if kind == FILE else 0), kind, "/etc/passwd"
            file.addfile(info, io.BytesIO(content))
    return written.getvalue()


def zip_of(folder: Path, *entries: Entry) -> Path:
    path = folder / "a.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, kind in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o120777 if kind == LINK else 0o100644) << 16
            file.writestr(info, content)
    return path


HOSTILE: dict[str, list[Entry]] = {
    "outside": [("../up", b"x", FILE)],
    "outside later": [("a/b", b"x", FILE), ("a/../../up", b"x", FILE)],
    "absolute": [("/etc/passwd", b"x", FILE)],
    "backslashes": [("..\\up", b"x", FILE)],
    "a link": [("a", b"", LINK)],
    "too many": [(f"f{number}", b"", FILE) for number in range(1001)],
    "a bomb": [("zeros", bytes(4 << 20), FILE)],
}


def all_is_refused(folder: Path, module: object = fedlr.simulations.archives) -> None:
    for name, entries in HOSTILE.items():
        for opened in (module.tar(tar_of(*entries)), module.wheel(zip_of(folder, *entries))):  # type: ignore[attr-defined]
            try:
                with opened:
                    raise AssertionError(f"{name} was opened")
            except InputError:
                pass
    with pytest.raises(InputError):
        try:
            module.gunzipped(gzip.compress(bytes(4 << 20)))  # type: ignore[attr-defined]
        except InputError:
            raise
        raise AssertionError("a packed bomb was read")


def test_what_is_beyond_the_bounds_is_refused(tmp_path: Path) -> None:
    all_is_refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ('path.is_absolute() or ".." in path.parts', "path.is_absolute()"),
        ('path.is_absolute() or ".." in path.parts', '".." in path.parts'),
        ('.replace("\\\\", "/")', ""),
        ("if not (member.isfile() or member.isdir()):", "if False:"),
        ("if member.external_attr >> 16 & 0o170000 == 0o120000:", "if False:"),
        ("if self._num_entries > self._most_entries:", "if False:"),
        ("self._num_bytes > self._most_bytes:", "False:"),
        ("if len(found) > most:", "if False:"),
    ],
)
def test_bounds_that_nobody_looks_at_are_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        all_is_refused(tmp_path, mutant(fedlr.simulations.archives, change))


def test_what_is_within_them_is_read(tmp_path: Path) -> None:
    entries: list[Entry] = [("folder/a", b"content", FILE), ("b..c", b"", FILE)]
    with fedlr.simulations.archives.tar(tar_of(*entries)) as opened:
        file = opened.extractfile("folder/a")
        assert file is not None and file.read() == b"content"
    with fedlr.simulations.archives.wheel(zip_of(tmp_path, *entries)) as wheel:
        assert wheel.read("folder/a") == b"content"
    assert fedlr.simulations.archives.gunzipped(gzip.compress(b"content")) == b"content"


@pytest.mark.parametrize(
    "read", [lambda p: fedlr.simulations.archives.tar(p), lambda p: fedlr.simulations.archives.wheel(p)]
)
def test_what_is_no_archive_is_one_clear_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a").write_bytes(b"no archive")
    with pytest.raises(InputError, match="archive"), read(tmp_path / "a"):  # type: ignore[attr-defined]
        pass
