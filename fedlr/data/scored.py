"""Texts, or pairs of texts, each with a number: how alike two sentences are, how good a review is.

The range of the numbers is declared, never found: the smallest and the largest number of a table are somebody's rows.
A row outside it is a bad row. Everything else of a table is as for labelled texts (`fedlr.data.table`), and no message
holds a value of a row.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedlr.data.formats import Row
from fedlr.data.table import Columns, Example, Source, Table, columns_of, read_sources, texts_and_group
from fedlr.data.values import as_number
from fedlr.errors import InputError


@dataclass(frozen=True)
class ScoredText(Table):
    """Texts with numbers, in the order of their source; `score_range` is the declared smallest and largest."""

    texts: tuple[str, ...]
    scores: NDArray[np.float32]  # (N,)
    score_range: tuple[float, float]
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0
    pairs: tuple[str, ...] | None = None
    clients: tuple[str, ...] | None = None
    num_held_out: int = 0
    label_names: tuple[str, ...] = ()

    @property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]  # rows have no class
        """Return zeros, (N,): rows have no class."""
        return np.zeros(len(self.texts), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return the text of each row, or both of a pair."""
        return tuple(zip(self.texts, *(() if self.pairs is None else (self.pairs,)), strict=True))

    def targets(self) -> list[float]:
        """Return the number of each row."""
        return [float(score) for score in self.scores]

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the rows at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        groups = None if self.groups is None else tuple(self.groups[i] for i in chosen)
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in chosen)
        return replace(self, texts=texts, scores=self.scores[chosen], groups=groups, pairs=pairs)


def load_scored_table(
    path: str | os.PathLike[str],
    *,
    score_range: Sequence[float],
    text_column: str = "text",
    text_pair_column: str | None = None,
    score_column: str = "score",
    group_column: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    train_split: str | None = None,
    fetched_by: str | None = None,
) -> ScoredText:
    """Load texts with numbers from the files and data sets that `fedlr.data.table.load_table` reads.

    Args:
        path: a file, a folder, a pattern, or the name of a data set.
        score_range: the smallest and the largest number that a row may have, declared: [0, 5].
        text_column, text_pair_column, group_column, encoding, on_bad_row, train_split, fetched_by: as there.
        score_column: of the numbers.

    Raises:
        InputError: which names the file, the row and what to change.
    """
    low, high = _range(score_range)
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    columns = columns_of(text_column, score_column, group_column, text_pair_column)
    name = os.fspath(path)
    sources = read_sources(name, columns, encoding=encoding, split=train_split, fetched_by=fetched_by)
    found = [_cleaned(source, columns, low, high, drop=on_bad_row == "drop") for source in sources]
    rows = [row for one in found for row in one]
    if len(rows) < 2:
        raise InputError(f"{name} has {len(rows)} usable rows: expected at least 2")
    is_by_file = columns.group is None and sources[0].client is not None
    clients = tuple(source.client or "" for source in sources) if is_by_file else None
    groups: tuple[str, ...] | None = None if columns.group is None else tuple(row.group for row in rows)
    if clients is not None:
        groups = tuple(client for client, one in zip(clients, found, strict=True) for _ in one)
    return ScoredText(
        texts=tuple(row.text for row in rows),
        scores=np.array([row.label for row in rows], dtype=np.float32),
        score_range=(low, high),
        groups=groups,
        source=name,
        num_dropped=sum(len(source.table.rows) for source in sources) - len(rows),
        pairs=None if columns.pair is None else tuple(row.pair for row in rows),
        clients=clients,
    )


def _range(given: Sequence[Any]) -> tuple[float, float]:
    numbers = [found for x in given if (found := None if isinstance(x, str) else _number(x)) is not None]
    if len(numbers) != 2 or len(given) != 2 or numbers[0] >= numbers[1]:
        raise InputError(f"Expected score_range to be the smallest and the largest score, such as [0,5], got {given!r}")
    return numbers[0], numbers[1]


def _cleaned(source: Source, columns: Columns, low: float, high: float, *, drop: bool) -> list[Example]:
    found = []
    for row in source.table.rows:
        scored, problem = _clean(row, columns, low, high)
        if scored is not None:
            found.append(scored)
        elif not drop:
            fix = "fix the row, or leave such rows out with data.on_bad_row=drop"
            raise InputError(f"{source.name}, row {row.number}{problem}; {fix}")
    return found


def _clean(row: Row, columns: Columns, low: float, high: float) -> tuple[Example | None, str]:
    """Return what a row holds, or what is wrong with it."""
    values, problem = texts_and_group(row, columns)
    if values is None:
        return None, problem
    score = _number(values.label)
    if score is None:
        return None, f", column {columns.label!r}: the score is missing or no number"
    if not low <= score <= high:
        return None, (
            f", column {columns.label!r}: the score is outside data.score_range=[{low:g},{high:g}], which is declared "
            "for all rows"
        )
    return values._replace(label=score), ""


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        number = as_number(value.strip())
        return None if number is None else float(number)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number_or_nan = float(value)
    return number_or_nan if math.isfinite(number_or_nan) else None
