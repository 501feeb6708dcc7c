"""Partitions of one labelled table over simulated clients.

Every function takes `(data, *, num_clients, seed, ...)` and is named by `_target_` in `configs/partition`.
The same data, seed and arguments give the same partition. A row's client is found by a hash of its text
(`fedlr.data.placement`), so that removing a row moves no other one, except where a partition says otherwise in
`depends_on`. Sizes of clients are therefore random. Legend: N examples, C clients, L labels.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlr.data.placement import client_positions, persons_of, placed_by
from fedlr.data.table import Table
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
    taken_as_public: tuple[str, ...] = ()  # sentences, of what decides which clients there are
    num_left_out: int = 0  # clients that are too small: their rows are no one's
    names: tuple[str, ...] | None = None  # of the clients, where they are natural ones

    def __post_init__(self) -> None:
        joined = np.concatenate(self.indices) if self.indices else np.empty(0, dtype=np.int64)
        if len(np.unique(joined)) < len(joined):
            raise InputError("A partition gives one example to two clients: expected disjoint indices")

    @property
    def num_clients(self) -> int:
        return len(self.indices)

    def label_counts(self, data: Table) -> NDArray[np.int64]:
        """Count the examples of each label at each client, shape (C, L)."""
        num_labels = len(data.label_names)
        return np.stack([np.bincount(data.labels[i], minlength=num_labels) for i in self.indices])


def iid(data: Table, *, num_clients: int, seed: int) -> Partition:
    """Give every example to a client at random, all clients being as likely.

    Raises:
        InputError: when there are fewer examples than clients.
    """
    _check_num_clients(data, num_clients)
    even = np.full((max(1, len(data.label_names)), num_clients), 1 / num_clients)
    return Partition(_dealt(data, even, client_positions(placed_by(data), seed=seed)), depends_on="")


def dirichlet(data: Table, *, num_clients: int, seed: int, alpha: float) -> Partition:
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
    _check_no_persons(data, "dirichlet")
    _check_alpha(alpha)
    num_labels = _num_classes(data)
    generator = stream(seed, Purpose.PARTITION)
    wanted = generator.dirichlet(np.full(num_labels, alpha / num_labels), size=num_clients).T  # (L, C)
    totals = wanted.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, wanted, 1.0) / np.where(totals > 0, totals, num_clients)  # of nobody's: to all
    return Partition(_dealt(data, shares, client_positions(placed_by(data), seed=seed)), depends_on="")


def dirichlet_by_label(data: Table, *, num_clients: int, seed: int, alpha: float, min_examples: int = 10) -> Partition:
    """Spread the examples of each label over the clients by Dir(alpha); sizes are unequal.

    Drawn again, at most 1000 times, until every client has `min_examples`, which lets every row decide about all
    others. With `min_examples` 0 there is one draw, and a row's client depends on that row alone.

    Raises:
        InputError: for alpha below 1e-6, or when no draw gives every client enough.

    Source: Li, Diao, Chen and He 2022, sec. IV-B, https://arxiv.org/abs/2102.02079 (without the extra rule of
    their code that stops filling a client at the average size)
    """
    _check_num_clients(data, num_clients)
    _check_no_persons(data, "dirichlet_by_label")
    _check_alpha(alpha)
    if not 0 <= min_examples * num_clients <= len(data):
        raise InputError(
            f"Expected min_examples in [0, {len(data) // num_clients}] for {len(data)} examples and "
            f"{num_clients} clients, got {min_examples}"
        )
    generator = stream(seed, Purpose.PARTITION)
    positions = client_positions(placed_by(data), seed=seed)
    redrawn = "all rows, as clients are drawn again until each has partition.min_examples: set it to 0"
    best = 0
    for _ in range(_MAX_REDRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), size=_num_classes(data))  # (L, C)
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


def by_group(
    data: Table,
    *,
    num_clients: int,
    seed: int,
    groups: Sequence[str] | None = None,
    min_rows: int = 0,
    small_clients: str = "refuse",
) -> Partition:
    """Make each value of the group column one client, in the order of `groups`; `seed` changes nothing.

    Without `groups` they are those that are found, sorted: then a row can decide which clients there are. So it can
    with `min_rows` above 0: a client of fewer rows is refused by name, or left out (`small_clients="leave_out"`).

    Args:
        data: with groups.
        num_clients: 0: as many as there are groups.
        seed: of the other partitions.
        groups: the names in the order of clients.
        min_rows: of each client.
        small_clients: "refuse" or "leave_out".

    Raises:
        InputError: without a group column, when the number of groups is not `num_clients`, when a row's group is not
            among `groups`, or for a client that is too small.
    """
    if data.groups is None:
        raise InputError(f"by_group needs the natural clients of {data.source}: set data.group_column")
    names = sorted(set(data.groups)) if groups is None else [unicodedata.normalize("NFC", name) for name in groups]
    if len(set(names)) < len(names):
        raise InputError(f"Expected groups that differ, got {list(groups or ())!r}")
    found = "the groups that other rows name: set partition.groups=[...]"
    small = _Small(min_rows, small_clients)
    return _natural(data, names, num_clients, small, kind="group", depends_on=found if groups is None else "")


def by_file(data: Table, *, num_clients: int, seed: int, min_rows: int = 0, small_clients: str = "refuse") -> Partition:
    """Make each file one client, in the order of their names; `seed` changes nothing.

    Which files there are is taken for public: a client whose file has no usable row is a client. With `min_rows` above
    0 a client of fewer rows is refused by name, or left out (`small_clients="leave_out"`): then rows have a say.

    Args:
        data: from a folder or a pattern.
        num_clients: 0: as many as there are files.
        seed: of the other partitions.
        min_rows: of each client.
        small_clients: "refuse" or "leave_out".

    Raises:
        InputError: for data of one file, when the number of files is not `num_clients`, or for a client that is too
            small.
    """
    if data.clients is None:
        raise InputError(
            f"by_file needs a file for each client, got {data.source}: set data.path to a folder or a pattern such as "
            "'wards/*.csv', and data.group_column=null"
        )
    made = _natural(data, data.clients, num_clients, _Small(min_rows, small_clients), kind="file", depends_on="")
    return replace(made, taken_as_public=("which clients there are, and the names of their files",))


@dataclass(frozen=True)
class _Small:
    """Which clients are too small, and what becomes of them."""

    min_rows: int
    small_clients: str

    def __post_init__(self) -> None:
        if self.min_rows < 0:
            raise InputError(f"Expected min_rows >= 0, got {self.min_rows}")
        if self.small_clients not in ("refuse", "leave_out"):
            raise InputError(f"Expected small_clients to be 'refuse' or 'leave_out', got {self.small_clients!r}")


def _natural(
    data: Table, names: Sequence[str], num_clients: int, small: _Small, *, kind: str, depends_on: str
) -> Partition:
    """Give each row to the client that its group names; no other client has one."""
    names_are_found = kind == "group" and bool(depends_on)
    place = {name: client_id for client_id, name in enumerate(names)}
    owned = data.groups or ()
    if strange := sum(name not in place for name in owned):
        raise InputError(
            f"Expected every row's group among groups={list(names)}, got {strange} rows of {data.source} with another"
        )
    indices = _by_owner(np.array([place[name] for name in owned], dtype=np.int64), len(names))
    stays = [len(rows) >= small.min_rows for rows in indices]
    left_out = [name for name, is_large in zip(names, stays, strict=True) if not is_large]
    if left_out and small.small_clients == "refuse":
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        who = f"{len(left_out)} of them"  # a name that was found in a row is as private as the row
        if not names_are_found:
            who = f"{', '.join(map(repr, left_out[:3]))}{more}"
        raise InputError(
            f"Expected min_rows={small.min_rows} rows or more of each client of {data.source}, got fewer of "
            f"{who}; set small_clients=leave_out, or a smaller min_rows"
        )
    num_left = len(names) - len(left_out)
    if num_clients not in (0, num_left) or num_left == 0:
        without = f" without the {len(left_out)} that have less than partition.min_rows" if left_out else ""
        raise InputError(
            f"by_{kind} makes one client per {kind} and {data.source} has {num_left} {kind}s{without}, "
            f"got num_clients={num_clients or 'null'}: set num_clients={num_left or 'to those that are there'}"
        )
    if small.min_rows:
        counted = "its client's other rows, as small clients are turned away: set partition.min_rows=0"
        depends_on = f"{depends_on}; and on {counted}" if depends_on else counted
    kept = tuple(rows for rows, is_large in zip(indices, stays, strict=True) if is_large)
    left = tuple(name for name, is_large in zip(names, stays, strict=True) if is_large)
    return Partition(kept, depends_on, num_left_out=len(left_out), names=left)


def _check_num_clients(data: Table, num_clients: int) -> None:
    if num_clients < 1:
        raise InputError(
            f"Expected num_clients >= 1 for a partition that deals rows out, got {num_clients or 'null'}; set it, or "
            "take partition=by_group or by_file, which find as many clients as there are"
        )
    if num_clients > len(data):
        raise InputError(
            f"{num_clients} clients cannot share the {len(data)} examples of {data.source}: "
            f"set num_clients to {len(data)} or less"
        )


def _check_no_persons(data: Table, name: str) -> None:
    if persons_of(data) is not None:
        raise InputError(
            f"Expected partition=iid, by_group or by_file with data.person_column, got {name}: it places rows by their "
            "labels, and so a person's at several clients"
        )


def _check_alpha(alpha: float) -> None:
    # 1e-6 is one label a client already; far below it the gamma draws underflow to nan
    if not 1e-6 <= alpha < math.inf:
        raise InputError(f"Expected alpha to be a number >= 1e-06, got {alpha!r}")


def _num_classes(data: Table) -> int:
    """Return L; refuse rows without classes."""
    if not data.label_names:
        raise InputError(
            f"Expected rows with classes for a partition by labels, got {data.source} without; set partition=iid, or "
            "by_group where a column says whose a row is"
        )
    return len(data.label_names)


def _dealt(data: Table, shares: NDArray[np.float64], positions: NDArray[np.float64]) -> tuple[Indices, ...]:
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
