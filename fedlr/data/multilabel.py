"""Texts, or pairs of texts, each with any of several labels, or none: what a mail is about, what a text feels.

The labels are declared, never found. A table says which of them a row has in one of two ways: in a column of names
(`comedy, drama`, or a list where the format has lists), or in a column for each label that holds 0 or 1.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlr.data.table import columns_of
from fedlr.data.targets import TextsWithTargets, read_with_targets
from fedlr.data.values import as_name, named
from fedlr.errors import InputError

_HAS = {"1": 1.0, "true": 1.0, "0": 0.0, "false": 0.0}


@dataclass(frozen=True)
class MultiLabelText(TextsWithTargets):
    """Texts with labels, in the order of their source: entry (i, k) is 1 where row i has label k, else 0."""

    _target: ClassVar[str] = "has_label"

    texts: tuple[str, ...]
    has_label: NDArray[np.float32]  # (N, K)
    output_names: tuple[str, ...]  # of the K labels, in the order of the columns
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0
    pairs: tuple[str, ...] | None = None
    clients: tuple[str, ...] | None = None
    num_held_out: int = 0
    label_names: tuple[str, ...] = ()  # no row belongs to one class


def load_multilabel_table(
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str | int | bool],
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str | None = "labels",
    label_separator: str = ",",
    group_column: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    train_split: str | None = None,
    fetched_by: str | None = None,
) -> MultiLabelText:
    """Load texts with any of several labels from the files and data sets that `fedlr.data.table.load_table` reads.

    Args:
        path: a file, a folder, a pattern, or the name of a data set.
        labels: the names of all labels, declared.
        text_column, text_pair_column, group_column, encoding, on_bad_row, train_split, fetched_by: as there.
        label_column: of the names of a row's labels; empty: it has none. None: each label has a column of its own, of
            0 and 1.
        label_separator: what stands between two names of a cell.

    Raises:
        InputError: which names the file, the row and what to change.
    """
    names = declared_labels(labels)
    if label_column is None:
        columns = columns_of(text_column, names[0], group_column, text_pair_column)._replace(more=names[1:])
    else:
        columns = columns_of(text_column, label_column, group_column, text_pair_column)
    if len(set(columns.names)) < len(columns.names):
        raise InputError(f"Expected different columns for text, labels and group, got {columns.names}")
    if label_column is not None and (not label_separator or any(label_separator in name for name in names)):
        raise InputError(
            f"Expected data.label_separator to be a mark that is in no label, got {label_separator!r}; set the mark "
            "that stands between the labels of a row"
        )

    def read(row: dict[str, Any]) -> tuple[list[float] | None, str]:
        if label_column is None:
            return _of_columns(row, names)
        return _of_names(row[label_column], label_column, names, label_separator)

    try:
        found = read_with_targets(
            path,
            columns,
            read,
            encoding=encoding,
            on_bad_row=on_bad_row,
            train_split=train_split,
            fetched_by=fetched_by,
        )
    except InputError as error:
        if f"has no column {label_column!r}" not in str(error):
            raise
        hint = "where each label has a column of 0 and 1, set data.label_column=null"
        raise InputError(f"{error}; {hint}") from error
    return MultiLabelText(
        texts=tuple(row.text for row in found.rows),
        has_label=np.array([row.label for row in found.rows], dtype=np.float32),
        output_names=names,
        groups=found.groups,
        source=os.fspath(path),
        num_dropped=found.num_dropped,
        pairs=found.pairs,
        clients=found.clients,
    )


def declared_labels(labels: Any) -> tuple[str, ...]:
    """Return the names of `data.labels`.

    Raises:
        InputError: they are not two or more different names.
    """
    given = [] if isinstance(labels, str) or not isinstance(labels, Sequence) else list(labels)
    names = tuple(name for label in given if (name := named(label)))
    if len(names) < 2 or len(names) < len(given) or len(set(names)) < len(names):
        raise InputError(f"Expected data.labels to be two or more different names, such as [joy,anger], got {labels!r}")
    return names


def _of_names(value: Any, column: str, names: tuple[str, ...], separator: str) -> tuple[list[float] | None, str]:
    """Return which labels a cell names, or what is wrong with it; an empty cell, or an empty list, names none."""
    has = dict.fromkeys(names, 0.0)
    for part in _parts(value, separator):
        name = as_name(part.strip() if isinstance(part, str) else part, known=names)[0]
        if name not in has:
            return None, (
                f", column {column!r}: a label is none of {', '.join(map(repr, names[:20]))}; names there are "
                f"separated by data.label_separator={separator!r}, and spelt as in data.labels (case counts)"
            )
        has[name] = 1.0
    return list(has.values()), ""


def _parts(value: Any, separator: str) -> list[Any]:
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value):
        return []
    if isinstance(value, str):
        return list(value.split(separator))
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _of_columns(row: dict[str, Any], names: tuple[str, ...]) -> tuple[list[float] | None, str]:
    """Return which labels the columns of a row say it has, or what is wrong with one."""
    has = []
    for name in names:
        value = _HAS.get(as_name(row[name])[0])
        if value is None:
            return None, f", column {name!r}: expected 0 or 1, for a label that a row lacks or has"
        has.append(value)
    return has, ""
