"""FedRot-LoRA: turn every client's factors towards the ones that were broadcast, then average.

(B R^T)(R A) = B A for every orthogonal R, so clients that learnt the same may return factors that do not match, and
averaging those is worse than it need be. All of it reads released updates only: post-processing, no privacy is spent.
Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean


@dataclass(frozen=True)
class FedRot:
    """Average R_k A_k and B_k R_k^T, with R_k orthogonal (R, R) and nearest to what was broadcast.

    Source: Zhang et al. 2026 (FedRot-LoRA), https://arxiv.org/abs/2602.23638, and the authors' code for details.
    In rounds 0, 2, ... R_k minimises ||R A_k - A||_F, in rounds 1, 3, ... ||B_k R^T - B||_F, where A and B are the
    broadcast factors: an orthogonal Procrustes problem, solved by the SVD of an R x R matrix. A broadcast lora_B of
    zero is no reference; A then serves (the authors skip round 0). `strength` is the paper's lambda: below 1,
    R_k becomes the orthogonal matrix nearest to (1 - strength) I + strength R_k; at 0 nothing turns (FedIT).

    Reflections: any orthogonal matrix keeps the product, so at strength 1 the best one is taken, det -1 included (as
    in the authors' hard variant). Below 1 it is the best with det +1 (as in their soft one): no path of orthogonal
    matrices leads from I to a reflection. Directions that the reference leaves open turn as little as possible.

    Biased: the factors of different clients still differ, and sum_k p_k B_k A_k has a higher rank than the adapter.
    Exact where the clients differ by a rotation alone, at strength 1. It need not beat FedIT on every cohort: what
    it makes smaller is the distance of one factor from the broadcast one, not the aggregation error itself.

    Guarantees: each client's product is unchanged, to float64 rounding; a layer of which one factor trains is
    averaged untouched (that mean is exact); one update is held at a time.

    Args:
        strength: lambda in [0, 1]; the paper's best are 0.4 to 0.6, the authors' code defaults to 1.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(f"Expected strength in [0, 1], got {self.strength}")

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the weighted mean of the turned updates."""
        reference, mean = adapter.factors(), RunningMean()
        for update in updates:
            mean.add(self._turned(reference, update))
        return adapter.with_rounded(mean.values())

    def _turned(self, reference: dict[str, LoraFactors], update: ClientUpdate) -> ClientUpdate:
        turned: dict[Slot, Tensor] = {}
        for path, layer in reference.items():
            slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
            if slot_A in update.tensors and slot_B in update.tensors:
                lora_A, lora_B = update.tensors[slot_A].double(), update.tensors[slot_B].double()
                rotation_RR = self._rotation(layer, lora_A, lora_B, by_B=update.base_round % 2 == 1)
                turned[slot_A], turned[slot_B] = rotation_RR @ lora_A, lora_B @ rotation_RR.T
        return replace(update, tensors={**update.tensors, **turned})

    def _rotation(self, layer: LoraFactors, lora_A: Tensor, lora_B: Tensor, *, by_B: bool) -> Tensor:
        # Both problems ask for the R that maximises <R, M>.
        if by_B and layer.lora_B.any():
            match_RR = layer.lora_B.double().T @ lora_B
        else:
            match_RR = layer.lora_A.double() @ lora_A.T
        if self.strength == 1:
            return _procrustes(match_RR, reflections=True)
        rotation_RR = _procrustes(match_RR, reflections=False)
        identity_RR = torch.eye(len(rotation_RR), dtype=rotation_RR.dtype)
        return _polar((1 - self.strength) * identity_RR + self.strength * rotation_RR)


def _procrustes(match_RR: Tensor, *, reflections: bool) -> Tensor:
    """Return the orthogonal R of the largest <R, M>, and of these the one nearest to the identity."""
    U_RR, S_R, Vh_RR = torch.linalg.svd(match_RR)
    # <R, M> says nothing about the directions of zero singular values; there, R is completed to stay near I.
    rank = int((S_R > S_R[0] * len(S_R) * torch.finfo(S_R.dtype).eps).sum())
    if rank < len(S_R):
        open_U, open_Vh = U_RR[:, rank:], Vh_RR[rank:]
        U_RR = torch.cat([U_RR[:, :rank], open_U @ _polar(open_U.T @ open_Vh.T)], dim=1)
    rotation: Tensor = U_RR @ Vh_RR
    if not reflections and torch.linalg.det(rotation) < 0:
        # The direction that matters least, the last one, pays for the determinant.
        rotation = rotation - 2 * torch.outer(U_RR[:, -1], Vh_RR[-1])
    return rotation


def _polar(matrix: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix."""
    U, _, Vh = torch.linalg.svd(matrix)
    nearest: Tensor = U @ Vh
    return nearest
