"""What the rows of a privacy ledger mean: a header, then reservations, repeats, settlements and torn ends.

Unit: one training example of one client. Relation: add or remove one example. Epsilon is never stored: it is
computed from the rows, over all steps of all rounds, so no edit of a number can lower it unseen.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fedlr.errors import InputError
from fedlr.privacy import chain
from fedlr.privacy.accountant import AccountantName, epsilon
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler

VERSION = 1
UNIT = "one training example of one client"
RELATION = "add or remove one example"
RandomnessKind = Literal["seeded", "os"]


@dataclass(frozen=True)
class Header:
    """The first row: what every later row is about. Two runs that differ in it cannot share a ledger."""

    epsilon: float
    delta: float
    accountant: AccountantName
    dataset_id: str
    randomness: RandomnessKind

    def row(self) -> chain.Row:
        """Return the header as a row."""
        return {"kind": "header", "version": VERSION, "unit": UNIT, "relation": RELATION, **asdict(self)}


@dataclass(frozen=True)
class Charge:
    """One client's reservation for one round, and how much of it was used (None: not settled, so all).

    `task` is the SHA-256 of what the client was asked, where that was said. Who of several that computed it settles,
    knows not what the others took, so a repeated one counts in full whatever is settled.
    """

    mechanism: Mechanism
    reserved_steps: int
    settled_steps: int | None = None
    task: str | None = None
    is_repeated: bool = False

    @property
    def steps(self) -> int:
        """Steps that count: what was settled, else all that was reserved."""
        return self.reserved_steps if self.settled_steps is None or self.is_repeated else self.settled_steps

    def is_repeated_by(self, mechanism: Mechanism, num_steps: int, task: str | None) -> bool:
        """Return whether a reservation is of the same computation, all of which is charged already."""
        same = task is not None and (self.mechanism, self.reserved_steps, self.task) == (mechanism, num_steps, task)
        return same and self.steps == num_steps


@dataclass
class Charges:
    """All charges of all clients, as the rows so far tell them."""

    by_client: dict[int, dict[int, Charge]] = field(default_factory=dict)  # then by round
    num_torn: int = 0

    def take_in(self, rows: Iterable[chain.Row]) -> None:
        """Add verified rows.

        Raises:
            InputError: a row is of an unknown kind; skipping it could understate the spending.
        """
        for row in rows:
            if row["kind"] == "reserve":
                self.by_client.setdefault(row["client_id"], {})[row["round_index"]] = _charge(row)
            elif row["kind"] == "settle":
                self._change(row, settled_steps=row["steps_taken"])
            elif row["kind"] == "repeat":
                self._change(row, is_repeated=True)
            elif row["kind"] == "torn":
                self.num_torn += 1
            elif row["kind"] != "header":
                raise InputError(f"Expected a ledger row of a known kind, got {row['kind']!r}")

    def _change(self, row: chain.Row, **changes: Any) -> None:
        rounds = self.by_client[row["client_id"]]
        rounds[row["round_index"]] = replace(rounds[row["round_index"]], **changes)

    def of(self, client_id: int) -> dict[int, Charge]:
        """Return one client's charges by round."""
        return self.by_client.get(client_id, {})

    def epsilon(
        self,
        client_id: int,
        header: Header,
        *,
        more: tuple[Mechanism, int] | None = None,
        num_rounds: int | None = None,
    ) -> float:
        """Return what a client has spent at the budget's delta, or would have after some more steps.

        With `num_rounds` only rounds below it count.
        """
        rounds = self.of(client_id).items()
        taken = [(c.mechanism, c.steps) for number, c in rounds if num_rounds is None or number < num_rounds]
        return _epsilon(_totals([*taken, more] if more else taken), header.delta, header.accountant)


def parse_header(rows: Sequence[chain.Row], *, name: str) -> Header:
    """Return the header of a ledger's rows.

    Raises:
        InputError: the rows do not start with one.
    """
    if not rows or rows[0].get("kind") != "header" or rows[0].get("version") != VERSION:
        raise InputError(f"Expected row 0 of {name} to be the header of a privacy ledger, version {VERSION}")
    return Header(**{key: rows[0][key] for key in Header.__dataclass_fields__})


def recovered(fragment: bytes, charges: Charges) -> list[chain.Row]:
    """Return the rows that stand for a torn last line.

    The line was never acknowledged, so nothing was read under a torn reservation. It is charged nevertheless
    wherever enough of it is left to say to whom, because a file that somebody shortened looks just the same.
    A torn settlement is dropped: its reservation keeps counting in full. A torn repeat is kept, so that no settlement
    lowers what it repeated. The fragment is kept as text.
    """
    rows: list[chain.Row] = [{"kind": "torn", "fragment": fragment.decode("ascii", "backslashreplace")}]
    row = chain.torn_payload(fragment)
    try:
        is_charged = row is not None and row["round_index"] in charges.of(row["client_id"])
        if row is not None and row["kind"] == "reserve" and _charge(row) and not is_charged:
            rows.append(row)
        if row is not None and row["kind"] == "repeat" and is_charged:
            rows.append(row)
    except (KeyError, TypeError, ValueError):  # not a reservation any more
        pass
    return rows


def read_ledger(path: str | os.PathLike[str]) -> tuple[Header, Charges, str]:
    """Read a ledger without changing it: its header, its charges and the hash of its last row.

    Raises:
        InputError: the file is missing, is no ledger, or was changed.
    """
    path = Path(path)
    with chain.locked(path, shared=True) as file:
        data = chain.read_from(file, 0, name=path.name)
    rows, tail, fragment = chain.parse(data, chain.Tail(), name=path.name)
    header, charges = parse_header(rows, name=path.name), Charges()
    charges.take_in(rows)
    if fragment:
        charges.take_in(recovered(fragment, charges))
    return header, charges, tail.head


def _charge(row: chain.Row) -> Charge:
    return Charge(_mechanism(**row["mechanism"]), row["num_steps"], task=row.get("task"))


# One object for the many rows that say the same. Typed: true must not be taken for 1, which is checked before.
_mechanism = lru_cache(maxsize=64, typed=True)(Mechanism)


def _totals(steps: Iterable[tuple[Mechanism, int]]) -> tuple[tuple[float, float, int], ...]:
    """Add up the steps of the same event: (sample rate, noise multiplier, number of steps), sorted."""
    totals: dict[tuple[float, float], int] = {}
    for mechanism, count in steps:
        key = mechanism.sample_rate, mechanism.noise_multiplier
        totals[key] = totals.get(key, 0) + count
    return tuple(sorted((rate, noise, count) for (rate, noise), count in totals.items()))


@lru_cache(maxsize=65536)
def _epsilon(totals: tuple[tuple[float, float, int], ...], delta: float, accountant: AccountantName) -> float:
    """Return the epsilon of events that the sampler of the steps names; thousands of clients share one computation."""
    events = [(PoissonSampler(rate).dp_event(noise), count) for rate, noise, count in totals]
    return epsilon(events, delta, accountant=accountant)
