"""Which files a table's path stands for: one, all of a folder, or all that match a pattern; and whose each is.

Where a path stands for several files, each belongs to the client of its name: `wards/north.csv` to `north` where the
path is `wards`, `wards/*` or `wards/*.csv`, and so does `wards/north/train.csv` where it is `wards/*/train.csv`.
Which files there are is taken for public; what is in them is not.
"""

import glob
import os
import unicodedata
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from fedlr.data.formats import SUFFIXES
from fedlr.data.values import as_name
from fedlr.errors import InputError

# What ends like this is a file that is not there, never the name of a dataset.
_FILE_SUFFIXES = SUFFIXES + tuple(
    ".xlsx .xls .ods .txt .ndjson .gz .zip .zst .bz2 .xz .arrow .feather .pkl .npy .npz .sqlite .xml".split()
)
# What `datasets.save_to_disk` leaves in a folder.
_SAVED_DATASET = ("dataset_dict.json", "state.json")


class TableFile(NamedTuple):
    """A file with rows; `client` is the name of whose they are, None where the path names this one file."""

    path: Path
    client: str | None = None


def table_files(path: str, *, fetched_by: str | None = None) -> tuple[TableFile, ...]:
    """Return the files that a path stands for, by the names of their clients; none for the name of a dataset.

    Raises:
        InputError: for a file that is not there or of another kind, a folder or a pattern without any, and two files
            that would be one client.
    """
    file = Path(os.path.expanduser(path))
    if is_saved_dataset(path):
        return ()
    if os.path.isdir(file):
        inside = [file / name for name in _names_in(file) if name.lower().endswith(SUFFIXES) and name[0] != "."]
        if not inside:
            raise InputError(
                f"{path!r} is a folder without a {', '.join(SUFFIXES)} file: name a file, or a folder with one a client"
            )
        return _by_client(path, inside, file)
    if os.path.exists(file):
        _check_kind(file, path)
        return (TableFile(file),)
    if glob.has_magic(path) and "\0" not in path:
        return _matching(path)
    if file.suffix.lower() in _FILE_SUFFIXES or path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise InputError(_missing_file(path, file) + (f"; fetch it with: {fetched_by}" if fetched_by else ""))
    return ()


def is_saved_dataset(path: str) -> bool:
    """Return whether a path is a folder that `datasets.save_to_disk` wrote."""
    file = Path(os.path.expanduser(path))
    return any(os.path.isfile(file / name) for name in _SAVED_DATASET)


def _matching(pattern: str) -> tuple[TableFile, ...]:
    found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    files = [file for file in found if file.is_file()]
    if not files:
        only = " but folders" if found else ""
        raise InputError(
            f"Nothing{only} matches the pattern {pattern!r}: expected {', '.join(SUFFIXES)} files, one a client, such "
            "as 'wards/*.csv'; a pattern is relative to where the program starts"
        )
    for file in sorted(files):
        _check_kind(file, str(file))
    parts = Path(os.path.expanduser(pattern)).parts
    magic = [index for index, part in enumerate(parts) if glob.has_magic(part)]
    num_after = 0 if "**" in parts else len(parts) - 1 - magic[-1]
    return _by_client(pattern, files, Path(*parts[: magic[0]]), num_after=num_after)


def _by_client(path: str, files: list[Path], folder: Path, *, num_after: int = 0) -> tuple[TableFile, ...]:
    """Name each client by its file's path below a folder, without the last parts that all files have in common."""
    by_name: dict[str, Path] = {}
    for file in sorted(files):
        below = file.relative_to(folder)
        below = below.parents[num_after - 1] if num_after else below.with_suffix("")
        name = unicodedata.normalize("NFC", below.as_posix())
        _, problem = as_name(name, known=(name,))
        if problem:
            raise InputError(f"Expected file names that can name clients, got {str(file)!r}: it {problem}; rename it")
        if name in by_name:
            raise InputError(
                f"{path!r} has two files of a client {name!r}: {by_name[name].name!r} and {file.name!r}; rename one, "
                "or take one away"
            )
        by_name[name] = file
    return tuple(TableFile(file, name) for name, file in sorted(by_name.items()))


def _check_kind(file: Path, path: str) -> None:
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path!r} ends in {file.suffix.lower()!r}: export it as one of {', '.join(SUFFIXES)}")
    if not os.path.isfile(file):
        raise InputError(f"{path!r} is not a regular file: expected a {', '.join(SUFFIXES)} file")


def _missing_file(path: str, file: Path) -> str:
    folder = file.parent
    if not os.path.isdir(folder):
        return f"There is no file {path!r}: its folder {str(folder)!r} does not exist"
    names = _names_in(folder)
    near = get_close_matches(file.name, names, n=3) or [n for n in names if n.lower().endswith(SUFFIXES)][:3]
    where = f"the folder {os.path.abspath(folder)!r}"
    return f"There is no file {path!r}: " + (
        f"{where} holds {', '.join(map(repr, near))}" if near else f"{where} holds no table"
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # for a hint in a message: a folder that cannot be listed gives none
        return []
