"""A few examples as a model and a loss read them together."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """N examples: the first axis of every tensor.

    >>> batch = Batch({"input_ids": torch.tensor([[4, 5], [6, 7]])}, torch.tensor([0, 1]))
    >>> batch.num_examples, batch.one(1).targets.tolist()
    (2, [1])
    """

    inputs: Mapping[str, Tensor]  # what the model's forward takes
    targets: Tensor  # what the loss compares its output with

    @property
    def num_examples(self) -> int:
        """Return N."""
        return len(self.targets)

    def rows(self, chosen: Tensor | slice) -> "Batch":
        """Return some of the examples: row numbers, a mask (N,) or a slice."""
        return Batch({name: tensor[chosen] for name, tensor in self.inputs.items()}, self.targets[chosen])

    def one(self, row: int) -> "Batch":
        """Return a single example, as a batch of one."""
        return self.rows(slice(row, row + 1))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the examples on a device."""
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.targets.to(device))
