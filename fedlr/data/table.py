"""Labelled texts from a table: what is accepted, and what is refused.

Everything a person can get wrong is one `InputError` that names the file, the row and the fix. Notable
choices:

* Labels become names: 0, 0.0 and the text "0" are the label "0", true is "true". Names are in Unicode's form C. An
  empty label, NaN and words such as NA, null or None are a missing label, unless `labels` names them. Two spellings
  of one number ("1" and "1.0") are refused, and so are many numbers with decimals: those are scores, not classes.
  Names are sorted (as numbers if all are integers) unless `labels` fixes them.
* No message holds a value of a row: it names the file, the row and the column.
* Clients that hold their own files must all be given `labels`: the names found in one file depend on its
  rows.
* A number is not a text: refused per row where the format knows types (JSON, Parquet), and for a csv, where
  it does not, when every text is one, since then the column is the wrong one.
* A text is kept as it is, of any length; `fedlr.tasks.tokenise` truncates and counts.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedlr.data.classes import check_classes
from fedlr.data.files import table_files
from fedlr.data.formats import Row, Rows, read_rows
from fedlr.data.hub import read_hub
from fedlr.data.values import as_name, class_name, named, text_problem
from fedlr.errors import InputError


class Table(ABC):
    """Rows of any kind, in the order of their source; what partitions and splits need to know of them."""

    labels: NDArray[np.int64]  # (N,), the class of each row, as indices into label_names; zeros where rows have none
    label_names: tuple[str, ...]  # empty where rows have no class
    groups: tuple[str, ...] | None  # the natural client or domain of each row, if the source says
    clients: tuple[str, ...] | None  # the names of all natural clients, where there is a file of each
    source: str  # what messages and ledgers call the table
    num_dropped: int  # bad rows that were left out on request
    num_held_out: int  # rows that were left out because a test table has them too

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return what makes up each row beside its label: one or more texts, or the SHA-256 of what is no text."""

    def targets(self) -> list[Any]:
        """Return what a model should say of each row, as plain values: its class, unless rows have something else."""
        found: list[Any] = self.labels.tolist()
        return found

    @abstractmethod
    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the rows at `indices`, in that order."""


@dataclass(frozen=True)
class LabelledText(Table):
    """Texts with integer labels, in the order of their source.

    `groups` names the natural client or domain of each text, if the source has such a column. `num_dropped`
    counts the bad rows that were left out on request; whoever loads the data says so. `pairs` are the second texts
    where a row is a pair of two, such as a premise and a hypothesis. `clients` names the natural clients where there
    is a file of each: `groups` then says whose a row is, and a client may be there without a row. `num_held_out` counts
    rows that were left out because their texts are among those of a test table.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,), indices into label_names
    label_names: tuple[str, ...]
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0
    pairs: tuple[str, ...] | None = None
    clients: tuple[str, ...] | None = None
    num_held_out: int = 0
    persons: tuple[str, ...] | None = None  # whose each row is, where a column says

    def __len__(self) -> int:
        return len(self.texts)

    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return the text of each row, or both of a pair."""
        return tuple(zip(self.texts, *(() if self.pairs is None else (self.pairs,)), strict=True))

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        groups = None if self.groups is None else tuple(self.groups[i] for i in chosen)
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in chosen)
        persons = None if self.persons is None else tuple(self.persons[i] for i in chosen)
        return replace(self, texts=texts, labels=self.labels[chosen], groups=groups, pairs=pairs, persons=persons)


class Columns(NamedTuple):
    """The names of the columns of a table that are read; `group`, `pair` and `person` may be none.

    `more` are further columns, behind the others: one for each label where a text may have several.
    """

    text: str
    label: str
    group: str | None = None
    pair: str | None = None
    person: str | None = None
    more: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Return the names in the order in which a row has their values: the label is the second."""
        single = (self.text, self.label, self.group, self.pair, self.person)
        return [*(name for name in single if name is not None), *self.more]


class Example(NamedTuple):
    """One usable row; group, pair and person are '' where the table has no such column."""

    text: str
    label: Any  # a name, or before it is checked what the file has
    group: str = ""
    pair: str = ""
    person: str = ""


class Source(NamedTuple):
    """The rows of one file or dataset: how messages call it, and whose they are (None: nobody said)."""

    name: str
    table: Rows
    client: str | None = None


