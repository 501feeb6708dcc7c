"""A codec that sends a random projection of a change: few numbers, of which the change is guessed without bias.

Legend: M blocks of a tensor, D values of a block, K numbers that are left of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import in_range
from fedlr.methods.codecs.codec import Form, Place
from fedlr.streams import Purpose, stream

LARGEST_BLOCK = 512  # values: a projection costs D * K numbers, whatever a tensor's size


@dataclass(frozen=True)
class Projection:
    """Sends P x of every block x of a tensor's values; the server takes (D / K) P^T P x for x.

    The projection is drawn anew each round from the public seed, as in Flora (Hao, Cao and Mou 2024, algorithm 1), and
    is the same for all clients of the round: everything is linear, so the mean of what is decoded is what is decoded of
    the mean, exactly. Unlike Flora's Gaussian P, its K rows are orthonormal (those of a Gaussian matrix after QR): the
    expectation is still x, and the error of an update is sqrt(D / K - 1) of its length in place of sqrt((D + 1) / K).
    It is an error of the mean too: more clients do not make it smaller, more rounds do.

    Args:
        keep: share K / D of the numbers that is sent.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        in_range(0.001, 1, keep=self.keep)

    def is_for_private(self) -> bool:
        """Return True."""
        return True

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return (M, K) for each tensor."""
        sizes = {slot: block_sizes(tensor.numel()) for slot, tensor in like.items()}
        return {slot: Form((blocks, self._left(width)), torch.float32) for slot, (blocks, width) in sizes.items()}

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return P x of each block."""
        found = {}
        for slot, tensor in change.items():
            blocks, width = block_sizes(tensor.numel())
            padded = torch.zeros(blocks * width, dtype=torch.float64)
            padded[: tensor.numel()] = tensor.reshape(-1)
            found[slot] = (padded.reshape(blocks, width) @ self._rows(width, place).T).to(torch.float32)
        return found

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return (D / K) P^T of each block of the message."""
        found = {}
        for slot, tensor in like.items():
            _, width = block_sizes(tensor.numel())
            flat = message[slot].double() @ self._rows(width, place) * (width / max(1, self._left(width)))
            found[slot] = flat.reshape(-1)[: tensor.numel()].reshape(tensor.shape).to(torch.float32)
        return found

    def _left(self, width: int) -> int:
        return math.ceil(self.keep * width)

    def _rows(self, width: int, place: Place) -> Tensor:
        return orthonormal_rows(self._left(width), width, place.seed, place.round_index)


def block_sizes(num_values: int) -> tuple[int, int]:
    """Return how many blocks of how many values hold a tensor; the last may have room left.

    >>> block_sizes(385), block_sizes(3072), block_sizes(1025)
    ((1, 385), (6, 512), (3, 342))
    """
    blocks = max(1, math.ceil(num_values / LARGEST_BLOCK))
    return blocks, math.ceil(num_values / blocks)


@lru_cache(maxsize=8)
def orthonormal_rows(num_rows: int, width: int, seed: int, round_index: int) -> Tensor:
    """Return (num_rows, width) orthonormal rows in float64, uniform among all such: the same for one seed and round."""
    draws = stream(seed, Purpose.CODEC, client=width, round_index=round_index, step=num_rows)
    gaussian = torch.from_numpy(draws.standard_normal((width, num_rows)))
    rows: Tensor = torch.linalg.qr(gaussian).Q.T.contiguous()
    return rows
