"""Texts, or pairs of texts, each of one class."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlr.data.table import LabelledText, Table
from fedlr.errors import InputError
from fedlr.tasks.classification import Classification
from fedlr.tasks.reading import check_reading, read_texts
from fedlr.tasks.task import Base
from fedlr.tasks.tokenise import TokenisedText


@dataclass(frozen=True)
class TextClassification(Classification):
    """The task `text_classification`; its arguments are those of `fedlr.tasks.classification.Classification`."""

    name: str = "text_classification"

    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """See `fedlr.tasks.task.Task.check`."""
        check_reading(base, max_length=max_length, has_pairs=_texts(table).pairs is not None)

    def encode(self, base: Base, table: Table, *, max_length: int) -> TokenisedText:
        """See `fedlr.tasks.task.Task.encode`."""
        return read_texts(_texts(table), base, max_length=max_length)


def text_classification(
    *, label_names: tuple[str, ...], label_weights: Mapping[str, float] | None = None
) -> TextClassification:
    """Return the task of texts with one of these classes each; see `TextClassification`."""
    return TextClassification(label_names, label_weights)


def _texts(table: Table) -> LabelledText:
    if not isinstance(table, LabelledText):
        raise InputError(
            f"Expected labelled texts for task=text_classification, got {table.source}, a table of another kind; set "
            "task, or data"
        )
    return table
