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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlr.data.classes import check_classes
from fedlr.data.hub import read_hub
from fedlr.data.rows import SUFFIXES, Row, Rows, read_rows
from fedlr.data.values import as_name, class_name, named, text_problem
from fedlr.errors import InputError

# What ends like this is a file that is not there, never the name of a dataset.
_FILE_SUFFIXES = SUFFIXES + tuple(
    ".xlsx .xls .ods .txt .ndjson .gz .zip .zst .bz2 .xz .arrow .feather .pkl .npy .npz .sqlite .xml".split()
)


@dataclass(frozen=True)
class LabelledText:
    """Texts with integer labels, in the order of their source.

    `groups` names the natural client or domain of each text, if the source has such a column. `num_dropped`
    counts the bad rows that were left out on request; whoever loads the data says so.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,), indices into label_names
    label_names: tuple[str, ...]
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "LabelledText":
        """Return the examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        groups = None if self.groups is None else tuple(self.groups[i] for i in chosen)
        return replace(self, texts=texts, labels=self.labels[chosen], groups=groups)


def load_table(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    group_column: str | None = None,
    labels: Sequence[str | int | bool] | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    split: str = "train",
    label_groups: Mapping[str, Sequence[str]] | None = None,
    fetched_by: str | None = None,
) -> LabelledText:
    """Load labelled texts from a .csv, .tsv, .jsonl, .json (one object a line) or .parquet file, or from the
    Hub.

    A path that does not exist and has no file suffix is taken for a Hugging Face dataset, `owner/name` or
    `owner/name:configuration`, of which `split` is read. `labels` fixes the label names and their order.
    `label_groups` gives new names to groups of labels, in place of `labels`: {film: [movie], other: [amazon, nyt]}.
    `on_bad_row` is "refuse", or "drop", which leaves bad rows out and counts them in `num_dropped`.
    `fetched_by` is the command that fetches the file, told where it is missing.

    Raises:
        InputError: which names the file, the row and what to change.
    """
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"Expected a path or the name of a dataset, got {path!r}")
    group_of = {} if label_groups is None else _group_of(label_groups, labels)
    columns = [text_column, label_column] + ([group_column] if group_column is not None else [])
    if len(set(columns)) < len(columns):
        raise InputError(f"Expected different columns for text, label and group, got {columns}")
    known = list(group_of) or labels
    allowed = None if known is None else _allowed_labels(known)
    source, table = _read(os.fspath(path), columns, encoding=encoding, split=split, fetched_by=fetched_by)
    cleaned, num_dropped = _cleaned(source, table, columns, allowed=allowed, drop=on_bad_row == "drop")
    texts = tuple(text for text, _, _ in cleaned)
    names = [group_of.get(name, name) for _, name, _ in cleaned]
    if label_groups is not None:
        allowed = tuple(label_groups)
    _check_enough(source, texts, num_dropped, text_column)
    if allowed is None:
        check_classes(f"{source}, column {label_column!r}", names)
    label_names = allowed or table.class_names or _in_order(set(names))
    index = {name: i for i, name in enumerate(label_names)}
    groups = None if group_column is None else tuple(group for _, _, group in cleaned)
    integers = np.array([index[name] for name in names], dtype=np.int64)
    return LabelledText(texts, integers, label_names, groups, source, num_dropped)


def _group_of(groups: Mapping[str, Sequence[str]], labels: object) -> dict[str, str]:
    """Return the group of each label; groups must be two or more, filled and disjoint."""
    group_of = {named(label): group for group, members in groups.items() for label in members}
    num_members = sum(len(members) for members in groups.values())
    if labels is not None:
        raise InputError(f"Expected data.labels=null next to data.label_groups, which names the labels, got {labels!r}")
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


def _read(path: str, columns: Sequence[str], *, encoding: str, split: str, fetched_by: str | None) -> tuple[str, Rows]:
    """Find out what `path` is and read it; also return the name by which messages call it."""
    file = Path(os.path.expanduser(path))
    suffix = file.suffix.lower()
    if os.path.isdir(file):
        inside = [name for name in _names_in(file) if name.lower().endswith(SUFFIXES)]
        hint = f"for example {os.path.join(path, inside[0])!r}" if inside else "it holds none"
        raise InputError(f"{path!r} is a folder: expected a {', '.join(SUFFIXES)} file, {hint}")
    if os.path.exists(file):
        if suffix not in SUFFIXES:
            raise InputError(f"{path!r} ends in {suffix!r}: export it as one of {', '.join(SUFFIXES)}")
        if not os.path.isfile(file):
            raise InputError(f"{path!r} is not a regular file: expected a {', '.join(SUFFIXES)} file")
        return path, read_rows(file, columns, encoding=encoding)
    if suffix in _FILE_SUFFIXES or path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise InputError(_missing_file(path, file) + (f"; fetch it with: {fetched_by}" if fetched_by else ""))
    return path, read_hub(path, columns, split=split)


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


def _cleaned(
    source: str, table: Rows, columns: Sequence[str], *, allowed: tuple[str, ...] | None, drop: bool
) -> tuple[list[tuple[str, str, str]], int]:
    """Return (text, label name, group or '') of the good rows, and the number of rows dropped."""
    if not table.rows:
        raise InputError(f"{source} has a header and no rows: expected a text and a label in each row")
    cleaned = []
    for row in table.rows:
        values, problem = _clean(row, columns, table.class_names, allowed)
        if values is not None:
            cleaned.append(values)
        elif not drop:
            fix = "fix the row, or leave such rows out with data.on_bad_row=drop"
            raise InputError(f"{source}, row {row.number}{problem}; {fix}")
    return cleaned, len(table.rows) - len(cleaned)


def _clean(
    row: Row, columns: Sequence[str], class_names: tuple[str, ...] | None, allowed: tuple[str, ...] | None
) -> tuple[tuple[str, str, str] | None, str]:
    """Return (text, label name, group or '') of a row, or what is wrong with it."""
    if row.problem:
        return None, f": {row.problem}"
    text, label, *group = row.values
    if problem := text_problem(text):
        return None, f", column {columns[0]!r}: {problem}"
    where = f", column {columns[1]!r}: the label"
    known = allowed or ()
    name, problem = as_name(label, known=known) if class_names is None else class_name(label, class_names)
    if problem:
        return None, f"{where} {problem}"
    if allowed is not None and name not in allowed:
        return None, (
            f"{where} is not one of {', '.join(map(repr, allowed[:20]))}; if data.labels is wrong, spell it as the "
            "file does (case counts), or set data.label_column"
        )
    group_name, problem = as_name(group[0]) if group else ("", "")
    return (None, f", column {columns[2]!r}: the group {problem}") if problem else ((text, name, group_name), "")


def _check_enough(source: str, texts: Sequence[str], num_dropped: int, text_column: str) -> None:
    dropped = f" after {num_dropped} bad rows were dropped" if num_dropped else ""
    if len(texts) < 2:
        raise InputError(f"{source} has {len(texts)} usable rows{dropped}: expected at least 2")
    if all(map(_is_number, texts)):
        raise InputError(f"{source} has only numbers as texts in column {text_column!r}: set data.text_column")


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
