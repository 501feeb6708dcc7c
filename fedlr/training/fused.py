"""Clipped per-example gradients of many clients in one forward and one backward pass, at the price of plain training.

The model is copied without its tensors; every adapted layer, and every linear layer of a head that trains, becomes one
of `fedlr.training.stacked`, which gives each row of a micro-batch its own client's adapter. Rows never meet: a row's
gradient is a function of that row and its client's tensors alone, so clipping, and everything after it, is each
client's own.

Notable choices:
- Norms are of the very tensors that are summed, in float64, joint over all that train. The gradients of a micro-batch
  are kept until the last of them is known; for lora_B they are rank / tokens the size of the activations.
- Where the batch of another client changes the rounding of a matrix product, it changes a client's sum in the last
  bits. In a simulation, where only that can happen, the noise is larger by ten orders.
- What is not served is refused by name, and trainer.engine=opacus serves it.

Legend: N examples, C clients of the cohort, P of them in a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlr.adapters.state import HEAD, Block, Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import adapted_layers, head_parts
from fedlr.models.products import is_linear
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, losses_of
from fedlr.training.first_token import first_token_only
from fedlr.training.gradients import LARGEST_GHOST_NORM, clip_weights, sorted_trained
from fedlr.training.stacked import Pass, PerExample, StackedLinear, StackedLora


@dataclass(frozen=True)
class ClippedSums:
    """Sums of clipped gradients of the clients that had rows in a micro-batch. Not private: no noise is in them."""

    clients: Tensor  # (P,), ascending: places in the cohort
    values: Tensor  # (P, all trained values), float32, slot after slot in their order

    def add_to(self, total: Tensor) -> None:
        """Add each client's sum to its row of `total` (C, all trained values)."""
        total.index_add_(0, self.clients, self.values)


