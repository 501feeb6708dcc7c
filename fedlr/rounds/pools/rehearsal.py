"""How a device keeps its answers apart from its rows: what can fail is tried before the charge, on rows of no one's.

Whether a Poisson draw is empty is private, and so is which rows it held. A pass that fails, and is told, tells that
there was a row. So, where a pool is given a `Rehearsal`:

- Before the ledger is charged, the round runs on constant rows: the very stack, rule, optimizer and engine, every row
  drawn. What fails there fails whatever the draw would be, and costs nothing.
- After the charge, a row whose own pass fails counts as zero, as one does whose gradient is not finite. That is a rule
  about one row, so the clip bound stands, and the noise hides it as it hides any row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import Share
from fedlr.training.cohort import FusedSums
from fedlr.training.fused import ClippedSums
from fedlr.training.gradients import Gradients
from fedlr.training.local import LocalTraining

STEPS = 2  # the first that has a state of the optimizer; and both turns of a rule that alternates


@dataclass(frozen=True)
class Rehearsal:
    """Constant rows to try a round on, and whom to tell on this device of a row that failed.

    Args:
        share: the first row is short. The others have the largest length, as many as are computed side by side: they
            show what a model cannot read, and what the memory does not hold.
        say: the device's own log.
    """

    share: Share
    say: Callable[[str], None]
    _told: set[str] = field(default_factory=set)

    def rows(self, *, with_long: bool) -> Share:
        """Return all rows, or the short one alone."""
        return self.share if with_long else replace(self.share, rows=self.share.rows[:1])

    def training(self, training: LocalTraining) -> LocalTraining:
        """Return the first steps of a round in which every row is drawn."""
        num_steps = min(STEPS, training.num_steps)
        return replace(training, num_steps=num_steps, sampler=PoissonSampler(1.0))

    def mechanism(self, mechanism: Mechanism | None) -> Mechanism | None:
        """Return the mechanism of these steps; what it noises is thrown away."""
        return None if mechanism is None else replace(mechanism, sample_rate=1.0)

    def failed(self, error: BaseException, num_rows: int) -> None:
        """Tell once of each kind of error that a row counts as zero.

        Raises:
            Exception: the error, where it is that of several rows: one of them would then decide about the others.
        """
        if num_rows != 1:
            raise error
        if (kind := type(error).__name__) not in self._told:
            self._told.add(kind)
            self.say(f"a row that could not be computed counts as zero, and so will others: {kind}: {error}")


@dataclass(frozen=True)
class SafeSums:
    """Clipped sums of micro-batches of one row each; one that fails is zero (`fedlr.training.cohort.FusedSums`)."""

    sums: FusedSums
    rehearsal: Rehearsal

    def __call__(
        self,
        batch: Batch,
        *,
        owner: Tensor,
        stacks: Mapping[Slot, Tensor],
        **passed_on: Any,
    ) -> ClippedSums:
        """See `fedlr.training.cohort.FusedSums`."""
        try:
            return self.sums(batch, owner=owner, stacks=stacks, **passed_on)
        except Exception as error:  # whatever a foreign forward makes of a row
            self.rehearsal.failed(error, batch.num_examples)
        num_values = sum(stack[0].numel() for stack in stacks.values())
        device = batch.targets.device
        return ClippedSums(owner.to(device), torch.zeros(1, num_values, device=device))


@dataclass(frozen=True)
class SafeGradients:
    """The same for one client by itself (`fedlr.training.gradients.Gradients`)."""

    gradients: Gradients
    trained: Mapping[Slot, Tensor]
    rehearsal: Rehearsal

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `fedlr.training.gradients.Gradients`."""
        try:
            return self.gradients.clipped_sum(batch, max_grad_norm=max_grad_norm)
        except Exception as error:  # whatever a foreign forward makes of a row
            self.rehearsal.failed(error, batch.num_examples)
        return {slot: torch.zeros_like(self.trained[slot], dtype=torch.float32) for slot in sorted(self.trained)}

    def close(self) -> None:
        """Do nothing: whoever made the gradients closes them."""
