"""How good the shared adapter is for each client: its accuracy on held-out rows of that client's own.

The figures are computed in the clear and no epsilon covers them, so they are made only where the data are declared
public. A held-out row is the client's that would have held it: the one whose file or group it is of, else the one that
the partition deals it to, by the same hash of its text as it deals out the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlr.config.build import build
from fedlr.config.schema import Experiment
from fedlr.data.partition import Partition
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.methods.method import Method

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ClientTests:
    """The held-out rows of each client, and what clients are called where they have names."""

    rows: tuple[Rows, ...]
    names: tuple[str, ...] | None


def client_tests(
    experiment: Experiment, method: Method, partition: Partition, held_out: Table, *, seed: int
) -> ClientTests | None:
    """Return which held-out rows are whose; None where nobody asked (`tracking.client_accuracy`).

    Args:
        experiment: says whether anybody asked, and how rows are dealt out.
        method: whose adapter must be one that all clients share.
        partition: of the training rows.
        held_out: with groups where the clients have names.
        seed: of the partition.

    Raises:
        InputError: where a held-out row is no client's, or could be another's than the training rows like it.
    """
    if not experiment.tracking.client_accuracy:
        return None
    if method.personal:
        raise InputError(
            f"Expected tracking.client_accuracy=false with method={method.name}, got true: its clients keep "
            f"{', '.join(method.personal)} of their own, and no adapter is shared by all"
        )
    if partition.names is not None:
        return ClientTests(_by_name(experiment, partition.names, held_out), partition.names)
    if partition.depends_on:
        raise InputError(
            "Expected a partition that deals each row out by itself for tracking.client_accuracy=true, got one that "
            f"depends on {partition.depends_on}"
        )
    dealt: Partition = build(
        experiment.partition.section(), "partition", data=held_out, num_clients=partition.num_clients, seed=seed
    )
    return ClientTests(dealt.indices, None)


def score_clients(tests: ClientTests, score: Callable[[Rows], float]) -> dict[str, Any]:
    """Return client_accuracy.json: the accuracy of each client on its own rows, their mean, and the worst.

    Args:
        tests: whose rows are whose.
        score: returns the accuracy on some of the held-out rows.
    """
    clients: list[dict[str, Any]] = []
    for client_id, rows in enumerate(tests.rows):
        row = {"client_id": client_id, "num_test": len(rows), "accuracy": score(rows) if len(rows) else None}
        clients.append(row if tests.names is None else {**row, "name": tests.names[client_id]})
    found = [row["accuracy"] for row in clients if row["accuracy"] is not None]
    return {"mean": fmean(found), "worst": min(found), "clients": clients}


def _by_name(experiment: Experiment, names: Sequence[str], held_out: Table) -> tuple[Rows, ...]:
    if held_out.groups is None:
        raise InputError(
            f"Expected the clients' names in the test table for tracking.client_accuracy=true, got {held_out.source!r} "
            "without; set data.test_path to a folder or pattern whose files are called as those of data.path"
        )
    # Rows of clients that were left out as too small are no one's, and are scored for all together.
    strange = set(held_out.groups) - set(names)
    if strange and experiment.data.num_test is None and experiment.partition.section().get("min_rows", 0) == 0:
        shown = ", ".join(map(repr, sorted(strange)[:3]))
        raise InputError(
            f"Expected only names of clients in {held_out.source!r} for tracking.client_accuracy=true, got {shown}; "
            "call them as in data.path, or leave them out"
        )
    owners = np.array(held_out.groups)
    rows = tuple(np.flatnonzero(owners == name) for name in names)
    if not any(map(len, rows)):
        raise InputError(
            f"Expected test rows of some client in {held_out.source!r}, got none; see tracking.client_accuracy"
        )
    return rows
