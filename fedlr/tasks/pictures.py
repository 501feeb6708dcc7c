"""Pictures as a model reads them: bytes until a micro-batch is made, then numbers as the model's own processor says.

Nothing is copied or widened before: all clients read one array of bytes, which may be mapped from disk. Legend: N
examples, M pictures of the source, T states of a picture, H their size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlr.data.images import LabelledImages
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch

GREY = (0.299, 0.587, 0.114)  # of red, green and blue, as ITU-R 601 weighs them


@dataclass(frozen=True)
class PictureProcessor:
    """What a model reads of a picture: its size, and the mean and standard deviation that its pixels are scaled by.

    Args:
        height: in pixels.
        width: in pixels.
        mean: of each channel, of pixels in [0, 1]; one channel: grey.
        std: of each channel.
        num_patches: what a picture costs, in units of `trainer.token_budget`.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_patches: int

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise InputError(
                f"Expected mean and std > 0 of one channel or of three, got {self.mean} and {self.std}; look at "
                "preprocessor_config.json of the model"
            )

    def pixel_values(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Map (N, height, width, 3) to numbers (N, channels, height, width), float32.

        >>> white = np.full((1, 2, 2, 3), 255, dtype=np.uint8)
        >>> PictureProcessor(2, 2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1).pixel_values(white)[0, 0].tolist()
        [[2.0, 2.0], [2.0, 2.0]]
        """
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        if len(self.mean) == 1:
            values = (values * torch.tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)
        mean, std = (torch.tensor(numbers)[:, None, None] * 255 for numbers in (self.mean, self.std))
        return values.sub_(mean).div_(std).contiguous()

    def save_pretrained(self, folder: str) -> None:
        """Write preprocessor_config.json, as transformers reads it."""
        known = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True, "resample": 3}
        size = {"height": self.height, "width": self.width}
        told: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", **known, "size": size}
        told |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class EncodedImages:
    """Pictures as a model reads them; example i is `pixels[rows[i]]`."""

    pixels: NDArray[np.uint8]  # (M, height, width, 3)
    rows: NDArray[np.int64]  # (N,), in [0, M)
    labels: NDArray[np.int64]  # (N,)
    processor: PictureProcessor
    num_truncated: int = 0
    # (N, T, H): what frozen layers made of the pictures (fedlr.models.picture_prefix); uint16 holds bits of bfloat16
    hidden: NDArray[np.float32] | NDArray[np.uint16] | None = None
    reads_features: bool = False  # hidden is what the head reads, with T = 1

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the cost of each picture, shape (N,): they are of one size."""
        cost = self.processor.num_patches if self.hidden is None else self.hidden.shape[1]
        return np.full(len(self), cost, dtype=np.int64)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "EncodedImages":
        """Return the pictures at `indices`, in that order; no pixel is copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        hidden = None if self.hidden is None else self.hidden[chosen]
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen], hidden=hidden)

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return these pictures: `pixel_values` (N, channels, height, width) float32, or what frozen layers made of
        them, by the same name, (N, T, H); features of a head are `inputs_embeds` (N, 1, H)."""
        chosen = np.asarray(rows, dtype=np.int64)
        labels = torch.from_numpy(self.labels[chosen])
        if self.hidden is None:
            return Batch({"pixel_values": self.processor.pixel_values(self.pixels[self.rows[chosen]])}, labels)
        states = torch.from_numpy(self.hidden[chosen])
        states = states.view(torch.bfloat16) if states.dtype == torch.uint16 else states
        return Batch({"inputs_embeds" if self.reads_features else "pixel_values": states}, labels)


def encode_images(table: LabelledImages, processor: PictureProcessor) -> EncodedImages:
    """Return a table as a model reads it.

    Raises:
        InputError: for pictures of another size than the model's.
    """
    wanted = (processor.height, processor.width)
    if table.image_size != wanted:
        size = wanted[0] if wanted[0] == wanted[1] else list(wanted)
        raise InputError(
            f"Expected pictures of {wanted[0]} x {wanted[1]} pixels, which the model reads, got "
            f"{table.image_size[0]} x {table.image_size[1]}; set data.image_size={size}"
        )
    return EncodedImages(table.pixels, table.rows, table.labels, processor)
