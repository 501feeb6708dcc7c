"""Clients of a rank of their own: what of an adapter's factors they have, and how a server sees what they send.

Legend: D out_features, K in_features, R rank of the adapter, r_k <= R of client k: its first r_k rows of lora_A and
columns of lora_B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, AdapterState, ClientUpdate, Slot

CLIENT_RANKS = "client_ranks"  # in a server's memory: of each client that it pruned, by Slot(client id, CLIENT_RANKS)


def ranks_now(adapter: AdapterState, cohort: Sequence[int], given: Sequence[int] | None) -> Mapping[int, int]:
    """Return the rank of each client of a cohort: what the server pruned it to, or else what it was given.

    Args:
        given: by client id; None: the adapter's for all.

    Returns:
        An empty mapping where all have the adapter's.
    """
    pruned = {int(slot.path): int(rank) for slot, rank in adapter.memory.get(CLIENT_RANKS, {}).items()}
    if given is None and not pruned:
        return {}
    most = max(len(layer.lora_A) for layer in adapter.factors().values())
    return {client: pruned.get(client, most if given is None else given[client]) for client in cohort}


def within(tensor: Tensor, slot: Slot, rank: int) -> Tensor:
    """Return the view of a LoRA factor that a client of this rank has; of a head, all of it."""
    if slot.role == HEAD:
        return tensor
    return tensor[:rank] if slot.role == LORA_A else tensor[:, :rank]


def beyond(tensor: Tensor, slot: Slot, rank: int) -> Tensor:
    """Return the view of a LoRA factor beyond a rank: rows of lora_A, columns of lora_B; of a head, nothing."""
    if slot.role == HEAD:
        return tensor[:0]
    return tensor[rank:] if slot.role == LORA_A else tensor[:, rank:]


def narrowed(tensors: Mapping[Slot, Tensor], rank: int | None) -> Mapping[Slot, Tensor]:
    """Return what a client of this rank has of the tensors; None: all."""
    return tensors if rank is None else {slot: within(tensor, slot, rank) for slot, tensor in tensors.items()}


def widened(update: ClientUpdate, like: Mapping[Slot, Tensor]) -> ClientUpdate:
    """Return an update with the shapes of `like`: zeros beyond the client's rank, so its products are the same."""
    wide = {slot: torch.zeros_like(like[slot], dtype=tensor.dtype) for slot, tensor in update.tensors.items()}
    for slot, tensor in update.tensors.items():
        wide[slot][tuple(slice(size) for size in tensor.shape)] = tensor
    return replace(update, tensors=wide)


def num_rows_and_columns(adapter: AdapterState) -> int:
    """Return D + K of all layers together: the numbers of one rank."""
    return sum(len(layer.lora_B) + layer.lora_A.shape[1] for layer in adapter.factors().values())
