"""What every client has spent: written before private data are read, never lowered, refused when too much.

A reservation is a row on disk before the first private read of a round, one for all clients of a cohort that may train.
Settling it tells how many steps were really taken; one that is never settled (crash, lost reply) counts in full, for
ever.

The rows say nothing about data: they hold round and client numbers, step counts and constants of the
configuration. Which steps are taken must not depend on data either, or the spending itself would tell
something.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from fedlr.errors import InputError
from fedlr.errors.ranges import AccountantName, UnitName
from fedlr.privacy import chain
from fedlr.privacy.charges import Charge, Charges, Header, parse_header, recovered
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.rows import RandomnessKind, checked, of_clients


@dataclass(frozen=True)
class Refusal:
    """Why a client may not train this round: an ordinary outcome, not an error."""

    reason: Literal["budget_exhausted", "already_reserved"]
    epsilon_spent: float
    epsilon_if_trained: float


class PrivacyLedger:
    """The spending of all clients that share one file, one budget and one data set.

    Made by `PrivacyLedger.create` or `PrivacyLedger.open`, never from a path alone.

    Guarantees: for every client, `spent` is at least the epsilon of the steps it took, over all processes and
        runs that used this file, and no reservation takes it above the budget. Both end where the file is
        deleted or replaced by an older copy of itself: keep `head()` in a second place to notice. The lock is
        advisory.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open and verify; see `open`."""
        self.path = path
        self._header = header
        self._charges = Charges()
        self._tail = chain.Tail()
        with self._lock():
            pass

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        budget: PrivacyBudget,
        *,
        dataset_id: str,
        randomness: RandomnessKind,
        accountant: AccountantName = "pld",
        unit: UnitName = "example",
        rows_per_person: int = 1,
    ) -> Self:
        """Create a ledger in which nobody has spent anything.

        Args:
            path: the file, in an existing folder.
            budget: what each client may spend over the life of the file.
            dataset_id: the operator's name for the data, the same for every run on them.
            randomness: "seeded" (a simulation of privacy) or "os".
            accountant: "pld" or "rdp".
            unit: whose presence epsilon is about (`fedlr.privacy.units`). Of the client unit the ledger is the
                server's, and its one client, 0, stands for every client alike.
            rows_per_person: of the person unit, the most rows that one person may have.

        Raises:
            InputError: the file exists (it is never overwritten), or an argument is out of range.
        """
        header = Header.of(
            budget,
            dataset_id=dataset_id,
            randomness=randomness,
            accountant=accountant,
            unit=unit,
            rows_per_person=rows_per_person,
        )
        chain.create(Path(path), header.row())
        return cls(Path(path), header)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        budget: PrivacyBudget,
        *,
        dataset_id: str,
        randomness: RandomnessKind,
        accountant: AccountantName = "pld",
        unit: UnitName = "example",
        rows_per_person: int = 1,
    ) -> Self:
        """Open and verify a ledger that was created with the same arguments.

        Raises:
            InputError: the file is missing (which is not an unspent budget), was changed (the text names the
                row), or belongs to another budget, data set, accountant or kind of randomness.
        """
        header = Header.of(
            budget,
            dataset_id=dataset_id,
            randomness=randomness,
            accountant=accountant,
            unit=unit,
            rows_per_person=rows_per_person,
        )
        return cls(Path(path), header)

    def reserve(
        self,
        round_index: int,
        mechanism: Mechanism,
        num_steps: int,
        client_ids: Sequence[int],
        task: str | None = None,
        announced_steps: int | None = None,
    ) -> dict[int, Refusal | None]:
        """Charge one round to a cohort, or refuse; call it before any private example of the round is read.

        A client whose epsilon would exceed the budget is refused. So is one for which this round was reserved
        before: charging it again would count twice, letting it train again would be free. Round numbers
        therefore run over the life of the ledger, not of a process. Nothing is written for a refusal.

        With seeded randomness there is one exception, the *repeat*, by which a run that was killed goes on: the same
        task, mechanism and steps, in the same round, all of them charged already. The same computation with the same
        noise gives the same output, so nothing new is released: it is accepted and charges nothing. With randomness
        of the operating system it would be another output, and is refused.

        Args:
            round_index: which round.
            mechanism: constants of every step.
            num_steps: steps each client may take in this round.
            client_ids: the cohort, without repetition.
            task: SHA-256, in hexadecimal, of all that decides what these clients compute beside their data: what they
                are asked and what they start from, the seed of their noise, how they train. None is never a repeat.
            announced_steps: how many steps of this mechanism were announced in all, as a ledger that may meet another
                one must know (`fedlr.privacy.filter`). What counts is the first that a client was charged with.

        Returns:
            For each client None (go ahead) or the refusal.

        Guarantees:
            When this returns, all accepted reservations are on disk, by one lock, one write and one fsync.
            When it raises, nobody may train, and reservations that reached the disk stay charged.
        """
        cohort = [int(client) for client in client_ids]
        if len(set(cohort)) != len(cohort) or min([round_index, num_steps - 1, *cohort]) < 0:
            raise ValueError(
                "Expected distinct clients >= 0, a round >= 0 and at least one step, "
                f"got clients {cohort}, round {round_index} and {num_steps} steps"
            )
        if task is not None and not re.fullmatch("[0-9a-f]{64}", task):
            raise ValueError(f"Expected the SHA-256 of a task in hexadecimal, got {task!r}")
        numbers = {"round_index": int(round_index), "num_steps": int(num_steps)}
        announced = None if announced_steps is None else int(announced_steps)
        said = {"task": task, "announced_steps": announced}
        reservation = {"kind": "reserve", **numbers, **{key: value for key, value in said.items() if value is not None}}
        charge = Charge(mechanism, int(num_steps), announced_steps=announced)
        answers: dict[int, Refusal | None] = {}
        repeated, charged = [], []
        with self._lock() as file:
            for client in cohort:
                answers[client] = None
                if self._is_repeat(round_index, mechanism, num_steps, client, task):
                    repeated.append(client)
                elif (refusal := self._refusal(round_index, charge, client)) is not None:
                    answers[client] = refusal
                else:
                    charged.append(client)
            rows = of_clients({"kind": "repeat", "round_index": int(round_index)}, repeated)
            self._append(file, [*rows, *of_clients({**reservation, "mechanism": mechanism.constants()}, charged)])
        return answers

    def settle(self, round_index: int, client_id: int, steps_taken: int) -> None:
        """Settle one client; see `settle_all`."""
        self.settle_all(round_index, {client_id: steps_taken})

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Say how many of the reserved steps were taken: all whose noise was drawn, sent or not.

        Args:
            round_index: the round of the reservations.
            steps_taken: for each client that finished, at most what it had reserved.

        Raises:
            ValueError: there is no such reservation, it is settled already, or it was for fewer steps. Nothing is
                written then, for nobody. A repeated reservation may be settled again: that writes nothing.

        Guarantees:
            When this returns, all settlements are on disk, by one lock, one write and one fsync.
        """
        with self._lock() as file:
            by_steps: dict[int, list[int]] = {}
            for client, n in steps_taken.items():
                if not self._is_settled(round_index, client, n):
                    by_steps.setdefault(int(n), []).append(int(client))
            told = {"kind": "settle", "round_index": int(round_index)}
            self._append(file, [row for n, c in by_steps.items() for row in of_clients({**told, "steps_taken": n}, c)])

    def spent(self, client_id: int) -> float:
        """Return the client's epsilon so far, at the budget's delta; 0.0 for one that never reserved."""
        return self.spent_all([client_id])[client_id]

    def spent_all(self, client_ids: Iterable[int], *, num_rounds: int | None = None) -> dict[int, float]:
        """Return what `spent` does for each client, by one lock and one reading of the file.

        With `num_rounds` it is what the rounds below that cost: less than was spent, where a later one is reserved.
        """
        with self._lock():
            return {c: self._charges.epsilon(c, self._header, num_rounds=num_rounds) for c in client_ids}

    def participations(self, client_id: int) -> int:
        """Return for how many rounds the client was charged."""
        with self._lock():
            return len(self._charges.of(client_id))

    def round_of(self, client_id: int, task: str) -> int | None:
        """Return the round under which a task was reserved for a client, of several the latest; None: never."""
        with self._lock():
            rounds = [number for number, charge in self._charges.of(client_id).items() if charge.task == task]
        return max(rounds, default=None)

    @property
    def is_seeded(self) -> bool:
        """Whether the noise is a function of a seed, so that a computation can be repeated to the bit."""
        return self._header.randomness == "seeded"

    def head(self) -> str:
        """Return the hash of the last row: whoever keeps it elsewhere can tell an older copy of the file."""
        with self._lock():
            return self._tail.head

    def require(self, head: str) -> None:
        """Refuse an older copy of the file: one that does not hold a row which was its last once.

        Raises:
            InputError: no row has this hash.
        """
        with self._lock() as file:
            data = chain.read_from(file, 0, name=self.path.name)
        rows, _, _ = chain.parse(data, chain.Tail(), name=self.path.name)
        if head not in {chain.GENESIS, *(row["hash"] for row in rows)}:
            raise InputError(
                f"Expected a row with hash {head[:12]} in {self.path}, got {len(rows)} rows without it: it is an older "
                "copy of the ledger, and forgets what was spent since; put the newest back"
            )

    def _is_settled(self, round_index: int, client_id: int, steps_taken: int) -> bool:
        """Return whether a repeated reservation was settled before; raise where nothing is to be settled."""
        charge = self._charges.of(client_id).get(round_index)
        is_again = charge is not None and charge.is_repeated and charge.settled_steps is not None
        if charge is None or (charge.settled_steps is not None and not is_again):
            raise ValueError(f"Expected an open reservation of client {client_id} in round {round_index}, got {charge}")
        if not 0 <= steps_taken <= charge.reserved_steps:
            raise ValueError(f"Expected steps_taken in [0, {charge.reserved_steps}], got {steps_taken}")
        return is_again

    def _is_repeat(
        self, round_index: int, mechanism: Mechanism, num_steps: int, client_id: int, task: str | None
    ) -> bool:
        charge = self._charges.of(client_id).get(round_index)
        return charge is not None and self.is_seeded and charge.is_repeated_by(mechanism, num_steps, task)

    def _refusal(self, round_index: int, more: Charge, client_id: int) -> Refusal | None:
        if round_index in self._charges.of(client_id):
            spent = self._charges.epsilon(client_id, self._header)
            return Refusal("already_reserved", spent, spent)
        afterwards = self._charges.epsilon_with(client_id, self._header, more)
        if afterwards <= self._header.epsilon:
            return None
        return Refusal("budget_exhausted", self._charges.epsilon(client_id, self._header), afterwards)

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """Hold the file alone, with all that other processes wrote taken in and a torn end repaired."""
        with chain.locked(self.path) as file:
            data = chain.read_from(file, self._tail.offset, name=self.path.name)
            rows, tail, fragment = chain.parse(data, self._tail, name=self.path.name)
            if self._tail.num_rows == 0:
                parse_header(rows, name=self.path.name).require(self._header, name=self.path.name)
            self._charges.take_in(rows)
            self._tail = tail
            if fragment:
                os.ftruncate(file, tail.offset)
                self._append(file, recovered(fragment, self._charges))
            yield file

    def _append(self, file: int, rows: Sequence[chain.Row]) -> None:
        # In this order: when the write fails, memory says what was read, and the next lock reads the rest.
        if rows:
            for row in rows:
                checked(row)
            tail = chain.append(file, self._tail, rows)
            self._charges.take_in(rows)
            self._tail = tail
