"""Encoded rows: what a task makes of a table, how clients share it, and how it is cut into micro-batches.

Legend: N examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlr.errors import InputError
from fedlr.tasks.batch import Batch


class Examples(Protocol):
    """Rows as a model reads them: flat arrays, which can be memory-mapped and shared by all clients."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the class of each example, shape (N,); zeros where rows have none."""
        ...

    @property
    def num_truncated(self) -> int:
        """Return how many rows of the table were cut."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the cost of each example, shape (N,): its tokens, or the patches of a picture."""
        ...

    def __len__(self) -> int: ...

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """Return a copy of the examples at `indices`, in that order."""
        ...

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return these examples as a model and a loss read them together."""
        ...


@dataclass(frozen=True)
class Share:
    """One client's examples: rows of a table that all clients share. Nothing is copied; an enrolled client costs its
    row numbers."""

    table: Examples
    rows: NDArray[np.int64]  # row numbers of the table, ascending

    @classmethod
    def whole(cls, table: Examples) -> "Share":
        """Return all rows of a table."""
        return cls(table, np.arange(len(table), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the cost of each example, shape (N,)."""
        return self.table.lengths[self.rows]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the label of each example, shape (N,)."""
        return self.table.labels[self.rows]


def micro_batches(
    lengths: NDArray[np.int64], indices: Sequence[int] | NDArray[np.int64], token_budget: int
) -> list[NDArray[np.int64]]:
    """Cut `indices` into micro-batches of similar length, each with (examples * longest) <= `token_budget`.

    `lengths` are those of the whole table. An example longer than the budget is a micro-batch of its own, so
    every index is in exactly one of them, whatever the budget. Shortest first; equal lengths keep their
    order.

    Raises:
        InputError: for a budget below 1.
    """
    if token_budget < 1:
        raise InputError(f"Expected token_budget >= 1, got {token_budget}")
    chosen = np.asarray(indices, dtype=np.int64)
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    batches, start = [], 0
    for end, length in enumerate(lengths[chosen].tolist()):
        if end > start and (end + 1 - start) * length > token_budget:
            batches.append(chosen[start:end])
            start = end
    return batches + ([chosen[start:]] if len(chosen) else [])
