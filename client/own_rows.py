"""A device's own rows: read once, before it connects; and made into what a model reads, without a word of any row.

Whether a row can be read may hang on what a server asks: another chat template, another length, other layers below the
adapter. A refusal that hung on it would be one bit about private rows for each choice, told for nothing. So terms are
compared with the form of the table alone (its kind and what its owner declared), and what cannot be read is left out:
a rule about one row, by which adding or removing a row still moves a step's sum by at most C. The device's own log has
it; the answer is that of any other round.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from fedlr.client.settings import Settings
from fedlr.config.build import build
from fedlr.data.conversations import Conversations
from fedlr.data.multilabel import MultiLabelText
from fedlr.data.scored import ScoredText
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.flower.task_terms import LanguageTask, MultiLabelTask, ScoreTask
from fedlr.flower.terms import Terms
from fedlr.privacy.mechanism import check_delta
from fedlr.rounds.pools.rehearsal import Rehearsal
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import Examples
from fedlr.tasks.task import Base, Task

Rows = NDArray[np.int64]


def read_rows(settings: Settings) -> Table:
    """Read the device's own table.

    Raises:
        InputError: it cannot be read, has other labels than its owner declared, or is too large for the owner's delta.
    """
    data: Table = build(settings.data.section(), "data", seed=0)
    if data.label_names != settings.label_names:
        raise InputError(
            f"Expected {data.source} to have the labels {list(settings.label_names)} of data.labels, in that order, "
            f"got {len(data.label_names)} labels that differ"
        )
    if settings.budget() is not None:
        check_delta(settings.privacy.delta, len(data))
    return data


def check_form(data: Table, terms: Terms) -> None:
    """Refuse terms for a table of another form: what its owner declared decides, and no row.

    Raises:
        InputError: which names what differs.
    """
    if list(data.label_names) != terms.label_names:
        raise InputError(
            f"Expected the label names {terms.label_names} of the terms in data.labels, got {list(data.label_names)}"
        )
    if (getattr(data, "pairs", None) is not None) != terms.pairs:
        wanted, got = ("pairs", "single texts") if terms.pairs else ("single texts", "pairs")
        raise InputError(f"Expected rows of {wanted}, as the terms say, got {got}; set data.text_pair_column")
    if isinstance(terms.task, LanguageTask) and isinstance(data, Conversations):
        if data.is_plain == terms.task.has_turns:
            wanted, got = ("conversations", "plain texts") if data.is_plain else ("plain texts", "conversations")
            raise InputError(f"Expected rows of {wanted}, as the terms say, got {got}; look at data.format")
    if isinstance(terms.task, ScoreTask) and isinstance(data, ScoredText):
        if list(data.score_range) != terms.task.score_range:
            wanted_range, got_range = terms.task.score_range, list(data.score_range)
            raise InputError(f"Expected data.score_range={wanted_range}, as the terms say, got {got_range}")
    if isinstance(terms.task, MultiLabelTask) and isinstance(data, MultiLabelText):
        if list(data.output_names) != terms.task.labels:
            wanted_labels, got_labels = terms.task.labels, list(data.output_names)
            raise InputError(f"Expected data.labels={wanted_labels}, as the terms say, got {got_labels}")


def encode_readable(
    task: Task, base: Base, data: Table, *, max_length: int, say: Callable[[str], None]
) -> Examples | None:
    """Return the rows as a model reads them, without those that it cannot read; None where it can read none.

    Args:
        task: what the terms ask.
        base: the model that will read them; constant rows have passed it.
        data: the device's own rows, of the form that the task is for.
        max_length: tokens of a row, at most.
        say: the device's own log, which alone is told of rows that are left out.
    """
    problem = ""

    def encoded(table: Table) -> Examples | None:
        nonlocal problem
        try:
            return task.encode(base, table, max_length=max_length)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a template, a tokenizer (a panic too) or the memory makes of a row
            problem = problem or f"{type(error).__name__}: {first_line(error)}"
            return None

    if (whole := encoded(data)) is not None:
        return whole
    readable = _readable(lambda rows: encoded(data.subset(rows)) is not None, np.arange(len(data), dtype=np.int64))
    found = encoded(data.subset(readable)) if len(readable) else None
    num_left_out = len(data) - (0 if found is None else len(found))
    say(
        f"{num_left_out} of {len(data)} rows cannot be read as these terms ask, and count as zero in every round, "
        f"which is charged all the same; the first: {problem}"
    )
    return found


@dataclass(frozen=True)
class LateRows:
    """Encoded rows that pass the frozen layers when a batch is made of them, as they cannot all be kept past these.

    A row that cannot pass has no finite gradient, so it counts as zero (`fedlr.tasks.examples.Examples`).

    Args:
        rows: before the layers.
        past: returns a few of them past the layers.
        rehearsal: constant rows that have passed, and the device's own log.
    """

    rows: Examples
    past: Callable[[Examples], Examples]
    rehearsal: Rehearsal
    _one_by_one: Lock = field(default_factory=Lock)  # passing hooks the model

    @property
    def labels(self) -> Rows:
        """Return the class of each row."""
        return self.rows.labels

    @property
    def num_truncated(self) -> int:
        """Return how many were cut."""
        return self.rows.num_truncated

    @property
    def lengths(self) -> Rows:
        """Return the cost of each row."""
        return self.rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Sequence[int] | Rows) -> "LateRows":
        """Return a copy of the rows at `indices`, in that order."""
        return replace(self, rows=self.rows.subset(indices))

    def batch(self, rows: Sequence[int] | Rows) -> Batch:
        """Return these rows past the layers.

        Raises:
            Exception: whatever stopped several rows: one of them would else decide about the others.
        """
        few = self.rows.subset(rows)
        try:
            with self._one_by_one:
                return self.past(few).batch(range(len(few)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the memory, an operation that does not take a value, a library's panic
            self.rehearsal.failed(error, len(few))
        constant = self.rehearsal.share.table.batch([0])
        nothing = {n: t.fill_(math.nan) if t.is_floating_point() else t for n, t in constant.inputs.items()}
        return Batch(nothing, constant.targets)


def _readable(is_read: Callable[[Rows], bool], rows: Rows) -> Rows:
    """Return those of the rows that can be read, by halves."""
    if is_read(rows):
        return rows
    if len(rows) == 1:
        return rows[:0]
    middle = len(rows) // 2
    return np.concatenate([_readable(is_read, rows[:middle]), _readable(is_read, rows[middle:])])
