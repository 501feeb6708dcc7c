"""Who may train: the file that ties each enrolled key to the client number of the seeded sampler.

{"clients": [{"client_id": 0, "name": "site-a", "public_key": "ecdsa-sha2-nistp384 AAAA...", "node_id": 123}],
 "revoked": [...]}. A client number means one site for ever, since records are kept by it: the number of a
revoked device is given again only to the device that replaces it (`enrol --replace NAME`).
"""

import fcntl
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlr.errors import InputError
from fedlr.errors.messages import first_problem
from fedlr.files import make_folder, write_whole, writing
from fedlr.flower.node_key import canonical_public_key

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class RosterEntry(BaseModel):
    """One device: its number in the experiment, its key, and the node id that the SuperLink gave it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    client_id: Annotated[int, Field(ge=0, lt=2**31)]
    name: Name
    public_key: str
    node_id: Annotated[int, Field(gt=0, lt=2**64)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    clients: tuple[RosterEntry, ...] = Field(default=(), strict=False)
    revoked: tuple[RosterEntry, ...] = Field(default=(), strict=False)


@dataclass(frozen=True)
class Roster:
    """Enrolled devices and revoked ones, both in order of their client numbers.

    Raises:
        InputError: if two entries share a number, name, key or node id, or a key is no EC P-384 key.
    """

    clients: tuple[RosterEntry, ...] = ()
    revoked: tuple[RosterEntry, ...] = ()

    def __post_init__(self) -> None:
        """Refuse entries that could be taken for one another; the key of a revoked device is never used again."""
        both = [*self.clients, *self.revoked]
        _require_unique("client_id", (entry.client_id for entry in self.clients))
        _require_unique("node_id", (entry.node_id for entry in both))
        _require_unique("public_key", (canonical_public_key(entry.public_key) for entry in both))
        _require_unique("name", (entry.name for entry in self.clients))

    @property
    def client_of_node(self) -> Mapping[int, int]:
        """Client number by node id, of those that may train."""
        return {entry.node_id: entry.client_id for entry in self.clients}

    def next_client_id(self) -> int:
        """Return the lowest number above all that were ever given."""
        return 1 + max((entry.client_id for entry in [*self.clients, *self.revoked]), default=-1)

    def named(self, name: str) -> RosterEntry:
        """Return an enrolled device by its name.

        Raises:
            InputError: if there is none.
        """
        for entry in self.clients:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.clients) or "nobody"
        raise InputError(f"Expected the name of an enrolled device, got {name!r}; enrolled: {known}")

    def with_client(self, name: str, public_key: str, node_id: int) -> Self:
        """Return the roster with one more device, which gets the next number."""
        key = canonical_public_key(public_key)
        values = {"client_id": self.next_client_id(), "name": name, "public_key": key, "node_id": node_id}
        try:
            entry = RosterEntry.model_validate(values)
        except ValidationError as error:
            raise InputError(first_problem(error, values, prefix="client")) from None
        return replace(self, clients=(*self.clients, entry))

    def to_replace(self, name: str) -> RosterEntry:
        """Return the device of this name, enrolled or revoked last, whose number a new one may get.

        Raises:
            InputError: there is none, or its number is another device's by now.
        """
        for entry in [*self.clients, *reversed(self.revoked)]:
            if entry.name == name:
                break
        else:
            known = ", ".join(sorted({entry.name for entry in [*self.clients, *self.revoked]})) or "nobody"
            raise InputError(f"Expected --replace with the name of a device, got {name!r}; known: {known}")
        for other in self.clients:
            if other.client_id == entry.client_id and other is not entry:
                raise InputError(f"Expected client {entry.client_id} to be free, got {other.name!r}; replace that one")
        return entry

    def with_replacement(self, name: str, public_key: str, node_id: int) -> Self:
        """Return the roster with a new key under an old name and number; the old key stays revoked."""
        old = self.to_replace(name)
        rest = self.without_client(name) if old in self.clients else self
        added = rest.with_client(name, public_key, node_id)
        clients = (*added.clients[:-1], added.clients[-1].model_copy(update={"client_id": old.client_id}))
        return replace(rest, clients=tuple(sorted(clients, key=lambda entry: entry.client_id)))

    def without_client(self, name: str) -> Self:
        """Return the roster with an enrolled device among the revoked ones."""
        entry = self.named(name)
        clients = tuple(other for other in self.clients if other is not entry)
        return replace(self, clients=clients, revoked=(*self.revoked, entry))


def load_roster(path: Path) -> Roster:
    """Read a roster.

    Raises:
        InputError: if the file is missing or is no roster, with the first thing that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        file = _File.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a roster in {path}, got {error}; fedlr server enrol makes one") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise InputError(f"Expected a roster in {path}, got a problem at {where}: {problem['msg']}") from None
    return Roster(file.clients, file.revoked)


def save_roster(roster: Roster, path: Path) -> None:
    """Write a roster in one piece: a reader, or a crash, sees the old file or the new one."""
    text = _File(clients=roster.clients, revoked=roster.revoked).model_dump_json(indent=1)
    make_folder(path.parent)
    write_whole(path, text + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the same roster meanwhile; they wait."""
    make_folder(path.parent)
    with writing(path):
        file = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _require_unique(what: str, values: Iterable[int | str]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise InputError(f"Expected every {what} once in the roster, got {value} {times} times")