def load_table(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    group_column: str | None = None,
    labels: Sequence[str | int | bool] | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    train_split: str | None = None,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    fetched_by: str | None = None,
    person_column: str | None = None,
) -> LabelledText:
    """Load labelled texts from .csv, .tsv, .jsonl, .json (one object a line) or .parquet files, or from the Hub.

    A folder or a pattern with `*` stands for several files, one a client (`fedlr.data.files`). A path that does not
    exist and has no file suffix is taken for a Hugging Face dataset, `owner/name` or `owner/name:configuration`, of
    which `train_split` (null: `train`) is read; so is a folder that `datasets.save_to_disk` wrote.
    `text_pair_column` names the second text of a row, where a label belongs to two.
    `labels` fixes the label names and their order; without it all files must have the same.
    `label_groups` gives new names to groups of labels, in place of `labels`: {film: [movie], other: [amazon, nyt]}.
    `on_bad_row` is "refuse", or "drop", which leaves bad rows out and counts them in `num_dropped`.
    `fetched_by` is the command that fetches the file, told where it is missing. `person_column` says whose a row is
    (`fedlr.data.persons`).

    Raises:
        InputError: which names the file, the row and what to change.
    """
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"Expected a path or the name of a dataset, got {path!r}")
    columns = columns_of(text_column, label_column, group_column, text_pair_column, person_column)
    if labels is not None and label_groups is not None:
        raise InputError(f"Expected data.labels=null next to data.label_groups, which names the labels, got {labels!r}")
    sources = read_sources(os.fspath(path), columns, encoding=encoding, split=train_split, fetched_by=fetched_by)
    drop = on_bad_row == "drop"
    return labelled(sources, os.fspath(path), columns, labels=labels, label_groups=label_groups, drop=drop)


def labelled(
    sources: Sequence[Source],
    name: str,
    columns: Columns,
    *,
    labels: Sequence[str | int | bool] | None = None,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    drop: bool = False,
) -> LabelledText:
    """Return the usable rows of one or several tables as labelled texts; `load_table` says what the arguments are.

    Raises:
        InputError: which names the table, the row and what to change.
    """
    group_of = {} if label_groups is None else _group_of(label_groups)
    known = list(group_of) or labels
    allowed = None if known is None else _allowed_labels(known)
    cleaned = [_cleaned(source, columns, allowed=allowed, drop=drop) for source in sources]
    examples = [example for one in cleaned for example in one]
    num_dropped = sum(len(source.table.rows) for source in sources) - len(examples)
    _check_enough(name, examples, num_dropped, columns)
    if label_groups is not None:
        allowed = tuple(label_groups)
    elif allowed is None:
        _check_same_labels(sources, cleaned)
        check_classes(f"{name}, column {columns.label!r}", [example.label for example in examples])
    names = [group_of.get(example.label, example.label) for example in examples]
    label_names = allowed or sources[0].table.class_names or _in_order(set(names))
    index = {label: i for i, label in enumerate(label_names)}
    clients = None if columns.group or sources[0].client is None else tuple(s.client or "" for s in sources)
    groups = None if columns.group is None else tuple(example.group for example in examples)
    if clients is not None:
        groups = tuple(client for client, one in zip(clients, cleaned, strict=True) for _ in one)
    return LabelledText(
        texts=tuple(example.text for example in examples),
        labels=np.array([index[label] for label in names], dtype=np.int64),
        label_names=label_names,
        groups=groups,
        source=name,
        num_dropped=num_dropped,
        pairs=None if columns.pair is None else tuple(example.pair for example in examples),
        clients=clients,
        persons=None if columns.person is None else tuple(example.person for example in examples),
    )


def _check_same_labels(sources: Sequence[Source], cleaned: Sequence[Sequence[Example]]) -> None:
    """Refuse files whose labels differ where nobody named them: a label may only be spelled in another way there."""
    found = [
        source.table.class_names or {example.label for example in one}
        for source, one in zip(sources, cleaned, strict=True)
    ]
    for source, labels in zip(sources, found, strict=True):
        if labels != found[0]:
            raise InputError(
                f"{source.name} has other labels than {sources[0].name}: spell them alike in all files, and name all "
                "with data.labels=[...] if not every file has each"
            )


def columns_of(text: str, label: str, group: str | None, pair: str | None, person: str | None = None) -> Columns:
    """Return the columns, which must differ."""
    if pair is not None and pair in (text, label, group):
        key = "text_column" if pair == text else "label_column" if pair == label else "group_column"
        raise InputError(
            f"Expected text_pair_column to be a column of its own, got {pair!r}, which is {key}; set it to the second "
            "text's, or to null where a row has one text"
        )
    columns = Columns(text, label, group, pair, person)
    if len(set(columns.names)) < len(columns.names):
        others = ", group and person" if person else " and group"
        raise InputError(f"Expected different columns for text, label{others}, got {columns.names}")
    return columns


