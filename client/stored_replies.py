"""What a device keeps on its disk between rounds: its released updates, what never leaves it, the adapter it was given.

A released update is sent again as it was, to the bit, and never made a second time: a retry costs no privacy and is
counted once. Each is a sealed folder (`fedlr.runs.verified_folder`), whole or absent:

    STATE_DIR/experiments/EXPERIMENT_ID/round-00003/     update, personal, memory, and the facts of the reply
    STATE_DIR/experiments/EXPERIMENT_ID/enrolled/        the adapter that broadcasts overlay
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedlr.adapters.state import AdapterState, Slot
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, ReplyFacts
from fedlr.runs.verified_folder import read_sealed, remove_sealed, sealed_names, write_sealed

ROUNDS_KEPT = 3
UPDATE, PERSONAL, MEMORY, REPLY = "update", "personal", "memory", "reply"


@dataclass(frozen=True)
class Kept:
    """What a finished round left: its reply, and what the device starts the next one with."""

    reply: Reply
    personal: Mapping[Slot, Tensor]
    memory: Mapping[Slot, Tensor]


class Replies:
    """The rounds of one experiment on this device's disk."""

    def __init__(self, experiments_dir: Path, experiment_id: str) -> None:
        self._folder = experiments_dir / experiment_id

    def write(self, kept: Kept) -> None:
        """Write a finished round, before its reply is sent; older rounds than the latest few are removed."""
        tensors = {UPDATE: kept.reply.tensors, PERSONAL: kept.personal, MEMORY: kept.memory}
        write_sealed(
            self._round(kept.reply.facts.round_index), tensors, {REPLY: json.dumps(kept.reply.facts.model_dump())}
        )
        for old in self._rounds()[:-ROUNDS_KEPT]:
            remove_sealed(old)

    def of(self, round_index: int) -> Kept | None:
        """Return a finished round, or None.

        Raises:
            Corrupt: it is there and is not what was written.
        """
        folder = self._round(round_index)
        return _read(folder) if folder in self._rounds() else None

    def latest(self) -> Kept | None:
        """Return the last finished round, or None."""
        rounds = self._rounds()
        return _read(rounds[-1]) if rounds else None

    def enrol(self, adapter: AdapterState) -> None:
        """Keep the adapter that broadcasts overlay."""
        facts = {"scale": adapter.scale, "sha256": adapter.fingerprint()}
        write_sealed(self._folder / "enrolled", {"adapter": adapter.tensors}, facts)

    def enrolled(self, sha256: str) -> AdapterState | None:
        """Return the adapter that was kept, or None where it is another one, is not there, or is damaged."""
        try:
            tensors, facts = read_sealed(self._folder / "enrolled")
        except InputError:  # absent or damaged: the server has it, and sends it again
            return None
        return AdapterState(tensors["adapter"], float(facts["scale"])) if facts["sha256"] == sha256 else None

    def _round(self, round_index: int) -> Path:
        return self._folder / f"round-{round_index:05d}"

    def _rounds(self) -> list[Path]:
        return [self._folder / name for name in sealed_names(self._folder) if name.startswith("round-")]


def last_heads(experiments_dir: Path) -> Iterator[str]:
    """Yield the ledger's head as it was when each experiment's last update was released."""
    for experiment_id in sealed_names(experiments_dir):
        kept = Replies(experiments_dir, experiment_id).latest()
        if kept is not None and kept.reply.facts.ledger_head is not None:
            yield kept.reply.facts.ledger_head


def _read(folder: Path) -> Kept:
    tensors, facts = read_sealed(folder)
    return Kept(Reply(ReplyFacts(**json.loads(facts[REPLY])), tensors[UPDATE]), tensors[PERSONAL], tensors[MEMORY])
