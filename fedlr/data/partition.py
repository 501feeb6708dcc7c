"""Partitions of one labelled table over simulated clients.

Every function takes `(data, *, num_clients, seed, ...)` and is named by `_target_` in `configs/partition`.
The same data, seed and arguments give the same partition. A row's client is found by a hash of its text
(`fedlr.data.placement`), so that removing a row moves no other one, except where a partition says otherwise in
`depends_on`. Sizes of clients are therefore random. Legend: N examples, C clients, L labels.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlr.data.placement import client_positions
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.streams import Purpose, stream

_MAX_REDRAWS = 1000

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """Which examples each client holds.

    Guarantees: no row belongs to two clients. Each client's indices are ascending.
    """

    indices: tuple[Indices, ...]  # one array per client
    # What besides the row itself decides about its client, and what to change; '' where nothing does.
    depends_on: str = "partition._target_ does not say what a row's client depends on"

    def __post_init__(self) -> None:
        joined = np.concatenate(self.indices) if self.indices else np.empty(0, dtype=np.int64)
        if len(np.unique(joined)) < len(joined):
            raise InputError("A partition gives one example to two clients: expected disjoint indices")

    @property
    def num_clients(self) -> int:
        return len(self.indices)

    def label_counts(self, data: LabelledText) -> NDArray[np.int64]:
        """Count the examples of each label at each client, shape (C, L)."""
        num_labels = len(data.label_names)
        return np.stack([np.bincount(data.labels[i], minlength=num_labels) for i in self.indices])


def iid(data: LabelledText, *, num_clients: int, seed: int) -> Partition:
    """Give every example to a client at random, all clients being as likely.

    Raises:
        InputError: when there are fewer examples than clients.
    """
    _check_num_clients(data, num_clients)
    even = np.full((len(data.label_names), num_clients), 1 / num_clients)
    return Partition(_dealt(data, even, client_positions(data.texts, seed=seed)), depends_on="")


def dirichlet(data: LabelledText, *, num_clients: int, seed: int, alpha: float) -> Partition:
    """Give each client its own label proportions, drawn from Dir(alpha / L).

    An example of a label goes to a client with the probability of that client's proportion of it, over the sum of all
    clients' proportions. If labels are equally frequent, so are the clients' expected sizes. Nothing of the data enters
    the proportions: in the source the prior is the labels' frequency, and examples are drawn without replacement in
    equal numbers, by which one row would move others.

    Raises:
        InputError: for alpha below 1e-6, or fewer examples than clients.

    Source: after Hsu, Qi and Brown 2019, sec. 3, https://arxiv.org/abs/1909.06335
    """
    _check_num_clients(data, num_clients)
    _check_alpha(alpha)
    num_labels = len(data.label_names)
    generator = stream(seed, Purpose.PARTITION)
    wanted = generator.dirichlet(np.full(num_labels, alpha / num_labels), size=num_clients).T  # (L, C)
    totals = wanted.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, wanted, 1.0) / np.where(totals > 0, totals, num_clients)  # of nobody's: to all
    return Partition(_dealt(data, shares, client_positions(data.texts, seed=seed)), depends_on="")


def dirichlet_by_label(
    data: LabelledText, *, num_clients: int, seed: int, alpha: float, min_examples: int = 10
) -> Partition:
    """Spread the examples of each label over the clients by Dir(alpha); sizes are unequal.

    Drawn again, at most 1000 times, until every client has `min_examples`, which lets every row decide about all
    others. With `min_examples` 0 there is one draw, and a row's client depends on that row alone.

    Raises:
        InputError: for alpha below 1e-6, or when no draw gives every client enough.

    Source: Li, Diao, Chen and He 2022, sec. IV-B, https://arxiv.org/abs/2102.02079 (without the extra rule of
    their code that stops filling a client at the average size)
    """
    _check_num_clients(data, num_clients)
    _check_alpha(alpha)
    if not 0 <= min_examples * num_clients <= len(data):
        raise InputError(
            f"Expected min_examples in [0, {len(data) // num_clients}] for {len(data)} examples and "
            f"{num_clients} clients, got {min_examples}"
        )
    generator = stream(seed, Purpose.PARTITION)
    positions = client_positions(data.texts, seed=seed)
    redrawn = "all rows, as clients are drawn again until each has partition.min_examples: set it to 0"
    best = 0
    for _ in range(_MAX_REDRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), size=len(data.label_names))  # (L, C)
        indices = _dealt(data, shares, positions)
        smallest = min(map(len, indices))
        if smallest >= min_examples:
            return Partition(indices, depends_on=redrawn if min_examples else "")
        best = max(best, smallest)
    raise InputError(
        f"None of {_MAX_REDRAWS} Dirichlet draws with alpha={alpha} gives each of {num_clients} clients "
        f"{min_examples} of the {len(data)} examples (the smallest client had {best} at best): "
        "lower min_examples or num_clients, or raise alpha"
    )


def by_group(data: LabelledText, *, num_clients: int, seed: int, groups: Sequence[str] | None = None) -> Partition:
    """Make each value of the group column one client, in the order of `groups`; `seed` changes nothing.

    Without `groups` they are those that are found, sorted: then a row can decide which clients there are.

    Raises:
        InputError: without a group column, when the number of groups is not `num_clients`, or when a row's group is
            not among `groups`.
    """
    if data.groups is None:
        raise InputError(f"by_group needs the natural clients of {data.source}: set data.group_column")
    names = sorted(set(data.groups)) if groups is None else [unicodedata.normalize("NFC", name) for name in groups]
    if len(set(names)) < len(names):
        raise InputError(f"Expected groups that differ, got {list(groups or ())!r}")
    if len(names) != num_clients:
        raise InputError(
            f"by_group makes one client per group and {data.source} has {len(names)} groups, "
            f"got num_clients={num_clients}: set num_clients={len(names)}"
        )
    place = {name: client_id for client_id, name in enumerate(names)}
    if strange := sum(name not in place for name in data.groups):
        raise InputError(
            f"Expected every row's group among groups={names}, got {strange} rows of {data.source} with another"
        )
    owners = np.array([place[name] for name in data.groups])
    found = "the groups that other rows name: set partition.groups=[...]"
    return Partition(_by_owner(owners, num_clients), depends_on=found if groups is None else "")


def _check_num_clients(data: LabelledText, num_clients: int) -> None:
    if num_clients < 1:
        raise InputError(f"Expected num_clients >= 1, got {num_clients}")
    if num_clients > len(data):
        raise InputError(
            f"{num_clients} clients cannot share the {len(data)} examples of {data.source}: "
            f"set num_clients to {len(data)} or less"
        )


def _check_alpha(alpha: float) -> None:
    # 1e-6 is one label a client already; far below it the gamma draws underflow to nan
    if not 1e-6 <= alpha < math.inf:
        raise InputError(f"Expected alpha to be a number >= 1e-06, got {alpha!r}")


def _dealt(data: LabelledText, shares: NDArray[np.float64], positions: NDArray[np.float64]) -> tuple[Indices, ...]:
    """Give each row to the client in whose part of [0, 1) its position is; each label has parts, shape (L, C)."""
    ends = np.cumsum(shares, axis=1)[:, :-1]
    owners = np.zeros(len(data), dtype=np.int64)
    for label, of_label in enumerate(ends):
        rows = np.flatnonzero(data.labels == label)
        owners[rows] = np.searchsorted(of_label, positions[rows], side="right")
    return _by_owner(owners, shares.shape[1])


def _by_owner(owners: Indices, num_clients: int) -> tuple[Indices, ...]:
    ends = np.cumsum(np.bincount(owners, minlength=num_clients))[:-1]
    return tuple(np.split(np.argsort(owners, kind="stable"), ends))
