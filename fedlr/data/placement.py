"""Where a row of a table lies, by a keyed hash of its text: held out for evaluation, or at which client.

Notable choices:

* Removing or adding one row moves no other row, unless the caller asks for an exact number of held-out rows. Otherwise
  one row would change what many clients hold, which no client's epsilon covers.
* The hash reads the text as `content` gives it, so that equal texts lie at the same place: no example is at two
  clients, or both trained on and evaluated. Of a pair it reads both texts.
* Where the rows have persons (`fedlr.data.persons`), the hash reads the person in place of the text.
* The key is the seed's. Nothing here is secret: who knows seed and text knows the place.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.streams import Purpose, stream

# Steps of Purpose.PARTITION: 0 draws the clients' label proportions.
_SPLIT_STEP, _CLIENT_STEP, _VALIDATION_STEP, _PERSON_STEP = 1, 2, 3, 4

AnyTable = TypeVar("AnyTable", bound=Table)


def content(text: str) -> str:
    """Return what makes two texts equal here: case, width of characters and white space do not count.

    >>> content("So  GOOD\\n") == content("so good")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def whole_rows(data: Table) -> tuple[str, ...]:
    """Return one text a row, by which rows are placed and are equal: the row's own, or all of them."""
    # NUL is no white space, and no .csv, .tsv or .txt holds one.
    return tuple(row[0] if len(row) == 1 else "\0".join(map(content, row)) for row in data.row_texts())


def all_texts(data: Table) -> frozenset[str]:
    """Return every text of a table, and every row of several as `whole_rows` writes it."""
    return frozenset((*(text for row in data.row_texts() for text in row), *whole_rows(data)))


def persons_of(data: Table) -> tuple[str, ...] | None:
    """Return whose each row is; None where the table names no persons."""
    found: tuple[str, ...] | None = getattr(data, "persons", None)
    return found


def placed_by(data: Table) -> tuple[str, ...]:
    """Return what decides about a row's place, one text a row: its person where there are persons, else its own "
    "text."""
    return persons_of(data) or whole_rows(data)


def person_positions(data: Table, *, seed: int) -> NDArray[np.float64]:
    """Return where in [0, 1) each row stands among those of its person, shape (N,); each depends on its own text."""
    return _positions(whole_rows(data), seed=seed, step=_PERSON_STEP)


def client_positions(texts: Sequence[str], *, seed: int) -> NDArray[np.float64]:
    """Return where in [0, 1) each text lies for a partition over clients, shape (N,); each depends on itself alone."""
    return _positions(texts, seed=seed, step=_CLIENT_STEP)


def validation_positions(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return where in [0, 1) each text lies for being set apart, shape (N,): by itself alone, whatever the seed."""
    return _positions(texts, seed=0, step=_VALIDATION_STEP)


def split_train_test(data: AnyTable, *, num_test: float, seed: int) -> tuple[AnyTable, AnyTable]:
    """Split into training and test examples, each in source order; equal texts are on one side.

    The same data and seed give the same split.

    Args:
        data: all examples.
        num_test: below 1 a share: each row is held out with this probability, by a hash of itself alone. From 1 on a
            number, of each label in proportion (largest remainder), by rank of the hash: other rows have a say, and
            every label keeps a training example. Fewer are held out where equal texts do not fit in.
        seed: keys the hash.

    Raises:
        InputError: when `num_test` leaves one of the two sides without rows, or a label without a training example.
    """
    positions = _positions(placed_by(data), seed=seed, step=_SPLIT_STEP)
    is_test = positions < num_test if 0 < num_test < 1 else _lowest(data, positions, num_test=int(num_test))
    if is_test.all() or not is_test.any():
        raise InputError(
            f"Expected num_test to leave rows of {data.source} on both sides, got {num_test}, which holds out "
            f"{int(is_test.sum())} of {len(data)}; equal texts stay together"
        )
    return data.subset(np.flatnonzero(~is_test)), data.subset(np.flatnonzero(is_test))


def without_texts_of(data: AnyTable, held_out: Table) -> AnyTable:
    """Return the rows whose texts, or pairs of texts, are not among the held-out ones; the others are counted.

    A row is left out by itself alone: no other row of `data` has a say.

    Raises:
        InputError: if no row is left.
    """
    theirs = set(map(content, whole_rows(held_out)))
    stays = [row for row, text in enumerate(whole_rows(data)) if content(text) not in theirs]
    if not stays:
        raise InputError(
            f"Expected rows of {data.source} that are not in the test table, got all {len(data)} of them there too; "
            "set data.test_path to other rows"
        )
    if len(stays) == len(data):
        return data
    return cast(
        AnyTable, replace(cast(Any, data.subset(stays)), num_held_out=data.num_held_out + len(data) - len(stays))
    )


def num_shared_texts(data: Table, indices: Sequence[NDArray[np.int64]]) -> int:
    """Count the texts, or pairs of texts, that two or more clients hold."""
    holders: dict[str, int] = {}
    shared = set()
    texts = whole_rows(data)
    for client_id, rows in enumerate(indices):
        for row in rows.tolist():
            text = content(texts[row])
            if holders.setdefault(text, client_id) != client_id:
                shared.add(text)
    return len(shared)


def _positions(texts: Sequence[str], *, seed: int, step: int) -> NDArray[np.float64]:
    key = stream(seed, Purpose.PARTITION, step=step).bytes(32)
    digests = b"".join(blake2b(content(text).encode(), digest_size=8, key=key).digest() for text in texts)
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _lowest(data: Table, positions: NDArray[np.float64], *, num_test: int) -> NDArray[np.bool_]:
    """Mark the rows of the lowest positions, each label in proportion and equal texts together."""
    counts = np.bincount(data.labels, minlength=len(data.label_names))
    largest = len(data) - int((counts > 0).sum())
    if not 1 <= num_test <= largest:
        raise InputError(
            f"Expected num_test in [1, {largest}] for {len(data)} examples of {data.source}, got {num_test}"
        )
    order = np.argsort(positions, kind="stable")
    starts = np.flatnonzero(np.diff(positions[order])) + 1
    left = _test_quotas(counts, num_test)
    is_test = np.zeros(len(data), dtype=bool)
    for rows in np.split(order, starts):
        wanted = np.bincount(data.labels[rows], minlength=len(left))
        if (wanted <= left).all():
            left = left - wanted
            is_test[rows] = True
    return is_test


def _test_quotas(counts: NDArray[np.int64], num_test: int) -> NDArray[np.int64]:
    exact = counts * num_test / counts.sum()
    caps = np.maximum(counts - 1, 0)
    quotas: NDArray[np.int64] = np.minimum(np.floor(exact).astype(np.int64), caps)
    while (missing := num_test - int(quotas.sum())) > 0:
        wish = np.where(quotas < caps, exact - quotas, -np.inf)
        most_wished = np.argsort(-wish, kind="stable")[: min(missing, int((quotas < caps).sum()))]
        quotas[most_wished] += 1
    return quotas
