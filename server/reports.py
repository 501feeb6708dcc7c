"""What devices say of their own ledgers, kept so that no device can take a word back.

A ledger only grows: epsilon over its life never falls, and after another round its last row is another one. A device
that says otherwise has lost its ledger, put an older copy back, or does not tell the truth. Its update is refused by
name, and the server's statement keeps the highest epsilon that the device ever reported. That a word stands is all that
this can show: whoever reports too little from the first round on is not found out (`fedlr.privacy.reported`).

A device sends an update again with its ledger's row of now, which it may have reported in another run meanwhile. So
the newest row that is known of a client passes once in a run that has not heard it, where epsilon did not fall. This
gives up one update in each run (and at each start that lost what was heard): of a device that charged nothing for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedlr.flower.messages import LedgerEcho, ReplyFacts
from fedlr.flower.node_key import canonical_public_key
from fedlr.flower.signed import ROUNDING, SIGNED, is_signed
from fedlr.server.remembered import Known, Remembered

FELL, OLD, FORGED = "epsilon_fell", "old_ledger", "bad_signature"  # reasons of the gate's closed set


@dataclass
class Reports:
    """By client: the highest epsilon that it reported, and the last row's hash at each of its updates, oldest first.

    `signed` has the last word of a client, where its signature is that of the client's key; none where that word has a
    lower epsilon than it said before, or an older row: then it bears out what is stated of the client no more.
    `remembered` is what was said in other runs: words are compared with it; a statement of this run does not tell it.
    """

    epsilon: dict[int, float] = field(default_factory=dict)
    heads: dict[int, list[str]] = field(default_factory=dict)
    _tasks: dict[int, str] = field(default_factory=dict)  # which the newest head was reported for, since this start
    _unwritten: dict[int, list[tuple[str, float]]] = field(default_factory=dict, compare=False)  # since `remember`
    signed: dict[int, dict[str, Any]] = field(default_factory=dict)
    remembered: Remembered = field(default_factory=Remembered, compare=False)

    def hear(self, client: int, facts: ReplyFacts, task_sha256: str, *, public_key: str | None = None) -> str | None:
        """Take in what a reply with a statement says; return why an update that comes with it is refused, or None.

        The same reply may come again for the same task: a device sends what it had released as it was. The newest head
        of other runs passes once, whatever its task (above). With the client's key, a signature that is another's is
        refused; that there is none is only said (`missing`).
        """
        assert facts.epsilon is not None and facts.ledger_head is not None
        word = facts.model_dump()
        if public_key is not None and facts.signature and not is_signed(word, facts.signature, public_key):
            return FORGED
        known = self.remembered.of(client)
        before = max(self.epsilon.get(client, 0.0), known.epsilon)
        self.epsilon[client] = max(self.epsilon.get(client, 0.0), facts.epsilon)
        self.signed.pop(client, None)
        if facts.epsilon < before * (1 - ROUNDING):
            return FELL
        heads = self.heads.setdefault(client, [])
        was_last_here = heads[-1:] == [facts.ledger_head] and self._tasks.get(client) == task_sha256
        is_old = facts.ledger_head in heads[:-1] or facts.ledger_head in known.heads[:-1]
        if public_key is not None and facts.signature and not is_old:
            told = {key: word[key] for key in (*SIGNED, "signature")}
            self.signed[client] = {**told, "public_key": canonical_public_key(public_key)}
        if facts.refused is not None:
            return None
        if facts.ledger_head in heads:
            return None if was_last_here else OLD
        if facts.ledger_head in known.heads[:-1]:
            return OLD
        heads.append(facts.ledger_head)
        self._unwritten.setdefault(client, []).append((facts.ledger_head, facts.epsilon))
        self._tasks[client] = task_sha256
        return None

    def echo(self, client: int) -> LedgerEcho | None:
        """Return what a client last said, here or in another run, to tell it back; None where it said nothing."""
        known = self.remembered.of(client)
        epsilon = max(self.epsilon.get(client, 0.0), known.epsilon)
        own = self.heads.get(client, [])
        unwritten = [head for head, _ in self._unwritten.get(client, [])]
        newest = unwritten or known.heads or own  # a file keeps the newest alone, and of all runs
        return LedgerEcho(epsilon, newest[-1]) if newest else None

    def remember(self) -> None:
        """Write what was heard beside what other runs heard: the heads that are new, all where the file has none."""
        heard = {}
        for client, epsilon in self.epsilon.items():
            new = self._unwritten.get(client, [])
            if not self.remembered.of(client).heads:
                told = dict(new)
                new = [(head, told.get(head, 0.0)) for head in self.heads.get(client, [])]
            heads, spent = tuple(head for head, _ in new), tuple(one for _, one in new)
            heard[client] = Known(epsilon=epsilon, heads=heads, spent=spent)
        self.remembered.keep(heard)
        self._unwritten.clear()

    def last_heads(self) -> dict[int, str]:
        """Return each client's newest head: of its signed word, where that is its last; else of its last update."""
        heads = {client: heads[-1] for client, heads in self.heads.items() if heads}
        return {**heads, **{client: str(word["ledger_head"]) for client, word in self.signed.items()}}

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, as JSON can."""
        return {
            "epsilon": {str(client): value for client, value in self.epsilon.items()},
            "ledger_heads": {str(client): heads for client, heads in self.heads.items()},
            "signed": {str(client): word for client, word in self.signed.items()},
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Return what `facts` told; a checkpoint of before kept one head a client."""
        heads = {c: [found] if isinstance(found, str) else found for c, found in facts["ledger_heads"].items()}
        return cls(
            {int(client): float(value) for client, value in facts["epsilon"].items()},
            {int(client): [str(head) for head in found] for client, found in heads.items()},
            signed={int(client): dict(word) for client, word in facts.get("signed", {}).items()},
        )