class FusedGradients:
    """The fused engine; with one client it is a `Gradients` like the others.

    Args:
        model: a PEFT model that `check_supported` accepts. Not changed; its frozen tensors are used as they are at
            each call, its trained ones where there is one client.
        trained: what `train_only` returned.
        loss: one loss an example.

    Raises:
        InputError: naming what this engine does not serve.
    """

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._trained = sorted_trained(model, trained)
        check_fused(model, frozenset(slot.role for slot in trained))
        self._loss = loss
        self._shared = Pass()
        self._model = first_token_only(model)
        self._replace()
        self._model.train()

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `fedlr.training.gradients.Gradients`."""
        stacks = {slot: parameter.detach()[None] for slot, parameter in self._trained.items()}
        sums = self.clipped_sums(batch, owner=None, stacks=stacks, max_grad_norm=max_grad_norm)
        sizes = [parameter.numel() for parameter in self._trained.values()]
        parts = sums.values[0].split(sizes)
        return {slot: part.view_as(p) for (slot, p), part in zip(self._trained.items(), parts, strict=True)}

    def clipped_sums(
        self,
        batch: Batch,
        *,
        owner: Tensor | None,
        stacks: Mapping[Slot, Tensor],
        max_grad_norm: float,
        ranks: Tensor | None = None,
        active: frozenset[Slot] | None = None,
    ) -> ClippedSums:
        """Return sum_i g_i * min(1, C / ||g_i||_2) of each client over its own rows i.

        Args:
            batch: N rows, of any clients in any order.
            owner: (N,), the place in the cohort of the client that each row belongs to; None: all rows are client 0's.
                Best on the CPU: then nothing here waits for another device.
            stacks: of each trained slot every client's tensor, (C, ...) float32.
            max_grad_norm: C > 0; infinity means no clipping.
            ranks: (C,), the rank of each client, whose tensors are zero beyond it; None: all have the adapter's.
            active: what is clipped, jointly, and summed; None: all trained slots. The sums of the others are zero.

        Guarantees:
            Unit: one example (row). Adding or removing one moves the sum of its client by at most C in joint L2 norm,
            whatever the row holds: a gradient that is not finite counts as zero. It moves no other client's sum by
            more than rounding. The result is *not* private.
        """
        shared, device = self._shared, batch.targets.device
        clients = torch.zeros(1, dtype=torch.long)
        if owner is not None:
            clients, local = owner.unique(return_inverse=True)
            if len(clients) > 1:
                shared.places = [(local == i).nonzero().squeeze(1).to(device) for i in range(len(clients))]
                shared.owner = local.to(device)
        clients = clients.to(device)
        shared.values = {slot: stack.index_select(0, clients) for slot, stack in stacks.items()}
        shared.ranks = None if ranks is None else ranks[clients]
        try:
            losses = losses_of(self._model, self._loss, batch)
            torch.autograd.grad(losses.sum(), shared.anchor, allow_unused=True)
            return ClippedSums(clients, self._sums(max_grad_norm, len(clients), batch.num_examples, active))
        finally:
            shared.owner, shared.values, shared.ranks, shared.found = None, {}, None, {}
            shared.places = ()

    def close(self) -> None:
        """Do nothing: the model has no hooks."""

    @torch.no_grad()
    def _sums(self, max_grad_norm: float, num_clients: int, num_rows: int, active: frozenset[Slot] | None) -> Tensor:
        shared = self._shared
        summed = {slot: self._found(slot) for slot in self._trained if active is None or slot in active}
        found = list(summed.values())
        norms = torch.stack([gradients.squared_norms() for gradients in found]).sum(dim=0).sqrt()
        if len(norms) != num_rows:
            raise ValueError("Expected one gradient an example, got another number; did check_supported pass?")
        weights = clip_weights(norms, max_grad_norm=max_grad_norm).where(norms < LARGEST_GHOST_NORM, 0.0).float()
        if shared.owner is None:
            shares = weights[None]
        else:
            shares = weights.new_zeros(num_clients, len(weights))
            shares[shared.owner, torch.arange(len(weights), device=weights.device)] = weights
        sizes = {slot: parameter.numel() for slot, parameter in self._trained.items()}
        values = weights.new_empty(num_clients, sum(sizes.values()))
        for slot, part in zip(sizes, values.split(list(sizes.values()), dim=1), strict=True):
            if slot in summed:
                summed[slot].weighted_sums(shares, part)
            else:
                part.zero_()
        return values

    def _found(self, slot: Slot) -> PerExample:
        if slot not in self._shared.found:
            raise ValueError(f"Expected a gradient for {slot}, got none; did check_supported pass?")
        return self._shared.found[slot]

    def _replace(self) -> None:
        """Put a stacked layer wherever there is LoRA, and wherever a head trains."""
        trained = set(self._trained)
        for path, layer in adapted_layers(self._model).items():
            _put(self._model, path, StackedLora(layer, path, self._shared, trained))
        if any(slot.role == HEAD for slot in trained):
            for path, (place, part) in head_parts(self._model).items():
                _put(self._model, place, StackedLinear(cast(nn.Linear, part), path, self._shared))


def check_fused(model: nn.Module, block: Block) -> None:
    """Check that the fused engine serves a model on which `check_supported` found nothing.

    Raises:
        InputError: naming the first layer that it does not serve, and what does.
    """
    layers = {path: layer.base_layer for path, layer in adapted_layers(model).items()}
    # GPT-2's Conv1D is a linear layer that keeps its weight transposed.
    served = {path: layer for path, layer in layers.items() if isinstance(layer, Conv1D)}
    if HEAD in block:
        layers |= {path: part for path, (_, part) in head_parts(model).items()}
    for path, layer in layers.items():
        if not is_linear(layer) and path not in served:
            raise InputError(
                f"Expected trained linear layers for trainer.engine=fused, got {type(layer).__name__} at {path}; "
                "set trainer.engine=opacus"
            )


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
