"""LA-LoRA: the factors in turn, step by step, and noised gradients smoothed by a fixed filter.

Legend: C clients, D out_features, K in_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, Block, Slot, roles_of
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint

KERNEL = tuple(weight / 16 for weight in (1, 4, 6, 4, 1))
AXIS = {LORA_A: 2, LORA_B: 1}  # of (C, R, K) and (C, D, R)


@dataclass(frozen=True)
class LocalAlternation(ClientRule):
    """Train lora_B in the first step of a round, lora_A in the second, and so on in turn; a head in every step.

    Source: Liu et al. 2026, LA-LoRA, https://arxiv.org/abs/2602.19926. The filter is [1, 4, 6, 4, 1] / 16, along
    in_features in lora_A and along out_features in lora_B, as the README of the authors' code says. At the ends, where
    a part of it would stick out, the rest is scaled to sum to one: that is ours, we found no word of theirs on it.

    Privacy: DP-SGD on what is active: the joint norm of its per-example gradients is clipped at a constant, and it
    alone is noised. The filter comes after the noise, so it is post-processing. The authors' DP script that we read is
    not DP-SGD: it clips the gradient of the batch, tensor by tensor, at a median taken from the data. It also applies
    the smoothed gradient on top of the raw one, and trains lora_A first, whose gradient is noise while lora_B is zero.

    Guarantees: one factor at a time, so no step has a product of two noises. A constant gradient passes the filter
    unchanged; away from the ends independent noise keeps sqrt(70) / 16 = 0.523 of its standard deviation. The signal
    of entries that are as unlike as the noise is shrunk as much: the features have no order, and the filter is no gain
    in itself. smooth = False leaves gradients alone.

    Raises: InputError, before a step, for a block without both factors.
    """

    smooth: bool = True
    alternates = True

    def active(self, step: int, block: Block) -> Block:
        """Return the block without the factor whose turn it is not."""
        if not {LORA_A, LORA_B} <= roles_of(block):
            found = ", ".join(sorted(roles_of(block)))
            raise InputError(f"Expected a round that trains {LORA_A} and {LORA_B} for LA-LoRA, got {found}")
        resting = LORA_A if step % 2 == 0 else LORA_B
        return frozenset(entry for entry in block if (entry.role if isinstance(entry, Slot) else entry) != resting)

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the gradient, the factors' smoothed, (C, ...) a slot."""
        if not self.smooth:
            return gradient
        return {slot: smoothed(v, AXIS[slot.role]) if slot.role in AXIS else v for slot, v in gradient.items()}


def smoothed(values: Tensor, axis: int) -> Tensor:
    """Return the averages of neighbours along an axis by `KERNEL`, the weights scaled to sum to one at the ends.

    >>> smoothed(torch.tensor([0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0]), axis=0).tolist()[1:-1]
    [1.0666667222976685, 4.0, 6.0, 4.0, 1.0666667222976685]
    """
    along = values.movedim(axis, -1)
    return (_filtered(along) / _filtered(along.new_ones(along.shape[-1]))).movedim(-1, axis)


def _filtered(values: Tensor) -> Tensor:
    padded, length = F.pad(values, (2, 2)), values.shape[-1]
    total = torch.zeros_like(values)
    for shift, weight in enumerate(KERNEL):
        total += weight * padded.narrow(-1, shift, length)
    return total
