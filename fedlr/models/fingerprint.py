"""The SHA-256 of a model: two parties that name the same one compute with the same numbers."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn


def tensor_fingerprint(
    network: nn.Module, *, without: Sequence[str] = (), beside: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Return the SHA-256 of all parameters and buffers, by name: equal bases give equal adapters.

    `without` names modules, by their whole paths in the network, that are left out; `beside` are tensors that belong to
    the model and are no part of the network.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**network.state_dict(), **(beside or {})}.items()):
        if any(name.startswith(f"{module}.") for module in without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
