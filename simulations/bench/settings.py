"""What every benchmark is told: how much to measure, where scratch files go, whom to tell."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedlr.simulations.bench.outcome import Size

Value = TypeVar("Value")
IN_MEMORY = Path("/dev/shm")


def scratch_root() -> Path | None:
    """Return where scratch folders go: in memory where the system has such a place, so that no disk is timed.

    A rival has no ledger of its own; with the file in memory that of ours costs it nothing.
    """
    return IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None


@dataclass(frozen=True)
class Settings:
    """`tiny` is for tests: seconds, a toy model, no figure that means anything."""

    size: Size
    scratch: Path  # ledgers and tensors that contestants leave for the checks
    say: Callable[[str], None]
    seed: int = 0

    def pick(self, *, tiny: Value, quick: Value, full: Value) -> Value:
        """Return the value for this size."""
        return {"tiny": tiny, "quick": quick, "full": full}[self.size]
