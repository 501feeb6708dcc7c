"""What the rows of a privacy ledger mean: a header, then reservations, repeats, settlements and torn ends.

The unit and the relation are the header's (`fedlr.privacy.units`). Epsilon is never stored: it is
computed from the rows, over all steps of all rounds, so no edit of a number can lower it unseen.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Self, get_args

from fedlr.errors import InputError
from fedlr.errors.ranges import AccountantName, UnitName, require_delta
from fedlr.privacy import chain
from fedlr.privacy.filter import Event, RenyiFilter, Steps, renyi_filter, spent, would_spend
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.rows import COHORT, VERSION, RandomnessKind, by_client, checked
from fedlr.privacy.units import PERSON, UNITS, unit_of_text


@dataclass(frozen=True)
class Header:
    """The first row: what every later row is about. Two runs that differ in it cannot share a ledger."""

    epsilon: float
    delta: float
    accountant: AccountantName
    dataset_id: str
    randomness: RandomnessKind
    unit: UnitName = "example"
    rows_per_person: int = 1  # of the person unit: the cap

    @classmethod
    def of(
        cls,
        budget: PrivacyBudget,
        *,
        dataset_id: str,
        randomness: RandomnessKind,
        accountant: AccountantName,
        unit: UnitName = "example",
        rows_per_person: int = 1,
    ) -> Self:
        """Return the header of a ledger.

        Raises:
            InputError: an argument is out of range.
        """
        require_delta(budget.delta, accountant)
        if randomness not in get_args(RandomnessKind):
            raise InputError(f"Expected randomness 'seeded' or 'os', got {randomness!r}")
        if not dataset_id:
            raise InputError(f"Expected a name for the data, the same in every run on them, got {dataset_id!r}")
        if unit not in UNITS or (rows_per_person != 1 and unit != PERSON.name):
            raise InputError(f"Expected a unit of {', '.join(UNITS)}, got {unit!r} of {rows_per_person} rows")
        return cls(
            float(budget.epsilon), float(budget.delta), accountant, dataset_id, randomness, unit, int(rows_per_person)
        )

    def require(self, expected: "Header", *, name: str) -> None:
        """Raise InputError unless the header is the one expected; `name` is the file's."""
        for key, value in asdict(expected).items():
            if getattr(self, key) != value:
                raise InputError(
                    f"Expected {key}={value!r} in row 0 of {name}, got {getattr(self, key)!r}: "
                    "the ledger belongs to another budget, data set or kind of run"
                )

    @property
    def budget(self) -> PrivacyBudget:
        """What every client may spend."""
        return PrivacyBudget(self.epsilon, self.delta)

    def row(self) -> chain.Row:
        """Return the header as a row."""
        told = asdict(self)
        unit, rows = UNITS[told.pop("unit")], told.pop("rows_per_person")
        capped = {"rows_per_person": rows} if unit is PERSON else {}
        return {
            "kind": "header",
            "version": VERSION,
            "unit": unit.text,
            "relation": unit.relation,
            **told,
            **capped,
        }


