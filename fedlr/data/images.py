"""Labelled pictures: from folders, tables with paths or bytes, and data sets with a column of images.

Pixels of all pictures lie in one array of bytes, which is mapped from disk where memory is short and shared by all who
hold some of its rows. Notable choices:

* Everything a person can get wrong is one `InputError` that names the file or the row; no message holds a value of a
  row. Bad pictures are refused one by one, or left out and counted.
* A picture is known by the SHA-256 of its file: equal files lie at one place, at one client, or among the held out.
* Pictures are decoded when the table is made, to one declared size: what comes later reads bytes.
* Labels are named and refused as those of texts are (`fedlr.data.table`).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedlr.data.classes import check_classes
from fedlr.data.decoding import FITS, MOST_BYTES, Fit, decoded
from fedlr.data.files import is_saved_dataset, table_files
from fedlr.data.formats import SUFFIXES, Rows, read_rows
from fedlr.data.hub import read_hub
from fedlr.data.image_files import picture_folder
from fedlr.data.memory import free_memory
from fedlr.data.store import Put, TableStore
from fedlr.data.table import Table
from fedlr.data.values import as_name, class_name, named
from fedlr.errors import InputError, in_range

MOST_THREADS = 8
_FIX = "mend or remove it, or leave such pictures out with data.on_bad_row=drop"


@dataclass(frozen=True)
class LabelledImages(Table):
    """Pictures with integer labels, in the order of their source.

    `pixels` holds the pictures of the whole source, of which these are the `rows`; a subset shares it. `groups` names
    the natural client or domain of each picture, `clients` all natural clients where there is a folder or file of each.
    `num_dropped` counts bad pictures that were left out on request, `num_held_out` those that a test table holds too.
    """

    pixels: NDArray[np.uint8]  # (M, height, width, 3)
    rows: NDArray[np.int64]  # (N,), in [0, M)
    identities: tuple[str, ...]  # (N,), SHA-256 of the files
    labels: NDArray[np.int64]  # (N,), indices into label_names
    label_names: tuple[str, ...]
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0
    clients: tuple[str, ...] | None = None
    num_held_out: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the pictures at `indices`, in that order; no pixel is copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            identities=tuple(self.identities[i] for i in chosen),
            labels=self.labels[chosen],
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
        )

    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return the SHA-256 of each picture's file."""
        return tuple((identity,) for identity in self.identities)


class Columns(NamedTuple):
    """The names of the columns of a table of pictures; `group` and `split` may be none."""

    image: str
    label: str
    group: str | None = None
    split: str | None = None

    @property
    def names(self) -> list[str]:
        """Return the names in the order in which a row has their values: the label is the second."""
        return [name for name in self if name is not None]


class Picture(NamedTuple):
    """One row before it is decoded: how messages call it, its label and group, and what gives its bytes."""

    where: str
    label: Any
    group: Any
    content: Callable[[], bytes]
    problem: str = ""


class Source(NamedTuple):
    """The pictures of one folder or table, and whose they are (None: nobody said)."""

    name: str
    pictures: list[Picture]
    class_names: tuple[str, ...] | None = None  # of a ClassLabel column
    client: str | None = None
    is_folder: bool = False  # labels are names of folders, of which "none" is one


def load_images(
    path: str,
    *,
    image_size: int | tuple[int, int],
    fit: Fit = "crop",
    image_column: str = "image",
    label_column: str = "label",
    group_column: str | None = None,
    labels: Sequence[str | int | bool] | None = None,
    split_column: str | None = None,
    train_split: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    fetched_by: str | None = None,
) -> LabelledImages:
    """Load pictures from folders of classes, from tables, or from a data set of the Hub.

    Args:
        path: a folder as in `fedlr.data.image_files`; a .csv, .tsv, .jsonl, .json or .parquet file, a folder of them or
            a pattern, one for each client; a data set by name, or as `save_to_disk` wrote it.
        image_size: of all pictures, in pixels: a side, or height and width.
        fit: how another shape becomes this one (`fedlr.data.decoding`).
        image_column: of a table: paths, relative to its folder, or the bytes of files.
        label_column: of a table.
        group_column: the natural client or domain of each row of a table.
        labels: fixes the label names and their order; None: those that are found, sorted.
        split_column: of a table: which part a row belongs to; only rows of `train_split` are read.
        train_split: of a data set by name (None: train), or a value of `split_column`.
        encoding: of a csv or json file.
        on_bad_row: "refuse", or "drop", which leaves bad pictures out and counts them.
        fetched_by: the command that fetches the data, told where they are missing.

    Raises:
        InputError: which names the file or row and what to change.
    """
    height, width = _checked(image_size, fit, on_bad_row)
    columns = Columns(image_column, label_column, group_column, split_column)
    if len(set(columns.names)) < len(columns.names):
        raise InputError(f"Expected different columns for image, label, group and split, got {columns.names}")
    if split_column is not None and train_split is None:
        raise InputError(f"Expected train_split next to split_column={split_column}, got null; set it to train")
    sources = _read(path, columns, encoding=encoding, split=train_split, fetched_by=fetched_by)
    return _labelled(sources, path, columns, labels, (height, width, fit), drop=on_bad_row == "drop")


