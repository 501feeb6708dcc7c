"""Label flip: hostile clients train, honestly, on wrong labels.

Source: Biggio et al. 2012, https://arxiv.org/abs/1206.6389; in federated learning Fang et al. 2020,
https://arxiv.org/abs/1911.11815, whose flip this is: label l of L becomes L - 1 - l.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from fedlr.errors import InputError
from fedlr.tasks.examples import Share


def with_flipped_labels(clients: tuple[Share, ...], bad: Collection[int], *, num_labels: int) -> tuple[Share, ...]:
    """Return the clients' shares of a table in which the rows of the hostile ones have other labels.

    Raises:
        InputError: rows have no classes.
    """
    if num_labels < 2:
        raise InputError(f"Expected rows of at least two classes to flip labels, got {num_labels}")
    table: Any = clients[0].table  # a frozen dataclass, whatever the task
    labels = table.labels.copy()
    rows = np.concatenate([clients[client].rows for client in sorted(bad)]) if bad else np.empty(0, dtype=np.int64)
    labels[rows] = num_labels - 1 - labels[rows]
    flipped = replace(table, labels=labels)  # one for all: a cohort trains on rows of one table
    return tuple(Share(flipped, client.rows) for client in clients)
