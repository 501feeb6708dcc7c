"""Pictures, each of one class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.data.images import LabelledImages
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.tasks.batch import Batch
from fedlr.tasks.evaluation import ACCURACY, Evaluation, Metric
from fedlr.tasks.losses import LossOfLogits, PerExampleLoss, weighted_cross_entropy
from fedlr.tasks.pictures import EncodedImages, PictureProcessor, encode_images
from fedlr.tasks.probe import probe_inputs
from fedlr.tasks.task import Base, Task
from fedlr.tasks.text_classification import ClassAnswers, class_evaluation, class_probe


@dataclass(frozen=True)
class ImageClassification(Task):
    """The task `image_classification`.

    Args:
        label_names: of all classes, in the order of their indices.
        label_weights: by label, how much its examples' losses count (`data.label_weights`); None: all the same.

    Raises:
        InputError: for the weight of a label that is none of the names.
    """

    label_names: tuple[str, ...] = ()
    label_weights: Mapping[str, float] | None = None
    name: str = "image_classification"
    metric: Metric = ACCURACY

    def __post_init__(self) -> None:
        """Find wrong weights before any work."""
        _ = self._loss

    @cached_property
    def _loss(self) -> PerExampleLoss:
        return LossOfLogits(weighted_cross_entropy(self.label_weights, self.label_names))

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

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example's class, times the weight of its label."""
        return self._loss(model, batch)

    def probe(self, model: nn.Module) -> Batch:
        """Return constant examples, each with the class that the model finds least likely: a loss with a gradient."""
        return class_probe(model)

    def answers(self, model: nn.Module, batch: Batch) -> ClassAnswers:
        """Return what the model says of these examples."""
        logits: Tensor = model(**batch.inputs).logits
        return ClassAnswers.of(logits, batch.targets)

    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return accuracy, loss (without weights), and what else is told of the answers."""
        return class_evaluation(found)


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