@dataclass(frozen=True)
class Charge:
    """One client's reservation for one round, and how much of it was used (None: not settled, so all).

    `task` is the SHA-256 of what the client was asked, where that was said. Who of several that computed it settles,
    knows not what the others took, so a repeated one counts in full whatever is settled. `announced_steps` is how many
    steps of this mechanism the client was told to expect in all (`fedlr.privacy.filter`), where it was.
    """

    mechanism: Mechanism
    reserved_steps: int
    settled_steps: int | None = None
    task: str | None = None
    is_repeated: bool = False
    announced_steps: int | None = None

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
    num_rows: int = 0  # the header included
    is_seeded: bool = False

    def take_in(self, rows: Iterable[chain.Row]) -> None:
        """Add verified rows.

        Raises:
            InputError: a row is of an unknown kind, has a field outside its range, or does not follow from those
                before; skipping it could understate the spending. The text names the row, from 0.
        """
        for row in rows:
            try:
                self._take_in(row)
            except (InputError, TypeError) as error:
                raise InputError(f"row {self.num_rows} of the ledger: {error}") from None
            self.num_rows += 1

    def _take_in(self, row: chain.Row) -> None:
        checked(row)
        for one in by_client(row):
            self._follow(one)

    def _follow(self, row: chain.Row) -> None:
        kind = row["kind"]
        if (kind == "header") != (self.num_rows == 0):
            raise InputError(f"Expected the header first and once, got a row of kind {kind!r}")
        if kind == "header":
            self.is_seeded = row["randomness"] == "seeded"
            return
        if kind == "torn":
            self.num_torn += 1
            return
        client, round_index = row["client_id"], row["round_index"]
        charge = self.of(client).get(round_index)
        if kind == "reserve":
            if charge is not None:
                raise InputError(f"Expected one reservation of client {client} in round {round_index}, got a second")
            self.by_client.setdefault(client, {})[round_index] = _charge(row)
            return
        if charge is None:
            raise InputError(f"Expected a reservation of client {client} in round {round_index} first, got {kind!r}")
        if kind == "settle":
            if not 0 <= row["steps_taken"] <= charge.reserved_steps:
                most = charge.reserved_steps
                raise InputError(f"Expected steps_taken in [0, {most}], which were reserved, got {row['steps_taken']}")
            if charge.settled_steps is not None:
                raise InputError(f"Expected one settlement of client {client} in round {round_index}, got a second")
            charge = replace(charge, settled_steps=row["steps_taken"])
        else:
            if not (self.is_seeded and charge.task and charge.steps == charge.reserved_steps):
                raise InputError(
                    "Expected a repeat of steps that have a task, noise of a seed and their full charge, got "
                    f"{charge.steps} of {charge.reserved_steps} steps of task {charge.task}"
                )
            charge = replace(charge, is_repeated=True)
        self.by_client[client][round_index] = charge

    def would_take_in(self, row: chain.Row) -> bool:
        """Return whether a row could follow; nothing is changed."""
        try:
            replace(self, by_client={c: dict(r) for c, r in self.by_client.items()})._take_in(row)
        except (InputError, TypeError):
            return False
        return True

    def of(self, client_id: int) -> dict[int, Charge]:
        """Return one client's charges by round."""
        return self.by_client.get(client_id, {})

    def epsilon(self, client_id: int, header: Header, *, num_rounds: int | None = None) -> float:
        """Return what a client has spent at the budget's delta.

        With `num_rounds` only rounds below it count.
        """
        taken = {n: charge for n, charge in self.of(client_id).items() if num_rounds is None or n < num_rounds}
        steps = _steps(taken.values(), (self.first_of(client_id),), rows=header.rows_per_person)
        return 0.0 if steps is None else spent(steps, header.budget, header.accountant)

    def epsilon_with(self, client_id: int, header: Header, more: Charge) -> float:
        """Return what a client would have spent after one more charge; `inf` where nothing proves a bound."""
        charges = [*self.of(client_id).values(), more]
        steps = _steps(charges, charges, rows=header.rows_per_person)
        return 0.0 if steps is None else would_spend(steps, header.budget, header.accountant)

    def filter_of(self, client_id: int, header: Header) -> RenyiFilter | None:
        """Return the filter that bounds what a client has spent; None where it took announced steps only."""
        steps = _steps(self.of(client_id).values(), (self.first_of(client_id),), rows=header.rows_per_person)
        if steps is None or steps.is_announced:
            return None
        return renyi_filter(steps.first, steps.announced, header.budget, header.accountant)

    def steps_of(self, client_id: int, header: Header) -> Steps | None:
        """Return the steps that a client is charged with; None where there are none."""
        return _steps(self.of(client_id).values(), (self.first_of(client_id),), rows=header.rows_per_person)

    def first_of(self, client_id: int) -> Charge | None:
        """Return the charge that fixed by which rule a client's spending is bounded; None where there is none."""
        return next(iter(self.of(client_id).values()), None)


