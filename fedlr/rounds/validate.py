"""The gate before aggregation: every update is checked here before any method sees it.

Rejecting means dropping that client and counting it, never ending the round (reliability.md R-S1).
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from fedlr.adapters.state import LARGEST_VALUE, ClientUpdate, Slot


def rejection(
    update: ClientUpdate,
    *,
    expected: Mapping[Slot, Tensor],
    round_index: int,
    asked: Container[int],
    seen: Container[int],
) -> str | None:
    """Return why an update cannot be used, or None.

    The reason is one of a closed set of words and carries no value of the client's.
    """
    if update.client_id not in asked:
        return "unknown_client"
    if update.client_id in seen:
        return "duplicate"
    if update.base_round != round_index:
        return "wrong_round"
    if not 0.0 < update.weight < float("inf"):
        return "bad_weight"
    if update.tensors.keys() != expected.keys():
        return "wrong_keys"
    for slot, tensor in update.tensors.items():
        if tensor.shape != expected[slot].shape:
            return "wrong_shape"
        if tensor.dtype != expected[slot].dtype:
            return "wrong_dtype"
        lowest, highest = torch.aminmax(tensor)  # one pass over the values; both are nan where any value is
        if not (float(lowest) >= -LARGEST_VALUE and float(highest) <= LARGEST_VALUE):
            return "too_large" if torch.isfinite(tensor).all() else "not_finite"
    return None
