"""Texts, or pairs of texts, that have something else than one class each: a number, or any of several labels.

What such a target may be is declared, never found in the rows. Files, clients and bad rows are as for labelled texts
(`fedlr.data.table`), and no message holds a value of a row.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from fedlr.data.formats import Row
from fedlr.data.table import Columns, Example, Source, Table, read_sources, texts_and_group
from fedlr.errors import InputError

# Takes the values of a row by column; returns its target, or what is wrong with it.
Read = Callable[[dict[str, Any]], tuple[Any, str]]


class TextsWithTargets(Table):
    """What tables of texts with targets have in common, each a data class with its targets in the field `_target`."""

    _target: ClassVar[str]

    texts: tuple[str, ...]
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int
    pairs: tuple[str, ...] | None
    clients: tuple[str, ...] | None
    num_held_out: int

    @property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]  # rows have no class
        """Return zeros, (N,): rows have no class."""
        return np.zeros(len(self.texts), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return the text of each row, or both of a pair."""
        return tuple(zip(self.texts, *(() if self.pairs is None else (self.pairs,)), strict=True))

    def targets(self) -> list[Any]:
        """Return the target of each row, as plain values."""
        found: list[Any] = getattr(self, self._target).tolist()
        return found

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the rows at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        groups = None if self.groups is None else tuple(self.groups[i] for i in chosen)
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in chosen)
        changed: Any = {self._target: getattr(self, self._target)[chosen], "texts": texts}
        found: Self = replace(cast(Any, self), **changed, groups=groups, pairs=pairs)
        return found


class Found(NamedTuple):
    """The usable rows of all sources."""

    rows: tuple[Example, ...]  # `label` holds the target
    groups: tuple[str, ...] | None
    clients: tuple[str, ...] | None
    pairs: tuple[str, ...] | None
    num_dropped: int


def read_with_targets(
    path: str | os.PathLike[str],
    columns: Columns,
    read: Read,
    *,
    encoding: str,
    on_bad_row: str,
    train_split: str | None,
    fetched_by: str | None,
) -> Found:
    """Read texts and their targets from what `fedlr.data.table.load_table` reads.

    Raises:
        InputError: which names the file, the row and what to change.
    """
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    name = os.fspath(path)
    sources = read_sources(name, columns, encoding=encoding, split=train_split, fetched_by=fetched_by)
    found = [_cleaned(source, columns, read, drop=on_bad_row == "drop") for source in sources]
    rows = tuple(row for one in found for row in one)
    if len(rows) < 2:
        raise InputError(f"{name} has {len(rows)} usable rows: expected at least 2")
    is_by_file = columns.group is None and sources[0].client is not None
    clients = tuple(source.client or "" for source in sources) if is_by_file else None
    groups: tuple[str, ...] | None = None if columns.group is None else tuple(row.group for row in rows)
    if clients is not None:
        groups = tuple(client for client, one in zip(clients, found, strict=True) for _ in one)
    num_dropped = sum(len(source.table.rows) for source in sources) - len(rows)
    pairs = None if columns.pair is None else tuple(row.pair for row in rows)
    return Found(rows, groups, clients, pairs, num_dropped)


def _cleaned(source: Source, columns: Columns, read: Read, *, drop: bool) -> list[Example]:
    found = []
    for row in source.table.rows:
        example, problem = _clean(row, columns, read)
        if example is not None:
            found.append(example)
        elif not drop:
            fix = "fix the row, or leave such rows out with data.on_bad_row=drop"
            raise InputError(f"{source.name}, row {row.number}{problem}; {fix}")
    return found


def _clean(row: Row, columns: Columns, read: Read) -> tuple[Example | None, str]:
    """Return what a row holds, or what is wrong with it."""
    example, problem = texts_and_group(row, columns)
    if example is None:
        return None, problem
    target, problem = read(dict(zip(columns.names, row.values, strict=True)))
    return (None, problem) if problem else (example._replace(label=target), "")
