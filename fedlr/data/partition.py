"""Partitions of one labelled table over simulated clients.

Every function takes `(data, *, num_clients, seed, ...)` and is named by `_target_` in `configs/partition`.
The same data, seed and arguments give the same partition. These are simulations: they see all labels, which
no server does.
Legend: N examples, C clients, L labels.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.streams import Purpose, stream

_MAX_REDRAWS = 1000

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """Which examples each client holds.

    Guarantees: no example belongs to two clients. Each client's indices are ascending.
    """

    indices: tuple[Indices, ...]  # one array a client

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
    """Deal all examples at random; sizes differ by at most one.

    Raises:
        InputError: when there are fewer examples than clients.
    """
    _check_num_clients(data, num_clients)
    order = stream(seed, Purpose.PARTITION).permutation(len(data))
    return Partition(tuple(np.sort(part) for part in np.array_split(order, num_clients)))


def dirichlet(data: LabelledText, *, num_clients: int, seed: int, alpha: float) -> Partition:
    """Give each client its own label proportions, drawn from Dir(alpha * prior), and equally many examples.

    The prior is the share of each label in `data`. Examples are drawn without replacement: when a label runs
    out, the client's proportions are re-normalised over the labels left, so that late clients drift towards
    those. The remainder of N / C examples goes to nobody.

    Raises:
        InputError: for alpha below 1e-6, or fewer examples than clients.

    Source: Hsu, Qi and Brown 2019, sec. 3, https://arxiv.org/abs/1909.06335
    """
    _check_num_clients(data, num_clients)
    _check_alpha(alpha)
    generator = stream(seed, Purpose.PARTITION)
    queues = _shuffled_by_label(data, generator)
    left = np.array([len(queue) for queue in queues])
    prior = left / left.sum()
    clients = []
    for _ in range(num_clients):
        proportions = generator.dirichlet(alpha * prior)
        counts = _draw_counts(proportions, left, len(data) // num_clients, generator)
        starts = [len(queue) - rest for queue, rest in zip(queues, left, strict=True)]
        taken = [q[start : start + n] for q, start, n in zip(queues, starts, counts, strict=True)]
        clients.append(np.sort(np.concatenate(taken)))
        left = left - counts
    return Partition(tuple(clients))


def dirichlet_by_label(
    data: LabelledText, *, num_clients: int, seed: int, alpha: float, min_examples: int = 10
) -> Partition:
    """Spread the examples of each label over the clients by Dir(alpha); sizes are unequal, and all examples
    are used.

    Drawn again, at most 1000 times, until every client has `min_examples`.

    Raises:
        InputError: for alpha below 1e-6, or when no draw gives every client enough.

    Source: Li, Diao, Chen and He 2022, sec. IV-B, https://arxiv.org/abs/2102.02079 (without the extra rule of
    their code that stops filling a client at the average size)
    """
    _check_num_clients(data, num_clients)
    _check_alpha(alpha)
    if min_examples < 1 or min_examples * num_clients > len(data):
        raise InputError(
            f"Expected min_examples in [1, {len(data) // num_clients}] for {len(data)} examples and "
            f"{num_clients} clients, got {min_examples}"
        )
    generator = stream(seed, Purpose.PARTITION)
    queues = _shuffled_by_label(data, generator)
    best = 0
    for _ in range(_MAX_REDRAWS):
        spreads = [_spread(len(queue), num_clients, alpha, generator) for queue in queues]
        owner_counts = np.stack(spreads)  # (L, C)
        smallest = int(owner_counts.sum(axis=0).min())
        if smallest >= min_examples:
            return Partition(_dealt(queues, owner_counts))
        best = max(best, smallest)
    raise InputError(
        f"None of {_MAX_REDRAWS} Dirichlet draws with alpha={alpha} gives each of {num_clients} clients "
        f"{min_examples} of the {len(data)} examples (the smallest client had {best} at best): "
        "lower min_examples or num_clients, or raise alpha"
    )


def by_group(data: LabelledText, *, num_clients: int, seed: int) -> Partition:
    """Make each value of the group column one client, in the order of the names; `seed` changes nothing.

    Raises:
        InputError: without a group column, or when the number of groups is not `num_clients`.
    """
    if data.groups is None:
        raise InputError(f"by_group needs the natural clients of {data.source}: set data.group_column")
    names, owners = np.unique(np.array(data.groups, dtype=object), return_inverse=True)
    if len(names) != num_clients:
        shown = ", ".join(map(repr, names[:8])) + (" ..." if len(names) > 8 else "")
        raise InputError(
            f"by_group makes one client a group and {data.source} has {len(names)} groups ({shown}), "
            f"got num_clients={num_clients}: set num_clients={len(names)}"
        )
    ends = np.cumsum(np.bincount(owners, minlength=num_clients))[:-1]
    return Partition(tuple(np.split(np.argsort(owners, kind="stable"), ends)))


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


def _shuffled_by_label(data: LabelledText, generator: np.random.Generator) -> list[Indices]:
    """Return the shuffled indices of every label that has examples."""
    return [generator.permutation(np.flatnonzero(data.labels == label)) for label in np.unique(data.labels)]


def _draw_counts(
    proportions: NDArray[np.float64], left: Indices, num_examples: int, generator: np.random.Generator
) -> Indices:
    """Draw `num_examples` labels with `proportions`, drawing anew those that find their label used up; counts
    (L,)."""
    counts = np.zeros_like(left)
    while (missing := num_examples - int(counts.sum())) > 0:
        free = left - counts
        weights = np.where(free > 0, proportions, 0.0)
        if weights.sum() <= 0:  # all the client wanted is gone, or underflowed: whatever is left
            weights = free.astype(np.float64)
        counts += np.minimum(generator.multinomial(missing, weights / weights.sum()), free)
    return counts


def _spread(num_examples: int, num_clients: int, alpha: float, generator: np.random.Generator) -> Indices:
    """Divide a label's examples over the clients by Dir(alpha), rounding the cumulated shares; counts
    (C,)."""
    shares = generator.dirichlet(np.full(num_clients, alpha))
    ends = np.floor(np.cumsum(shares)[:-1] * num_examples).clip(0, num_examples)
    return np.diff(ends, prepend=0, append=num_examples).astype(np.int64)


def _dealt(queues: list[Indices], owner_counts: Indices) -> tuple[Indices, ...]:
    """Cut each label's queue at its counts; return the examples of each client."""
    ends = np.cumsum(owner_counts, axis=1)[:, :-1]
    parts = [np.split(queue, cuts) for queue, cuts in zip(queues, ends, strict=True)]
    return tuple(np.sort(np.concatenate(of_client)) for of_client in zip(*parts, strict=True))
