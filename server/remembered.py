"""What devices said of their ledgers in any run of this server: a file that outlives runs, beside the roster or where
`deployment.ledgers` says.

    {"clients": {"3": {"epsilon": 2.5, "heads": ["...", "..."], "spent": [2.4, 2.5]}}}

A run compares what it hears with this, and tells each device the last of it (`fedlr.flower.messages.LedgerEcho`), so
that a ledger which was put back is found by both sides, whichever run it happens in. A device whose data are new, with
a new ledger, is let in again when its entry is taken out by hand: that is the operator's decision.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlr.config.schema import DeploymentSection
from fedlr.errors import InputError, PassingError
from fedlr.files import NotWritten, write_whole
from fedlr.flower.messages import LARGEST_EPSILON
from fedlr.flower.task_terms import Sha256
from fedlr.server.roster import locked

NAME = "ledgers.json"
MOST_HEADS = 1000  # of a client, the newest


class Known(BaseModel):
    """What a client said: its highest epsilon, and its ledger's last row at each update, the newest last.

    `spent` is the epsilon of each of these rows; a file from before it was kept has none.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    epsilon: Annotated[float, Field(ge=0, le=LARGEST_EPSILON)] = 0.0
    heads: tuple[Sha256, ...] = Field(default=(), strict=False)
    spent: tuple[Annotated[float, Field(ge=0, le=LARGEST_EPSILON)], ...] = Field(default=(), strict=False)

    def rows(self) -> list[tuple[str, float]]:
        """Return each head with its epsilon, 0 where it is not known."""
        missing = (0.0,) * (len(self.heads) - len(self.spent))
        return list(zip(self.heads, (*missing, *self.spent), strict=False))

    def joined(self, later: "Known", *, seen: Collection[str] = ()) -> "Known":
        """Return what both say; a head that is known keeps its place.

        What `later` adds is newer than the heads that its run had `seen`. Another run may have heard the client at the
        same moment, and written first: its heads and these are put in the order of what the client had spent.
        """
        before = self.rows()
        old = max((place for place, (head, _) in enumerate(before, 1) if head in seen), default=0)
        there, added = before[old:], [row for row in later.rows() if row[0] not in self.heads]
        rows = before[:old]
        while there and added:
            rows.append((added if added[0][1] < there[0][1] else there).pop(0))
        rows = [*rows, *there, *added][-MOST_HEADS:]
        return Known(
            epsilon=max(self.epsilon, later.epsilon),
            heads=tuple(head for head, _ in rows),
            spent=tuple(spent for _, spent in rows),
        )


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    clients: dict[str, Known] = {}


@dataclass
class Remembered:
    """What is known of each client from before a run; `path` is None where nothing is kept, as in a simulation."""

    path: Path | None = None
    clients: dict[int, Known] = field(default_factory=dict)

    @classmethod
    def beside(cls, roster: Path) -> "Remembered":
        """Return what the file beside a roster holds; nothing where there is none yet.

        Raises:
            InputError: it is there and is not what was written: whoever lost it would not notice a ledger put back.
        """
        return cls.at(roster.with_name(NAME))

    @classmethod
    def at(cls, path: Path) -> "Remembered":
        """Return what a file holds; nothing where there is none yet.

        Raises:
            InputError: as of `beside`.
        """
        return cls(path, _read(path))

    @classmethod
    def of_server(cls, deployment: DeploymentSection) -> "Remembered":
        """Return what the file of `deployment.ledgers` holds, or the one beside the roster.

        Raises:
            InputError: as of `beside`.
        """
        return cls.at(Path(deployment.ledgers)) if deployment.ledgers else cls.beside(Path(deployment.roster))

    def require_writable(self) -> None:
        """Try whether what a run hears could be kept, before anybody is asked and has spent for it.

        Raises:
            InputError: the folder cannot be written.
        """
        if self.path is None:
            return
        try:
            with locked(self.path):
                is_writable, why = os.access(self.path.parent, os.W_OK), "it is not writable"
        except NotWritten as error:
            if error.exit_code == PassingError.exit_code:  # a full disk
                raise
            is_writable, why = False, str(error.__cause__ or error)
        if not is_writable:
            raise InputError(
                f"Expected a folder that can be written for {self.path}, which keeps what devices say of their privacy "
                f"ledgers, got {self.path.parent}: {why}; set deployment.ledgers to a file in one that can"
            )

    def keep(self, heard: Mapping[int, Known]) -> None:
        """Add what a run heard, beside what other runs wrote meanwhile; whole or not at all."""
        if self.path is None or not heard:
            return
        with locked(self.path):
            clients = _read(self.path)
            for client, known in heard.items():
                seen = frozenset(self.of(client).heads)
                clients[client] = clients.get(client, Known()).joined(known, seen=seen)
            told = {"clients": {str(client): known.model_dump() for client, known in sorted(clients.items())}}
            write_whole(self.path, json.dumps(told) + "\n")
        self.clients = clients

    def of(self, client: int) -> Known:
        """Return what is known of a client."""
        return self.clients.get(client, Known())


def _read(path: Path) -> dict[int, Known]:
    try:
        return {int(client): known for client, known in _File.model_validate_json(path.read_bytes()).clients.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError, ValueError) as error:
        raise InputError(
            f"Expected {path} to hold what devices said of their ledgers, got {str(error).splitlines()[0]}; put its "
            "newest copy back, or move it away to begin without"
        ) from None
