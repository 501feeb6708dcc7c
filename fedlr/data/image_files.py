"""Which pictures a folder holds: one folder for each class, or one for each client with a folder for each class in it.

    path/CLASS/anything/picture.jpg            classes
    path/CLIENT/CLASS/anything/picture.jpg     clients (hospitals, styles, domains), each with folders of classes

Which of the two it is, the folders say: those of classes hold files, those of clients hold folders. Every file in the
folder of a class is a picture of it, whatever its name ends in; hidden files and what Windows leaves behind are none.
The names of folders are taken for public, as those of files are.
"""

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from fedlr.data.values import as_name
from fedlr.errors import InputError

_LITTER = ("thumbs.db", "desktop.ini", "__macosx")
_LAYOUT = "expected PATH/CLASS/PICTURE, or PATH/CLIENT/CLASS/PICTURE for natural clients"


class PictureFile(NamedTuple):
    """A file of a picture, the folder that is its class, and whose it is (None: nobody's)."""

    path: Path
    label: str
    client: str | None = None


class PictureFolder(NamedTuple):
    """All pictures of a folder, and its natural clients, also those without a picture; (None,) where there are none."""

    files: tuple[PictureFile, ...]
    clients: tuple[str | None, ...]


def picture_folder(path: Path) -> PictureFolder:
    """Return the pictures below a folder, in the order of their paths.

    Raises:
        InputError: for a folder without folders of classes, with files beside them, or with both kinds of folders.
    """
    folders, files = _inside(path)
    if not folders:
        raise InputError(f"{str(path)!r} holds no folders of classes: {_LAYOUT}")
    if files:
        raise InputError(f"{str(path)!r} holds the file {files[0].name!r} beside folders: {_LAYOUT}")
    kinds = {folder: bool(_inside(folder)[0]) and not _inside(folder)[1] for folder in folders}
    of_clients = [folder for folder, is_client in kinds.items() if is_client]
    if not of_clients:
        return PictureFolder(tuple(_of_classes(path, folders, None)), (None,))
    others = [folder for folder, is_client in kinds.items() if not is_client and any(_inside(folder))]
    if others:
        raise InputError(
            f"{str(path)!r} holds {of_clients[0].name!r}, a folder of folders, beside {others[0].name!r}, which holds "
            f"files: {_LAYOUT}"
        )
    clients = _names(path, folders)
    found = [
        file
        for folder, client in zip(folders, clients, strict=True)
        for file in _of_classes(folder, _inside(folder)[0], client)
    ]
    return PictureFolder(tuple(found), tuple(clients))


def _of_classes(path: Path, folders: list[Path], client: str | None) -> list[PictureFile]:
    names = _names(path, folders)
    return [
        PictureFile(file, name, client) for folder, name in zip(folders, names, strict=True) for file in _below(folder)
    ]


def _names(path: Path, folders: list[Path]) -> list[str]:
    names = [_name(folder) for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{str(path)!r} has two folders named {twice[0]!r}, but for the form of an accent: rename one")
    return names


def _name(folder: Path) -> str:
    name = unicodedata.normalize("NFC", folder.name)
    name, problem = as_name(name, known=(name,))
    if problem:
        raise InputError(
            f"Expected folders whose names can name classes and clients, got {str(folder)!r}: it {problem}"
        )
    return name


def _below(folder: Path) -> list[Path]:
    """Return all files of a folder and of those in it; links to other folders inside are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if _counts(name))
        found += [Path(parent, name) for name in sorted(names) if _counts(name)]
    return found


def _inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files directly in a folder."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if _counts(entry.name))
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error.strerror or error}") from error
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _LITTER
