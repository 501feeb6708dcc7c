"""The weighted mean of what the clients trained, and the ideal that every aggregate is measured against.

p_k = w_k / sum_j w_j over the updates that arrived. The weights w_k are the server's, never a client's word.
Legend: D out_features, K in_features, R rank, C clients.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlr.adapter import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot


def weighted_mean(adapter: AdapterState, updates: Sequence[ClientUpdate]) -> AdapterState:
    """Average every trained tensor: lora_A <- sum_k p_k A_k, lora_B <- sum_k p_k B_k, and the head alike.

    Exact (delta_W = sum_k p_k B_k A_k) when one factor was trained: FFA-LoRA (Sun et al. 2024, sec. 4,
    https://arxiv.org/abs/2403.12313) and FedSVD (Lee et al. 2025, sec. 3, https://arxiv.org/abs/2505.12805).
    Biased when both were: FedIT (Zhang et al. 2024, https://arxiv.org/abs/2305.05644) misses the weighted
    covariance sum_k p_k (B_k - B_mean)(A_k - A_mean).

    Guarantees: untrained tensors keep their value; sums are float64, results have the adapter's dtype; reads
    nothing but its arguments, so it is post-processing of what the clients released.

    Raises: ValueError without updates, or if the updates do not all hold the same tensors.

    >>> slot = Slot("layer", LORA_B)
    >>> adapter = AdapterState({Slot("layer", LORA_A): torch.ones(1, 2), slot: torch.zeros(1, 1)}, scale=1.0)
    >>> values = {0: torch.tensor([[0.0]]), 1: torch.tensor([[8.0]])}
    >>> updates = [ClientUpdate(k, {slot: values[k]}, weight=2 * k + 1, base_round=0) for k in values]
    >>> weighted_mean(adapter, updates).tensors[slot].item()
    6.0
    """
    weights = normalised_weights(updates)
    slots = set(updates[0].tensors)
    for update in updates:
        if set(update.tensors) != slots:
            raise ValueError(f"Expected the same tensors in every update, got others from {update.client_id}")
    means: dict[Slot, Tensor] = {}
    for slot in sorted(slots):
        mean = weighted_sum(weights, [update.tensors[slot] for update in updates])
        means[slot] = mean.to(adapter.tensors[slot].dtype)
    return adapter.with_tensors(means)


def normalised_weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """Return p_k = w_k / sum_j w_j in the order of the updates.

    Raises: ValueError without updates, or if the weights are not finite, non-negative and of a positive sum.

    >>> normalised_weights([ClientUpdate(k, {}, weight=w, base_round=0) for k, w in enumerate((1.0, 3.0))])
    [0.25, 0.75]
    """
    weights = [update.weight for update in updates]
    total = math.fsum(weights)
    if not (all(weight >= 0 for weight in weights) and 0 < total < math.inf):
        raise ValueError(f"Expected non-negative weights of a positive, finite sum, got {weights}")
    return [weight / total for weight in weights]


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return sum_k p_k T_k in float64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total


def client_factors(adapter: AdapterState, update: ClientUpdate, path: str) -> LoraFactors:
    """Return one layer of a client's model: the factors it trained, and the adapter's for the others."""
    slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
    lora_A = update.tensors.get(slot_A, adapter.tensors[slot_A])
    return LoraFactors(lora_A, update.tensors.get(slot_B, adapter.tensors[slot_B]))


def ideal_product(adapter: AdapterState, updates: Sequence[ClientUpdate], path: str) -> LoraFactors:
    """Return sum_k p_k B_k A_k of one layer as stacked float64 factors: lora_A (C*R, K), lora_B (D, C*R).

    The weight goes on one factor only: on both it would be squared. Where nobody trained lora_A the stack is
    one block, the mean lora_B over the shared lora_A.
    """
    weights = normalised_weights(updates)
    clients = [client_factors(adapter, update, path) for update in updates]
    if all(torch.equal(client.lora_A, clients[0].lora_A) for client in clients):
        mean_B = weighted_sum(weights, [client.lora_B for client in clients])
        return LoraFactors(clients[0].lora_A.double(), mean_B)
    columns = [weight * client.lora_B.double() for weight, client in zip(weights, clients, strict=True)]
    return LoraFactors(torch.cat([client.lora_A.double() for client in clients]), torch.cat(columns, dim=1))
