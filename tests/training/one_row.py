"""What one row may do to a clipped sum, for a task whose loss is its own."""

import torch

from fedlr.models.peft_state import train_only
from fedlr.tasks.batch import Batch
from fedlr.training.gradients import HookGradients
from tests.training.small_models import B_AND_HEAD, batch, difference, joint_norm, random_rows, small_model


def rows_with(targets: torch.Tensor) -> Batch:
    """Return made-up texts with these targets, one each."""
    return Batch(batch(random_rows(len(targets), seed=3)), targets)


def largest_move(engine: type, loss: object, rows: Batch, *, bound: float) -> float:
    """Return how far one row moves the clipped sum, in units of the bound."""
    model = small_model("bert")
    gradients = engine(model, train_only(model, B_AND_HEAD), loss=loss)
    whole = gradients.clipped_sum(rows, max_grad_norm=bound)
    moves = []
    for row in range(rows.num_examples):
        rest = rows.rows(torch.arange(rows.num_examples) != row)
        moves.append(joint_norm(difference(whole, gradients.clipped_sum(rest, max_grad_norm=bound))))
    return max(moves) / bound


def check_a_sum_is_that_of_its_rows(loss: object, rows: Batch) -> None:
    """Check that rows together give the sum that they give one by one."""
    model = small_model("bert")
    gradients = HookGradients(model, train_only(model, B_AND_HEAD), loss=loss)
    whole = gradients.clipped_sum(rows, max_grad_norm=1e3)
    parts = [gradients.clipped_sum(rows.one(row), max_grad_norm=1e3) for row in range(rows.num_examples)]
    summed = {slot: torch.stack([part[slot] for part in parts]).sum(dim=0) for slot in whole}
    assert joint_norm(difference(whole, summed)) <= 1e-4 * joint_norm(summed)