def _checked(image_size: int | tuple[int, int], fit: str, on_bad_row: str) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for side in sides:
        in_range(1, 4096, image_size=side)
    if fit not in FITS:
        raise InputError(f"Expected fit to be one of {', '.join(FITS)}, got {fit!r}")
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    return sides[0], sides[1]


def _read(path: str, columns: Columns, *, encoding: str, split: str | None, fetched_by: str | None) -> list[Source]:
    """Find out what `path` is, and list its pictures."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir() and not is_saved_dataset(path) and not _holds_tables(folder):
        if columns.split is not None or split is not None:
            raise InputError(f"Expected split_column=null and train_split=null with the folder {path!r} of pictures")
        return _of_folder(folder)
    files = table_files(path, fetched_by=fetched_by)
    if not files:
        if columns.split is not None:
            raise InputError(f"Expected split_column=null with the data set {path!r}, which has splits of its own")
        rows = read_hub(path, columns.names, split=split or "train")
        return [Source(path, _of_rows(rows, columns, path, Path(), None), rows.class_names)]
    if split is not None and columns.split is None:
        raise InputError(
            f"Expected train_split=null with the file or folder {path!r}, got {split!r}: name the column that says "
            "which part a row belongs to in data.split_column"
        )
    found = []
    for file in files:
        name = path if file.client is None else str(file.path)
        rows = read_rows(file.path, columns.names, encoding=encoding)
        pictures = _of_rows(rows, columns, name, file.path.parent, split)
        found.append(Source(name, pictures, rows.class_names, file.client))
    return found


def _holds_tables(folder: Path) -> bool:
    return any(name.lower().endswith(SUFFIXES) and name[0] != "." for name in os.listdir(folder))


def _of_folder(folder: Path) -> list[Source]:
    found = picture_folder(folder)
    return [
        Source(
            str(folder if client is None else folder / client),
            [
                Picture(str(f.path), f.label, f.client, partial(_file, f.path))
                for f in found.files
                if f.client == client
            ],
            client=client,
            is_folder=True,
        )
        for client in found.clients
    ]


def _of_rows(rows: Rows, columns: Columns, name: str, folder: Path, split: str | None) -> list[Picture]:
    found = []
    for row in rows.rows:
        where = f"{name}, row {row.number}"
        values = dict(zip(columns.names, row.values, strict=True)) if not row.problem else {}
        if columns.split is not None and not row.problem and values[columns.split] != split:
            continue
        group = None if columns.group is None else values.get(columns.group)
        content = partial(_content, values.get(columns.image), folder)
        found.append(Picture(where, values.get(columns.label), group, content, row.problem))
    if columns.split is not None and not found:
        raise InputError(
            f"Expected rows of {name} with {split!r} in column {columns.split!r}, got none; set data.train_split or "
            "data.test_split to a value of that column"
        )
    return found


def _content(value: Any, folder: Path) -> bytes:
    """Return the bytes of a file that a row holds or names: as bytes, as a path, or as `datasets` writes an image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise InputError("the picture is missing" if value is None or value == "" else "it is no path and no bytes")
    return _file(folder / os.path.expanduser(value.strip()))


