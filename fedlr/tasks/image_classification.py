"""Pictures, each of one class."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedlr.data.images import LabelledImages
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.tasks.classification import Classification
from fedlr.tasks.pictures import EncodedImages, PictureProcessor, encode_images
from fedlr.tasks.probe import probe_inputs
from fedlr.tasks.task import Base


@dataclass(frozen=True)
class ImageClassification(Classification):
    """The task `image_classification`; its arguments are those of `fedlr.tasks.classification.Classification`."""

    name: str = "image_classification"

    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """See `fedlr.tasks.task.Task.check`; pictures have no `max_length`."""
        encode_images(_images(table), _processor(base))
        try:
            with torch.no_grad():
                base.network(**probe_inputs(base.network))
        except Exception as error:  # whatever a foreign forward raises
            raise InputError(
                f"Expected model.name_or_path to name a model that reads pictures, got {base.source} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error

    def encode(self, base: Base, table: Table, *, max_length: int) -> EncodedImages:
        """See `fedlr.tasks.task.Task.encode`; pictures have no `max_length`."""
        return encode_images(_images(table), _processor(base))


def image_classification(
    *, label_names: tuple[str, ...], label_weights: Mapping[str, float] | None = None
) -> ImageClassification:
    """Return the task of pictures with one of these classes each; see `ImageClassification`."""
    return ImageClassification(label_names, label_weights)


def _images(table: Table) -> LabelledImages:
    if not isinstance(table, LabelledImages):
        raise InputError(
            f"Expected labelled pictures for task=image_classification, got {table.source}, a table of another kind; "
            "set data=images, or task"
        )
    return table


def _processor(base: Base) -> PictureProcessor:
    if not isinstance(base.tokenizer, PictureProcessor):
        raise InputError(
            f"Expected a model that reads pictures for task=image_classification, got {base.source}, which reads "
            "text; set model=pretrained_images, or task"
        )
    return base.tokenizer
