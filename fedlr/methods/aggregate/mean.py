"""The weighted mean of what the clients trained, taken while their updates stream by.

p_k = w_k / sum_j w_j over the updates that arrived. The weights w_k are the server's, never a client's word.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot


def weighted_mean(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """Average every trained tensor: lora_A <- sum_k p_k A_k, lora_B <- sum_k p_k B_k, and the head alike.

    Exact (delta_W = sum_k p_k B_k A_k) when one factor was trained: FFA-LoRA (Sun et al. 2024, sec. 4,
    https://arxiv.org/abs/2403.12313) and FedSVD (Lee et al. 2025, sec. 3, https://arxiv.org/abs/2505.12805).
    Biased when both were: FedIT (Zhang et al. 2024, https://arxiv.org/abs/2305.05644) misses the weighted
    covariance sum_k p_k (B_k - B_mean)(A_k - A_mean).

    Guarantees: each update is read once and let go, so memory does not grow with the cohort; untrained tensors
    keep their value; sums are float64, results have the adapter's dtype; reads nothing but its arguments, so it
    is post-processing of what the clients released.

    Raises: ValueError without updates, or if the updates do not all hold the same tensors.

    >>> from fedlr.adapters.state import LORA_A, LORA_B
    >>> slot = Slot("layer", LORA_B)
    >>> adapter = AdapterState({Slot("layer", LORA_A): torch.ones(1, 2), slot: torch.zeros(1, 1)}, scale=1.0)
    >>> values = {0: torch.tensor([[0.0]]), 1: torch.tensor([[8.0]])}
    >>> updates = [ClientUpdate(k, {slot: values[k]}, weight=2 * k + 1, base_round=0) for k in values]
    >>> weighted_mean(adapter, updates).tensors[slot].item()
    6.0
    """
    mean = RunningMean()
    for update in updates:
        mean.add(update)
    return adapter.with_rounded(mean.values())


class RunningMean:
    """The weighted mean of the updates added so far: sum_k w_k T_k and sum_k w_k, in float64."""

    def __init__(self) -> None:
        self._sums: dict[Slot, Tensor] = {}
        self._total = 0.0

    def add(self, update: ClientUpdate) -> None:
        """Take in one update.

        Raises: ValueError for a weight that is negative or not finite, or for other tensors than the first had.
        """
        if not 0 <= update.weight < math.inf:
            raise ValueError(f"Expected non-negative weights of a positive, finite sum, got {update.weight}")
        if not self._sums:
            self._sums = {s: torch.zeros_like(t, dtype=torch.float64) for s, t in sorted(update.tensors.items())}
        if update.tensors.keys() != self._sums.keys():
            raise ValueError(f"Expected the same tensors in every update, got others from {update.client_id}")
        for slot, total in self._sums.items():
            total.add_(update.tensors[slot], alpha=update.weight)  # torch makes both float64 before it multiplies
        self._total += update.weight

    def values(self) -> dict[Slot, Tensor]:
        """Return the means in float64, sorted by slot.

        Raises: ValueError if the weights have no positive, finite sum.
        """
        if not 0 < self._total < math.inf:
            raise ValueError(f"Expected non-negative weights of a positive, finite sum, got a sum of {self._total}")
        return {slot: total / self._total for slot, total in self._sums.items()}
