"""What devices say of their own ledgers, kept so that no device can take a word back.

A ledger only grows: epsilon over its life never falls, and after another round its last row is another one. A device
that says otherwise has lost its ledger, put an older copy back, or does not tell the truth. Its update is refused by
name, and the server's statement keeps the highest epsilon that the device ever reported. That a word stands is all that
this can show: whoever reports too little from the first round on is not found out (`fedlr.privacy.reported`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedlr.flower.messages import ReplyFacts

FELL, OLD = "epsilon_fell", "old_ledger"  # reasons of the gate's closed set
ROUNDING = 1e-3  # relative: an accountant's grid may round another number of steps otherwise


@dataclass
class Reports:
    """By client: the highest epsilon that it reported, and the last row's hash at each of its updates, oldest first."""

    epsilon: dict[int, float] = field(default_factory=dict)
    heads: dict[int, list[str]] = field(default_factory=dict)
    _tasks: dict[int, str] = field(default_factory=dict)  # which the newest head was reported for, since this start

    def hear(self, client: int, facts: ReplyFacts, task_sha256: str) -> str | None:
        """Take in what a reply with a statement says; return why an update that comes with it is refused, or None.

        The same reply may come again for the same task: a device sends what it had released as it was.
        """
        assert facts.epsilon is not None and facts.ledger_head is not None
        before = self.epsilon.get(client, 0.0)
        self.epsilon[client] = max(before, facts.epsilon)
        if facts.epsilon < before * (1 - ROUNDING):
            return FELL
        if facts.refused is not None:
            return None
        heads = self.heads.setdefault(client, [])
        if facts.ledger_head in heads:
            is_again = facts.ledger_head == heads[-1] and self._tasks.get(client) == task_sha256
            return None if is_again else OLD
        heads.append(facts.ledger_head)
        self._tasks[client] = task_sha256
        return None

    def last_heads(self) -> dict[int, str]:
        """Return each client's newest head."""
        return {client: heads[-1] for client, heads in self.heads.items() if heads}

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, as JSON can."""
        return {
            "epsilon": {str(client): value for client, value in self.epsilon.items()},
            "ledger_heads": {str(client): heads for client, heads in self.heads.items()},
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Return what `facts` told; a checkpoint of before kept one head a client."""
        heads = {c: [found] if isinstance(found, str) else found for c, found in facts["ledger_heads"].items()}
        return cls(
            {int(client): float(value) for client, value in facts["epsilon"].items()},
            {int(client): [str(head) for head in found] for client, found in heads.items()},
        )
