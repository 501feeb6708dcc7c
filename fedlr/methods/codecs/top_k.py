"""A codec that sends the largest numbers of a change and where they are: for runs without privacy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError, in_range
from fedlr.methods.codecs.codec import Form, Place, part


@dataclass(frozen=True)
class TopK:
    """Sends of each tensor the largest numbers; the others are taken for zero (Aji and Heafield 2017).

    It is biased, and nothing of what is left out is remembered for a later round. Under noise of equal size everywhere
    the largest numbers are mostly noise, so that noise is kept and signal is cut: private runs are refused it.

    Args:
        keep: share of the numbers that is sent.
    """

    keep: float = 0.1

    def __post_init__(self) -> None:
        in_range(0.0001, 1, keep=self.keep)

    def is_for_private(self) -> bool:
        """Return False."""
        return False

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return as many numbers as are sent of each tensor, and as many places."""
        values = {slot: Form((self._left(tensor),), torch.float32) for slot, tensor in like.items()}
        return values | {
            part(slot, "places"): Form((self._left(tensor),), torch.int32) for slot, tensor in like.items()
        }

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return numbers and places in ascending order of places; of equal numbers the first counts."""
        message: dict[Slot, Tensor] = {}
        for slot, tensor in change.items():
            flat = tensor.reshape(-1)
            places = torch.sort(flat.abs(), descending=True, stable=True).indices[: self._left(tensor)].sort().values
            message[slot], message[part(slot, "places")] = flat[places].to(torch.float32), places.to(torch.int32)
        return message

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the numbers in their places.

        Raises:
            InputError: places that do not ascend within the tensor.
        """
        found = {}
        for slot, tensor in like.items():
            places = message[part(slot, "places")].long()
            if len(places) and not (places[0] >= 0 and places[-1] < tensor.numel() and bool((places.diff() > 0).all())):
                raise InputError(f"Expected ascending places within {slot.role} in a message, got others")
            found[slot] = torch.zeros(tensor.numel()).index_put((places,), message[slot]).reshape(tensor.shape)
        return found

    def _left(self, tensor: Tensor) -> int:
        return math.ceil(self.keep * tensor.numel())
