"""The fused engine against Opacus on real rows, twice a run: two implementations that must say the same.

Once on the first micro-batch, where all clients still have the tensors they were sent, and once on the first whose
clients have tensors of their own: an engine that gives every row the first client's tensors is right before, and only
before.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import train_only, write_adapter
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss
from fedlr.training.fused import ClippedSums
from fedlr.training.gradients import HookGradients, LoopGradients

CLIENTS_COMPARED = 4
# Of the norm of a client's sum, or of the norms of its rows. Two orders of the same float32 products differ by 1e-6; in
# bfloat16, where every activation has 8 bits, by 0.02 on a pretrained encoder and 0.15 on small random networks.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


class ParityCheck:
    """Compares the first micro-batch it is shown, and the first whose clients differ, and no other.

    Args:
        model: a PEFT model of its own, over the same frozen tensors; its trained tensors are written.
        loss: one loss an example.
    """

    def __init__(self, model: nn.Module, *, loss: PerExampleLoss) -> None:
        self._model, self._loss = model.train(), loss  # a loaded head is in eval mode, in which no hook of Opacus looks
        halved = any(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
        self._tolerance = TOLERANCE[torch.bfloat16 if halved else torch.float32]
        self._lock, self._seen, self._seen_different = threading.Lock(), False, False

    def compare(
        self,
        found: ClippedSums,
        batch: Batch,
        *,
        owner: Tensor,
        adapter: Mapping[Slot, Tensor],
        stacks: Mapping[Slot, Tensor],
        max_grad_norm: float,
        active: frozenset[Slot] | None = None,
    ) -> None:
        """Compute the sums of the first few clients of the micro-batch again, and compare.

        Args:
            found: what the fused engine made of the same arguments.
            adapter: the tensors that are the same for all clients.
            active: what was clipped and summed; None: all of `stacks`.

        Raises:
            InputError: if they disagree. It says nothing of the rows.
        """
        if self._seen and self._seen_different:
            return
        with self._lock:
            different = any(
                not torch.equal(stack[found.clients[0]], stack[found.clients[-1]]) for stack in stacks.values()
            )
            if self._seen_different if different else self._seen:
                return
            self._seen, self._seen_different = True, different
            compared = frozenset(stacks) if active is None else active
            trained = train_only(self._model, compared)
            columns = torch.cat([torch.full((stacks[s][0].numel(),), s in compared) for s in sorted(stacks)])
            values = found.values[:, columns.to(batch.targets.device)]
            gradients = _Reference(self._model, trained, loss=self._loss)
            try:
                for client, got in list(zip(found.clients.tolist(), values, strict=True))[:CLIENTS_COMPARED]:
                    mine = owner == client
                    write_adapter(self._model, {**adapter, **{slot: stack[client] for slot, stack in stacks.items()}})
                    rows = batch.rows(mine)
                    wanted = _sum(gradients, rows, max_grad_norm)
                    distance = float((got - wanted).norm())
                    if distance <= self._tolerance * float(wanted.norm()):
                        continue
                    # Rows may cancel, as one text under two labels does; what is left of them is rounding.
                    parts = [_sum(gradients, rows.one(row), max_grad_norm) for row in range(rows.num_examples)]
                    if not distance <= self._tolerance * sum(float(part.norm()) for part in parts):
                        raise InputError(
                            "Expected the fused engine to compute the clipped sums that Opacus computes, got others on "
                            "a first batch of this run; where a rate (trainer.optimizer.lr) is so high that numbers "
                            "overflow, both are wrong: lower it; else set trainer.engine=opacus, and report the model "
                            "and the adapter (trainer.check_parity=false would hide it)"
                        )
            finally:
                gradients.close()


class _Reference:
    """Opacus' sums; where Opacus cannot run, those of plain autograd, example by example: no check is left out.

    Opacus keeps a copy of the trained tensors for each row, and may run out of memory where the fused engine does not.
    """

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._hooks: HookGradients | None = HookGradients(model, trained, loss=loss)
        self._loop = LoopGradients(model, trained, loss=loss)

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        if self._hooks is not None:
            try:
                return self._hooks.clipped_sum(batch, max_grad_norm=max_grad_norm)
            except Exception:  # whatever a foreign library makes of a model that the fused engine has just passed
                self.close()
        return self._loop.clipped_sum(batch, max_grad_norm=max_grad_norm)

    def close(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None


def _sum(gradients: _Reference, rows: Batch, max_grad_norm: float) -> Tensor:
    sums = gradients.clipped_sum(rows, max_grad_norm=max_grad_norm)
    return torch.cat([sums[slot].flatten() for slot in sorted(sums)])
