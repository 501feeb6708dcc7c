"""Texts, or pairs of texts, each with a number: how alike two sentences are, how good a review is.

The range of the numbers is declared, never found: the smallest and the largest number of a table are somebody's rows.
A row outside it is a bad row. Everything else of a table is as for labelled texts (`fedlr.data.table`), and no message
holds a value of a row.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlr.data.table import columns_of
from fedlr.data.targets import TextsWithTargets, read_with_targets
from fedlr.data.values import as_number
from fedlr.errors import InputError


@dataclass(frozen=True)
class ScoredText(TextsWithTargets):
    """Texts with numbers, in the order of their source; `score_range` is the declared smallest and largest."""

    _target: ClassVar[str] = "scores"

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
    columns = columns_of(text_column, score_column, group_column, text_pair_column)

    def score(row: dict[str, Any]) -> tuple[float | None, str]:
        found = _number(row[score_column])
        if found is None:
            return None, f", column {score_column!r}: the score is missing or no number"
        if low <= found <= high:
            return found, ""
        return None, (
            f", column {score_column!r}: the score is outside data.score_range=[{low:g},{high:g}], which is declared "
            "for all rows"
        )

    found = read_with_targets(
        path,
        columns,
        score,
        encoding=encoding,
        on_bad_row=on_bad_row,
        train_split=train_split,
        fetched_by=fetched_by,
    )
    return ScoredText(
        texts=tuple(row.text for row in found.rows),
        scores=np.array([row.label for row in found.rows], dtype=np.float32),
        score_range=(low, high),
        groups=found.groups,
        source=os.fspath(path),
        num_dropped=found.num_dropped,
        pairs=found.pairs,
        clients=found.clients,
    )


def _range(given: Sequence[Any]) -> tuple[float, float]:
    numbers = [found for x in given if (found := None if isinstance(x, str) else _number(x)) is not None]
    if len(numbers) != 2 or len(given) != 2 or numbers[0] >= numbers[1]:
        raise InputError(f"Expected score_range to be the smallest and the largest score, such as [0,5], got {given!r}")
    return numbers[0], numbers[1]


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        number = as_number(value.strip())
        return None if number is None else float(number)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number_or_nan = float(value)
    return number_or_nan if math.isfinite(number_or_nan) else None
