"""HetLoRA's penalty on the last ranks of a client, so that those it does not need fade, and can be pruned.

Legend: C clients, D out_features, K in_features, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint, factor


@dataclass(frozen=True)
class TailPenalty(ClientRule):
    """Add the gradient of weight * sum over layers of ||B[:, tail]||_F ||A[tail]||_F.

    The tail of a client of rank r_k is what lies beyond its first floor(keep * r_k) ranks, as in
    `fedlr.methods.aggregate.pruning.SelfPruning`, which reads the same sum.

    Source: Cho et al. 2024 (HetLoRA), sec. 3, https://arxiv.org/abs/2401.06432.

    Privacy: a function of the factors, which are noised or were broadcast: no clipping and no noise for it.

    Guarantees: weight = 0 or keep = 1 leave the gradient as it is, and so does a tail of which either factor is zero,
    in that factor's gradient. No entry outside the tail changes.

    Raises: InputError for a weight that is negative or not finite, or a share outside (0, 1].
    """

    weight: float
    keep: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InputError(f"Expected weight to be finite and at least 0, got {self.weight}")
        if not 0 < self.keep <= 1:
            raise InputError(f"Expected keep in (0, 1], got {self.keep}")

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the gradient with the penalty's, (C, ...) a slot; that of a head as it is."""
        return {slot: value + self.weight * self._of(slot, value, point) for slot, value in gradient.items()}

    def _of(self, slot: Slot, value: Tensor, point: LocalPoint) -> Tensor:
        """Return ||other tail|| * own tail / ||own tail||, (C, ...); zero where there is none."""
        if slot.role not in (LORA_A, LORA_B):
            return torch.zeros_like(value)
        other = Slot(slot.path, LORA_A if slot.role == LORA_B else LORA_B)
        own_tail, other_tail = (self._tail(factor(point, one), one, value, point) for one in (slot, other))
        size_C11 = own_tail.norm(dim=(1, 2), keepdim=True)
        pull = other_tail.norm(dim=(1, 2), keepdim=True) * own_tail / size_C11
        return torch.where(size_C11 > 0, pull, 0.0)

    def _tail(self, values: Tensor, slot: Slot, like: Tensor, point: LocalPoint) -> Tensor:
        """Return a factor that is zero outside of each client's tail, (C, R, K) or (C, D, R)."""
        dim = -2 if slot.role == LORA_A else -1
        rank = values.shape[dim]
        ranks_C1 = torch.full((len(like), 1), rank) if point.ranks is None else point.ranks[:, None]
        first_C1 = (self.keep * ranks_C1.double()).floor()
        number_R = torch.arange(rank)
        tail_CR = ((number_R >= first_C1) & (number_R < ranks_C1)).to(values.device)
        tail: Tensor = values * (tail_CR[:, :, None] if slot.role == LORA_A else tail_CR[:, None, :])
        return tail
