"""What devices said of their ledgers in any run of this server: a file beside the roster, which outlives runs.

    {"clients": {"3": {"epsilon": 2.5, "heads": ["...", "..."], "task": "..."}}}

A run compares what it hears with this, and tells each device the last of it (`fedlr.flower.messages.LedgerEcho`), so
that a ledger which was put back is found by both sides, whichever run it happens in. A device whose data are new, with
a new ledger, is let in again when its entry is taken out by hand: that is the operator's decision.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.flower.messages import LARGEST_EPSILON
from fedlr.flower.task_terms import Sha256
from fedlr.server.roster import locked

NAME = "ledgers.json"
MOST_HEADS = 1000  # of a client, the newest


class Known(BaseModel):
    """What a client said: its highest epsilon, its ledger's last row at each update, and the last update's task."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    epsilon: Annotated[float, Field(ge=0, le=LARGEST_EPSILON)] = 0.0
    heads: tuple[Sha256, ...] = Field(default=(), strict=False)
    task: Sha256 | None = None

    def joined(self, later: "Known") -> "Known":
        """Return what both say, `later` the newer."""
        heads = (*(head for head in self.heads if head not in later.heads), *later.heads)
        is_last = heads[-1:] == self.heads[-1:]
        task = later.task or (self.task if is_last else None)
        return Known(epsilon=max(self.epsilon, later.epsilon), heads=heads[-MOST_HEADS:], task=task)


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
        path = roster.with_name(NAME)
        return cls(path, _read(path))

    def keep(self, heard: Mapping[int, Known]) -> None:
        """Add what a run heard, beside what other runs wrote meanwhile; whole or not at all."""
        if self.path is None or not heard:
            return
        with locked(self.path):
            clients = _read(self.path)
            for client, known in heard.items():
                clients[client] = clients.get(client, Known()).joined(known)
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
