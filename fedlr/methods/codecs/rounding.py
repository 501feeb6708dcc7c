"""Codecs that send every number of a change in fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.methods.codecs.codec import Form, Place, part
from fedlr.streams import Purpose, stream

LEVELS = 127  # of int8, on each side of zero


@dataclass(frozen=True)
class Bfloat16:
    """Rounds each number to the nearest of bfloat16 (Kalamkar et al. 2019): 2 bytes, an error of at most 2**-8 of it.

    >>> slot = Slot("layer", "lora_B")
    >>> message = Bfloat16().encode({slot: torch.tensor([[1.00390625]])}, Place(0, 0, 0))
    >>> message[slot].item()
    1.0
    """

    def is_for_private(self) -> bool:
        """Return True."""
        return True

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return the same shapes in bfloat16."""
        return {slot: Form(tuple(tensor.shape), torch.bfloat16) for slot, tensor in like.items()}

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the change, rounded."""
        return {slot: tensor.to(torch.bfloat16) for slot, tensor in change.items()}

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the numbers as they were sent."""
        return {slot: message[slot].to(torch.float32) for slot in like}


@dataclass(frozen=True)
class Int8:
    """Rounds each number up or down to one of 255 multiples of its tensor's scale, by chance so that the mean is right.

    Stochastic rounding is that of QSGD (Alistarh et al. 2017, sec. 3.1) with 127 levels and the largest number of a
    tensor in place of its norm: E[decoded] is the change, each number is off by less than a scale, and the variance is
    at most a quarter of its square. The numbers that decide come from a public stream of (seed, client, round), so a
    message that is made again is the same, and clients' errors are independent.
    """

    def is_for_private(self) -> bool:
        """Return True."""
        return True

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return the same shapes in int8, and a scale for each tensor."""
        values = {slot: Form(tuple(tensor.shape), torch.int8) for slot, tensor in like.items()}
        return values | {part(slot, "scale"): Form((1,), torch.float32) for slot in like}

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the levels and scales; a change of zeros has scale zero."""
        draws = stream(place.seed, Purpose.CODEC, client=place.client, round_index=place.round_index)
        message: dict[Slot, Tensor] = {}
        for slot, tensor in sorted(change.items()):
            scale = (tensor.abs().max() if tensor.numel() else tensor.new_zeros(())) / LEVELS
            chance = torch.from_numpy(draws.random(tensor.numel())).reshape(tensor.shape)
            levels = torch.zeros_like(chance) if scale == 0 else tensor.double() / scale.double()
            message[slot] = (levels + chance).floor().clamp(-LEVELS, LEVELS).to(torch.int8)
            message[part(slot, "scale")] = scale.reshape(1).to(torch.float32)
        return message

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the levels times the scales."""
        return {slot: message[slot].to(torch.float32) * message[part(slot, "scale")] for slot in like}