def _file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError("there is no such file" if not path.exists() else "it is no regular file")
        if (num_bytes := path.stat().st_size) > MOST_BYTES:
            raise InputError(f"it has {num_bytes / 1e6:,.0f} MB, expected at most {MOST_BYTES // 10**6}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError, an InputError too
        raise error if isinstance(error, InputError) else InputError("the file cannot be read") from error


def _labelled(
    sources: Sequence[Source],
    name: str,
    columns: Columns,
    labels: Sequence[str | int | bool] | None,
    form: tuple[int, int, Fit],
    *,
    drop: bool,
) -> LabelledImages:
    allowed = None if labels is None else _allowed(labels)
    rows = [(source, picture) for source in sources for picture in source.pictures]
    names = [_label_and_group(source, picture, columns, allowed) for source, picture in rows]
    pixels, identities, problems = _decode([p for _, p in rows], [problem for *_, problem in names], form, drop=drop)
    good = [row for row, problem in enumerate(problems) if not problem]
    if len(good) < 2:
        dropped = f" after {len(rows) - len(good)} bad ones were dropped" if drop and rows else ""
        raise InputError(f"{name} has {len(good)} usable pictures{dropped}: expected at least 2")
    if allowed is None:
        _check_same_labels(sources, [(rows[row][0], names[row][0]) for row in good])
        check_classes(f"{name}, the labels", [names[row][0] for row in good])
    label_names = allowed or sources[0].class_names or _in_order({names[row][0] for row in good})
    index = {label: i for i, label in enumerate(label_names)}
    has_clients = columns.group is None and sources[0].client is not None
    groups = tuple((rows[row][0].client or "") if has_clients else names[row][1] for row in good)
    return LabelledImages(
        pixels=pixels,
        rows=np.array(good, dtype=np.int64),
        identities=tuple(identities[row] for row in good),
        labels=np.array([index[names[row][0]] for row in good], dtype=np.int64),
        label_names=label_names,
        groups=groups if has_clients or columns.group is not None else None,
        source=name,
        num_dropped=len(rows) - len(good),
        clients=tuple(source.client or "" for source in sources) if has_clients else None,
    )


def _decode(
    pictures: Sequence[Picture], problems: Sequence[str], form: tuple[int, int, Fit], *, drop: bool
) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Return the pixels (M, height, width, 3), the SHA-256 of each file, and what is wrong with each picture.

    Raises:
        InputError: for the first bad one, unless they are dropped.
    """
    height, width, fit = form
    identities, found = [""] * len(pictures), list(problems)

    def work(row: int, put: Put) -> str:
        """Decode one picture; return what is wrong with it. A bad one is black."""
        pixels, problem = None, problems[row]
        try:
            if not problem:
                content = pictures[row].content()
                identities[row] = hashlib.sha256(content).hexdigest()
                pixels, problem = decoded(content, height=height, width=width, fit=fit)
        except InputError as error:
            problem = str(error)
        put(row, np.zeros((1, shape[1]), dtype=np.uint8) if pixels is None else pixels.reshape(1, -1))
        return problem

    def fill(put: Put) -> None:
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "decode") as threads:
            for row, problem in enumerate(threads.map(lambda row: work(row, put), range(len(pictures)))):
                found[row] = problem
                if problem and not drop:
                    threads.shutdown(cancel_futures=True)
                    raise InputError(f"{pictures[row].where}: {problem}; {_FIX}")

    shape = (len(pictures), height * width * 3)
    store = TableStore(max_bytes=free_memory() // 2 or None)
    table: NDArray[np.uint8] = store.table(dict, shape=shape, dtype=np.uint8, fill=fill)
    return table.reshape(-1, height, width, 3), identities, found


def _label_and_group(
    source: Source, picture: Picture, columns: Columns, allowed: tuple[str, ...] | None
) -> tuple[str, str, str]:
    """Return label and group of a picture, and what is wrong with it or them."""
    if picture.problem:
        return "", "", picture.problem
    if source.class_names is None:
        label, problem = as_name(picture.label, known=(picture.label,) if source.is_folder else allowed or ())
    else:
        label, problem = class_name(picture.label, source.class_names)
    if not problem and allowed is not None and label not in allowed:
        problem = (
            f"is not one of {', '.join(map(repr, allowed[:20]))}; if data.labels is wrong, spell it as the data do "
            "(case counts)"
        )
    if problem:
        return "", "", f"the label {problem}"
    if columns.group is None:
        return label, "", ""
    group, problem = as_name(picture.group)
    return label, group, f"the group {problem}" if problem else ""


def _check_same_labels(sources: Sequence[Source], labels: Sequence[tuple[Source, str]]) -> None:
    """Refuse clients whose labels differ where nobody named them: one may only be spelled in another way there."""
    found = {
        source.name: source.class_names or {name for other, name in labels if other is source} for source in sources
    }
    first = sources[0].name
    for name, theirs in found.items():
        if theirs != found[first]:
            raise InputError(
                f"{name} has other labels than {first}: spell them alike, and name all with data.labels=[...] if not "
                "every client has each"
            )


def _allowed(labels: Sequence[str | int | bool]) -> tuple[str, ...]:
    names = () if isinstance(labels, str) else tuple(map(named, labels))
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise InputError(f"Expected data.labels to be two or more different names, such as [cat,dog], got {labels!r}")
    return names


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    ordered = sorted(names)
    if all(name.removeprefix("-").isdecimal() for name in ordered):
        ordered.sort(key=int)
    return tuple(ordered)
