"""Rows of persons: at which client, and how many of each are trained on.

A person is what `data.person_column` says. Where it is given a hash of the person, not of the text, decides about a
row's place, so that all rows of a person lie together. Which of a person's rows are trained on, where there are more
than the cap, is decided by a keyed hash of each row's own text: fixed, and a function of that person's rows alone.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlr.data.placement import person_positions, persons_of
from fedlr.data.table import Table
from fedlr.errors import InputError

Indices = NDArray[np.int64]


def capped(data: Table, indices: Sequence[Indices], *, most: int, seed: int) -> tuple[Indices, ...]:
    """Return each client's rows with at most `most` of any person; ascending.

    Unit: one person. Removing a person changes no row of another. How many rows were left out depends on the data, and
    is told to nobody.

    Raises:
        InputError: the table names no persons, or one has rows at two clients.
    """
    persons = persons_of(data)
    if persons is None:
        raise InputError(f"Expected data.person_column with privacy.unit=person, got none for {data.source}")
    _check_apart(persons, indices, source=data.source)
    positions = person_positions(data, seed=seed)
    return tuple(_kept(persons, positions, rows, most=most) for rows in indices)


def _kept(persons: Sequence[str], positions: NDArray[np.float64], rows: Indices, *, most: int) -> Indices:
    of_person: dict[str, list[int]] = defaultdict(list)
    for row in rows[np.argsort(positions[rows], kind="stable")].tolist():
        mine = of_person[persons[row]]
        if len(mine) < most:
            mine.append(row)
    return np.array(sorted(row for mine in of_person.values() for row in mine), dtype=np.int64)


def _check_apart(persons: Sequence[str], indices: Sequence[Indices], *, source: str) -> None:
    """Refuse a person at two clients: each would account for it alone, and what they release adds up."""
    holder: dict[str, int] = {}
    for client, rows in enumerate(indices):
        for row in rows.tolist():
            if holder.setdefault(persons[row], client) != client:
                raise InputError(
                    f"Expected every person of {source} at one client, got one with rows at two: set partition=iid, "
                    "which places all rows of a person together, or give each client persons of its own"
                )
