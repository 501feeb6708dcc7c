"""Per-example gradients of any tuner: torch.func where no hook of Opacus reaches, and every way as plain rows.

Opacus hooks modules; most tuners of PEFT keep bare parameters, which no hook sees. `torch.func` differentiates the
loss of one example as a function of the trained tensors and maps that over the rows of a micro-batch, so each row is
computed from its own example alone, by construction. A tuner that torch.func cannot follow (an autograd.Function of
its own, sparse tensors, `.item()`) is left to `fedlr.training.gradients.LoopGradients`: slower, never wrong.

A gradient that is silently missing is refused: torch.func calls it zero.

Legend: N examples.
"""

from collections.abc import Mapping

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, losses_of
from fedlr.training.gradients import _attribute, _no_trace, _trained_layers, clipped_row_sums, sorted_trained


class FunctorchGradients:
    """Per-example gradients by vmap(grad) over single examples: one pass, N copies of the trained tensors."""

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss
        self._places, self._losses = places_of(model, self._trained), _Losses(model, loss)
        self._reached = False

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `fedlr.training.gradients.Gradients.clipped_sum`."""
        return clipped_row_sums(self.rows(batch), max_grad_norm=max_grad_norm)

    def rows(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the gradient of each example, (N, ...) a slot.

        Guarantees:
            Row i depends on example i alone. Private: only a clipped and noised sum of rows may leave.

        Raises:
            InputError: if a trained tensor does not reach the loss through torch.func, or torch.func cannot follow
                the model (a random forward pass included); `LoopGradients` is then the way.
        """
        if batch.num_examples == 0:
            return {slot: p.new_zeros(0, *p.shape) for slot, p in self._trained.items()}
        values = {slot: p.detach() for slot, p in self._trained.items()}
        one = {name: rows[0] for name, rows in batch.inputs.items()}
        try:
            if not self._reached:
                self._check_reached(values, one, batch.targets[0])
            rows_of = vmap(grad(self._loss_of_one), (None, 0, 0))
            found: dict[Slot, Tensor] = rows_of(values, dict(batch.inputs), batch.targets)
        except (RuntimeError, NotImplementedError) as error:
            raise cannot_follow(error) from error
        self._reached = True
        return found

    def close(self) -> None:
        """Do nothing: there are no hooks."""

    def _loss_of_one(self, values: Mapping[Slot, Tensor], example: Mapping[str, Tensor], label: Tensor) -> Tensor:
        batch = Batch({name: tensor.unsqueeze(0) for name, tensor in example.items()}, label.unsqueeze(0))
        places = {f"model.{name}": values[slot] for slot, names in self._places.items() for name in names}
        losses: Tensor = functional_call(self._losses, places, (batch,), tie_weights=False)
        return losses[0]

    def _check_reached(self, values: Mapping[Slot, Tensor], example: Mapping[str, Tensor], label: Tensor) -> None:
        # A module that holds its tensor by another way than its parameters gets a gradient of zero from torch.func.
        leaves = {slot: tensor.clone().requires_grad_() for slot, tensor in values.items()}
        loss = self._loss_of_one(leaves, example, label)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        missing = [slot for slot, gradient in zip(leaves, found, strict=True) if gradient is None]
        if missing:
            raise InputError(
                f"Expected every trained tensor to reach the loss, got {missing[0].path} left out; its gradient would "
                "silently be zero"
            )


class _Losses(nn.Module):
    """A model and its loss as one module, so that torch.func can give the model other tensors."""

    def __init__(self, model: nn.Module, loss: PerExampleLoss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return losses_of(self.model, self._loss, batch)


def hook_rows(
    model: nn.Module,
    trained: Mapping[Slot, nn.Parameter],
    batch: Batch,
    *,
    loss: PerExampleLoss,
) -> dict[Slot, Tensor]:
    """Return the gradient of each example, (N, ...) a slot, as Opacus hooks find it; removes the hooks again.

    Raises:
        ValueError: if Opacus leaves a trained tensor without one gradient an example.
    """
    trained = sorted_trained(model, trained)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with _no_trace(_trained_layers(model), trained):
            losses_of(model, loss, batch).sum().backward()
            return {slot: _attribute(p, "grad_sample", batch.num_examples, slot).clone() for slot, p in trained.items()}
    finally:
        hooks.cleanup()


def loop_rows(
    model: nn.Module,
    trained: Mapping[Slot, nn.Parameter],
    batch: Batch,
    *,
    loss: PerExampleLoss,
) -> dict[Slot, Tensor]:
    """Return the gradient of each example, (N, ...) a slot, from one pass an example through plain autograd."""
    trained = sorted_trained(model, trained)
    found: dict[Slot, list[Tensor]] = {slot: [] for slot in trained}
    for row in range(batch.num_examples):
        total = losses_of(model, loss, batch.one(row)).sum()
        for slot, gradient in zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True):
            found[slot].append(gradient.to_dense() if gradient.is_sparse else gradient)
    return {slot: torch.stack(rows) for slot, rows in found.items()}


def cannot_follow(error: Exception) -> InputError:
    """Return the error for a forward pass that torch.func cannot follow; says nothing of values."""
    return InputError(
        f"Expected a model that torch.func can follow, got {type(error).__name__} in its forward pass; "
        "use gradients by a loop"
    )


def places_of(model: nn.Module, trained: Mapping[Slot, nn.Parameter]) -> dict[Slot, list[str]]:
    """Return one name for each place that holds a trained tensor.

    A place is a module and a key. A module that hangs in the model several times (a bank that layers share) has many
    names for one place; functional_call, asked to tie weights, would swap it once a name and then put back its own
    temporary tensor instead of the parameter.
    """
    slots = {id(parameter): slot for slot, parameter in trained.items()}
    found: dict[Slot, list[str]] = {slot: [] for slot in trained}
    seen: set[tuple[int, str]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in slots and (id(module), key) not in seen:
                seen.add((id(module), key))
                found[slots[id(parameter)]].append(f"{path}.{key}" if path else key)
    return found