def parse_header(rows: Sequence[chain.Row], *, name: str) -> Header:
    """Return the header of a ledger's rows.

    Raises:
        InputError: the rows do not start with one, or a field of it is outside its range.
    """
    if not rows or rows[0].get("kind") != "header" or rows[0].get("version") != VERSION:
        raise InputError(f"Expected row 0 of {name} to be the header of a privacy ledger, version {VERSION}")
    checked(rows[0])
    told = {key: rows[0][key] for key in Header.__dataclass_fields__ if key in rows[0]}
    return Header(**{**told, "unit": unit_of_text(rows[0]["unit"]).name})


def recovered(fragment: bytes, charges: Charges) -> list[chain.Row]:
    """Return the rows that stand for a torn last line.

    The line was never acknowledged, so nothing was read under a torn reservation. It is charged nevertheless
    wherever enough of it is left to say to whom, because a file that somebody shortened looks just the same.
    A torn settlement is dropped: its reservation keeps counting in full. A torn repeat is kept, so that no settlement
    lowers what it repeated. The fragment is kept as text.
    """
    rows: list[chain.Row] = [{"kind": "torn", "fragment": fragment.decode("ascii", "backslashreplace")}]
    row = chain.torn_payload(fragment) or _torn_cohort(fragment)
    charged = ("reserve", "repeat", f"reserve{COHORT}", f"repeat{COHORT}")
    if row is not None and row.get("kind") in charged and charges.would_take_in(row):
        rows.append(row)
    return rows


def _torn_cohort(fragment: bytes) -> chain.Row | None:
    """Return what a torn row said of the clients that are still named whole; None where it was about no cohort."""
    told, separator, clients = fragment.partition(b'"client_ids":[')
    whole, is_closed, _ = clients.partition(b"]")
    named = whole if is_closed else clients.rpartition(b",")[0]  # the last number may have lost digits
    return chain.decoded(told + separator + named + b"]}") if separator else None


def read_ledger(path: str | os.PathLike[str], *, until: str | None = None) -> tuple[Header, Charges, str]:
    """Read a ledger without changing it: its header, its charges and the hash of its last row.

    Args:
        path: the file.
        until: the hash of the row that is read last, as the ledger was then; None: all rows, a torn one among them.

    Raises:
        InputError: the file is missing, is no ledger, was changed, or has no such row.
    """
    path = Path(path)
    with chain.locked(path, shared=True) as file:
        data = chain.read_from(file, 0, name=path.name)
    rows, tail, fragment = chain.parse(data, chain.Tail(), name=path.name)
    header, charges, head = parse_header(rows, name=path.name), Charges(), tail.head
    if until is not None:
        count = next((number for number, row in enumerate(rows, 1) if row["hash"] == until), 0)
        if not count:
            raise InputError(f"Expected a row with the hash {until:.64} in {path}, got none: another file, or an older")
        rows, fragment, head = rows[:count], b"", until
    charges.take_in(rows)
    if fragment:
        charges.take_in(recovered(fragment, charges))
    return header, charges, head


def _charge(row: chain.Row) -> Charge:
    return Charge(
        _mechanism(**row["mechanism"]),
        row["num_steps"],
        task=row.get("task"),
        announced_steps=row.get("announced_steps"),
    )


# One object for the many rows that say the same. Typed: true must not be taken for 1, which is checked before.
_mechanism = lru_cache(maxsize=64, typed=True)(Mechanism)


def _steps(charges: Iterable[Charge], of_all: Iterable[Charge | None], *, rows: int) -> Steps | None:
    """Add up the steps of the same event; the first of all charges fixes the rule, whether its steps count or not."""
    totals: dict[Event, int] = {}
    for charge in charges:
        event = Event.of(charge.mechanism, rows=rows)
        totals[event] = totals.get(event, 0) + charge.steps
    first = next(iter(of_all), None)
    if not totals or first is None:
        return None
    in_order = sorted(totals.items(), key=lambda item: (item[0].sample_rate, item[0].noise_multiplier))
    return Steps(Event.of(first.mechanism, rows=rows), first.announced_steps, tuple(in_order))
