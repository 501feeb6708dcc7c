"""A head that starts from zero: what it can hide, and how a probe looks past it.

Whatever such a model reads, its logits are zero. A comparison of logits then passes for any two models, so a probe
compares copies whose head is not zero. A run whose head never trains would learn nothing, and is refused.
"""

import copy
from typing import TypeVar

import torch
from torch import nn

from fedlr.errors import InputError
from fedlr.models.peft_state import head_parts

Model = TypeVar("Model", bound=nn.Module)


def zero_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a PEFT model's head whose weights are all zero, by the path of their slots."""
    parts = {path: part for path, (_, part) in head_parts(model).items() if isinstance(part, nn.Linear)}
    return {path: part for path, part in parts.items() if not part.weight.detach().any()}


def awake(model: Model) -> Model:
    """Return a model whose logits show what it reads: a copy with other weights in the head where they are zero.

    All other tensors are shared with the model, which is not changed; without such a head it is the model itself.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    asleep = zero_layers(model)
    for layer in asleep.values():
        # Rough numbers of both signs, of a size that keeps the variance of what enters.
        signs = torch.arange(layer.weight.numel(), device=layer.weight.device) * 7919 % 257 / 128 - 1
        weight = (signs * (3 / layer.in_features) ** 0.5).view_as(layer.weight).to(layer.weight)
        shared[id(layer.weight)] = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return copy.deepcopy(model, shared) if asleep else model


def check_head_trains(model: nn.Module, *, head_trains: bool) -> None:
    """Refuse a frozen head that is zero.

    Raises:
        InputError: which names the keys.
    """
    if zero_layers(model) and not head_trains:
        raise InputError(
            "Expected adapter.train_head=true with model.head_std=0, got false: a head of zeros that never trains "
            "gives every text the same score, and nothing below it a gradient; or set model.head_std=0.1, a random head"
        )
