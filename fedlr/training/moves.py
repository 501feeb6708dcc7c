"""Whether what trains first can move at all: looked at on constant examples, before any budget is spent.

Under privacy a block whose gradient is zero would still be noised, charged and sent, and nothing would come of it: with
lora_B at zero lora_A alone has no gradient, in this round or any other.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedlr.adapters.state import SHIPPED, AdapterState, Block, roles_of
from fedlr.errors import InputError
from fedlr.models.peft_state import read_adapter, train_only, write_adapter
from fedlr.tasks.probe import in_training
from fedlr.tasks.task import Task

FAINT = 0.01  # of the clip bound: of gradients below it noise leaves nothing to see


def check_moves(
    model: nn.Module, start: AdapterState, block: Block, *, task: Task, max_grad_norm: float | None
) -> str | None:
    """Refuse a first round whose block has no gradient at the start; return what to say where it is hardly any.

    Args:
        model: the whole model with its adapter. Left as it was.
        start: the adapter that the first round is sent.
        block: what the first round trains.
        task: gives the constant examples and their losses.
        max_grad_norm: the clip bound of a private run; None without privacy.

    Raises:
        InputError: which names the block, and what to train instead.
    """
    named = ", ".join(sorted(roles_of(block)))
    norm = largest_gradient(model, start, block, task=task)
    if not math.isfinite(norm):
        raise InputError(f"Expected a model with finite gradients at the start, got {norm} in {named}")
    if norm == 0.0:
        raise InputError(
            f"Expected a trained block with a gradient at the start, got {named}: another factor or block is zero "
            "there, so only noise would come of it; train that one first (method.block_schedule), or with it"
        )
    if max_grad_norm is None or norm >= FAINT * max_grad_norm:
        return None
    return (
        f"the gradients of {named} have a norm of about {norm:.1g} at the start, on constant text, and noise is set "
        f"for privacy.max_grad_norm={max_grad_norm:g}, which will hide them: set it near {norm:.1g}, and raise "
        "trainer.optimizer.lr"
    )


def largest_gradient(model: nn.Module, adapter: AdapterState, block: Block, *, task: Task) -> float:
    """Return the largest norm of a constant example's gradient of the block, at an adapter; no private row is read."""
    norms = []
    with _holding(model, adapter), in_training(model):
        trained = list(train_only(model, block).values())
        batch = task.probe(model)
        for row in range(batch.num_examples):
            loss = task.losses(model, batch.one(row)).sum()
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            norms.append(math.sqrt(sum(float(g.to_dense().double().square().sum()) for g in found if g is not None)))
    return math.nan if any(map(math.isnan, norms)) else max(norms)


@contextmanager
def _holding(model: nn.Module, adapter: AdapterState) -> Iterator[None]:
    """Let the model hold an adapter for a while; its own, and what trains, come back."""
    before = {slot: tensor for slot, tensor in read_adapter(model).tensors.items() if slot.role != SHIPPED}
    needs = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        write_adapter(model, {slot: tensor for slot, tensor in adapter.tensors.items() if slot.role != SHIPPED})
        yield
    finally:
        write_adapter(model, before)
        for parameter, needed in needs.items():
            parameter.requires_grad_(needed)
