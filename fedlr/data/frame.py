"""A data frame of Python to labelled texts, under the same rules as a table on disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlr.data.formats import Row, Rows, check_columns
from fedlr.data.table import LabelledText, Source, columns_of, labelled
from fedlr.errors import InputError

if TYPE_CHECKING:
    import pandas


def from_frame(
    frame: "pandas.DataFrame",
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    group_column: str | None = None,
    labels: Sequence[str | int | bool] | None = None,
    on_bad_row: str = "refuse",
    name: str = "data frame",
) -> LabelledText:
    """Return the rows of a pandas data frame, in its order, as `load_table` returns those of a file.

    A function that returns them may be the `data._target_` of a configuration; annotate it with `-> LabelledText`.

    Args:
        frame: with a column of texts and one of labels; what is missing (NaN, None, pandas.NA) makes a row bad.
        text_column: the column of the texts.
        text_pair_column: the second text of a row, where a label belongs to two.
        label_column: the column of the labels.
        group_column: the natural clients, for `partition=by_group`.
        labels: the label names in order; None: those found, which for private rows tells what they hold.
        on_bad_row: "refuse", or "drop".
        name: what messages and a privacy ledger call the frame; rows count from 1.

    Raises:
        InputError: which names the row and the column, and holds no value of a row.

    >>> import pandas
    >>> frame = pandas.DataFrame({"letter": ["all is well", "come at once"], "tone": ["calm", "urgent"]})
    >>> data = from_frame(frame, text_column="letter", label_column="tone", labels=["urgent", "calm"])
    >>> data.texts[0], data.labels.tolist()
    ('all is well', [1, 0])
    """
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    if not hasattr(frame, "columns") or not hasattr(frame, "notna"):
        raise InputError(
            f"Expected a pandas data frame, got a {type(frame).__name__}; see fedlr.data.load_table for files"
        )
    columns = columns_of(text_column, label_column, group_column, text_pair_column)
    check_columns(name, [str(column) for column in frame.columns], columns.names)
    wanted = frame[columns.names].astype(object)
    values = wanted.where(wanted.notna(), None).itertuples(index=False, name=None)
    rows = Rows([Row(number, tuple(row)) for number, row in enumerate(values, start=1)])
    return labelled([Source(name, rows)], name, columns, labels=labels, drop=on_bad_row == "drop")