def _group_of(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the group of each label; groups must be two or more, filled and disjoint."""
    group_of = {named(label): group for group, members in groups.items() for label in members}
    num_members = sum(len(members) for members in groups.values())
    if len(groups) < 2 or not all(groups.values()) or len(group_of) < num_members:
        raise InputError(f"Expected data.label_groups to be two or more groups of different labels, got {groups!r}")
    return group_of


def _allowed_labels(labels: Sequence[str | int | bool]) -> tuple[str, ...]:
    names = () if isinstance(labels, str) else tuple(map(named, labels))
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise InputError(
            f"Expected data.labels to be two or more different names, such as [negative,positive], got {labels!r}"
        )
    return names


def read_sources(
    path: str, columns: Columns, *, encoding: str, split: str | None, fetched_by: str | None
) -> list[Source]:
    """Find out what `path` is and read it: one source, or one for each file of a folder.

    Raises:
        InputError: which names the path and what to change.
    """
    files = table_files(path, fetched_by=fetched_by)
    if not files:
        return [Source(path, read_hub(path, columns.names, split=split or "train"))]
    if split is not None:
        raise InputError(
            f"Expected train_split=null with the file or folder {path!r}, got {split!r}: only a dataset by name has "
            "splits; a table of its own for evaluation is data.test_path"
        )
    several = files[0].client is not None
    return [
        Source(str(f.path) if several else path, read_rows(f.path, columns.names, encoding=encoding), f.client)
        for f in files
    ]


def _cleaned(source: Source, columns: Columns, *, allowed: tuple[str, ...] | None, drop: bool) -> list[Example]:
    """Return the good rows."""
    if not source.table.rows:
        raise InputError(f"{source.name} has a header and no rows: expected a text and a label in each row")
    cleaned = []
    for row in source.table.rows:
        values, problem = _clean(row, columns, source.table.class_names, allowed)
        if values is not None:
            cleaned.append(values)
        elif not drop:
            fix = "fix the row, or leave such rows out with data.on_bad_row=drop"
            raise InputError(f"{source.name}, row {row.number}{problem}; {fix}")
    return cleaned


def _clean(
    row: Row, columns: Columns, class_names: tuple[str, ...] | None, allowed: tuple[str, ...] | None
) -> tuple[Example | None, str]:
    """Return what a row holds, or what is wrong with it."""
    values, problem = texts_and_group(row, columns)
    if values is None:
        return None, problem
    label = values.label
    where = f", column {columns.label!r}: the label"
    known = allowed or ()
    name, problem = as_name(label, known=known) if class_names is None else class_name(label, class_names)
    if problem:
        return None, f"{where} {problem}"
    if allowed is not None and name not in allowed:
        return None, (
            f"{where} is not one of {', '.join(map(repr, allowed[:20]))}; if data.labels is wrong, spell it as the "
            "file does (case counts), or set data.label_column"
        )
    return values._replace(label=name), ""


def texts_and_group(row: Row, columns: Columns) -> tuple[Example | None, str]:
    """Return a row with its label as it stands, or what is wrong with its texts or its group."""
    if row.problem:
        return None, f": {row.problem}"
    values = dict(zip(columns.names, row.values, strict=True))
    for column in (columns.text, columns.pair):
        if column is not None and (problem := text_problem(values[column])):
            return None, f", column {column!r}: {problem}"
    group, problem = ("", "") if columns.group is None else as_name(values[columns.group])
    if problem:
        return None, f", column {columns.group!r}: the group {problem}"
    person, problem = ("", "") if columns.person is None else as_name(values[columns.person])
    if problem:
        return None, f", column {columns.person!r}: the person {problem}"
    pair = "" if columns.pair is None else values[columns.pair]
    return Example(values[columns.text], values[columns.label], group, pair, person), ""


def _check_enough(source: str, rows: Sequence[Example], num_dropped: int, columns: Columns) -> None:
    dropped = f" after {num_dropped} bad rows were dropped" if num_dropped else ""
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} usable rows{dropped}: expected at least 2")
    if all(_is_number(row.text) for row in rows):
        raise InputError(f"{source} has only numbers as texts in column {columns.text!r}: set data.text_column")
    if columns.pair is not None and all(_is_number(row.pair) for row in rows):
        raise InputError(f"{source} has only numbers as texts in column {columns.pair!r}: set data.text_pair_column")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    ordered = sorted(names)
    if all(name.removeprefix("-").isdecimal() for name in ordered):
        ordered.sort(key=int)
    return tuple(ordered)
