"""Per-example gradients of any tuner inside any model: each example reads a copy of the trained tensors of its own.

`FunctorchGradients` follows a whole model with torch.func, and transformers for text cannot be followed: their masks
branch on values. Here only the layers that hold trained tensors are mapped over examples; the rest of the model runs as
it is, on the whole micro-batch. The copies are the leaves of one backward pass, so the gradient of copy i is that of
example i, provided that examples do not interact (`fedlr.training.supported` probes it, as for Opacus hooks).

Memory: the trained tensors once more for each example, and what a tuner makes of them (a full weight, for DoRA).
Legend: N examples.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, losses_of
from fedlr.training.functorch import cannot_follow, places_of
from fedlr.training.gradients import clipped_row_sums, sorted_trained


class CopiesGradients:
    """Per-example gradients by one pass over N copies of the trained tensors, layers mapped by torch.func."""

    one_by_one = False

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss
        self._layers = _layers_of(model, self._trained)

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `fedlr.training.gradients.Gradients.clipped_sum`."""
        return clipped_row_sums(self.rows(batch), max_grad_norm=max_grad_norm)

    def rows(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the gradient of each example, (N, ...) a slot.

        Guarantees:
            Row i depends on example i alone where the model keeps examples apart. Private: only a clipped and noised
            sum of rows may leave.

        Raises:
            InputError: if a trained tensor does not reach the loss, a layer merges examples into one axis, or
                torch.func cannot follow a layer (a random one included).
        """
        if batch.num_examples == 0:
            return {slot: p.new_zeros(0, *p.shape) for slot, p in self._trained.items()}
        copies = {s: p.detach().expand(batch.num_examples, *p.shape).requires_grad_() for s, p in self._trained.items()}
        with self._reading(copies, num_examples=batch.num_examples):
            losses = losses_of(self._model, self._loss, batch)
        found = torch.autograd.grad(losses.sum(), list(copies.values()), allow_unused=True)
        rows = {slot: gradient for slot, gradient in zip(copies, found, strict=True) if gradient is not None}
        missing = [slot for slot in copies if slot not in rows]
        if missing:
            raise InputError(
                f"Expected every trained tensor to reach the loss, got {missing[0].path} left out; its gradient would "
                "silently be zero"
            )
        return rows

    def close(self) -> None:
        """Do nothing: layers are changed during a pass only."""

    @contextmanager
    def _reading(self, copies: Mapping[Slot, Tensor], *, num_examples: int) -> Iterator[None]:
        try:
            for call in self._layers:
                call.layer.forward = call.on_copies(copies, num_examples, one_by_one=self.one_by_one)
            yield
        finally:
            for call in self._layers:
                call.layer.__dict__.pop("forward", None)


class SplitGradients(CopiesGradients):
    """The same, with the layers called once an example: slower, and for every tuner."""

    one_by_one = True


class _Call(nn.Module):
    """A layer called without its hooks and without what stands in for its `forward`."""

    def __init__(self, layer: nn.Module, places: Mapping[Slot, list[str]]) -> None:
        super().__init__()
        self.layer = layer
        self.places = {slot: [f"layer.{name}" for name in names] for slot, names in places.items() if names}

    def forward(self, *given: Any, **words: Any) -> Any:
        return type(self.layer).forward(self.layer, *given, **words)

    def on_copies(self, copies: Mapping[Slot, Tensor], num_examples: int, *, one_by_one: bool) -> Any:
        """Return a forward pass in which row i of the input meets copy i of the tensors."""
        mine = {slot: copies[slot] for slot in self.places}

        def of_one(values: Mapping[Slot, Tensor], row: Tensor, others: Any, words: Any) -> Tensor:
            named = {name: values[slot] for slot, names in self.places.items() for name in names}
            output: Tensor = functional_call(self, named, (row.unsqueeze(0), *others), words, tie_weights=False)
            return output.squeeze(0)

        def forward(x: Tensor, *others: Any, **words: Any) -> Tensor:
            if len(x) != num_examples:
                raise InputError("Expected layers that keep examples apart, got one with them merged into one axis")
            if any(isinstance(value, Tensor) for value in (*others, *words.values())):
                raise InputError("Expected layers that read one tensor, got another beside it; use gradients by a loop")
            if one_by_one:
                parts = [{slot: copy[row] for slot, copy in mine.items()} for row in range(len(x))]
                return torch.stack([of_one(part, x[row], others, words) for row, part in enumerate(parts)])
            try:
                output: Tensor = vmap(lambda values, row: of_one(values, row, others, words))(mine, x)
            except (RuntimeError, NotImplementedError) as error:
                raise cannot_follow(error) from error
            return output

        return forward


def _layers_of(model: nn.Module, trained: Mapping[Slot, nn.Parameter]) -> list[_Call]:
    """Return the outermost tuner layers (they hold a `base_layer`), and modules with trained tensors beside them."""
    found: list[_Call] = []
    inside: set[int] = set()
    ids = {id(parameter) for parameter in trained.values()}
    for wanted in (_is_tuner_layer, _calls_itself):
        for module in model.modules():
            if id(module) in inside or not wanted(module, ids):
                continue
            found.append(_Call(module, places_of(module, trained)))
            inside |= {id(part) for part in module.modules()}
    reached = {slot for call in found for slot in call.places}
    left_out = [slot for slot in trained if slot not in reached]
    if left_out:
        raise InputError(f"Expected trained tensors in layers of their own, got {left_out[0].path} outside")
    return found


def _is_tuner_layer(module: nn.Module, ids: set[int]) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module) and any(id(p) in ids for p in module.parameters())


def _calls_itself(module: nn.Module, ids: set[int]) -> bool:
    """Say whether a module holds trained tensors and computes with them: a dictionary of parameters does not."""
    owns = any(id(parameter) in ids for parameter in module.parameters(recurse=False))
    return owns and not isinstance(module, (nn.ParameterDict, nn.ParameterList))
