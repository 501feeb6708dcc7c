"""What all tasks have in common whose rows belong to one of several classes, whatever a row is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.tasks.batch import Batch
from fedlr.tasks.class_scores import MOST_CLASSES, Scores, scores
from fedlr.tasks.evaluation import ACCURACY, Evaluation, Metric
from fedlr.tasks.losses import LossOfLogits, PerExampleLoss, cross_entropy, weighted_cross_entropy
from fedlr.tasks.probe import in_training, probe_inputs
from fedlr.tasks.task import Task


@dataclass(frozen=True)
class Classification(Task):
    """A task of classes; what a row is, and how a model reads it, is for those below.

    Args:
        label_names: of all classes, in the order of their indices.
        label_weights: by label, how much its examples' losses count (`data.label_weights`); None: all the same.

    Raises:
        InputError: for the weight of a label that is none of the names.
    """

    label_names: tuple[str, ...] = ()
    label_weights: Mapping[str, float] | None = None
    metric: Metric = ACCURACY

    def __post_init__(self) -> None:
        """Find wrong weights before any work."""
        _ = self._loss

    @cached_property
    def _loss(self) -> PerExampleLoss:
        return LossOfLogits(weighted_cross_entropy(self.label_weights, self.label_names))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example's class, times the weight of its label."""
        return self._loss(model, batch)

    def probe(self, model: nn.Module) -> Batch:
        """Return constant examples, each with the class that the model finds least likely: a loss with a gradient."""
        inputs = probe_inputs(model)
        with torch.no_grad(), in_training(model):
            logits: Tensor = model(**inputs).logits
        return Batch(inputs, logits.argmin(dim=-1))

    def answers(self, model: nn.Module, batch: Batch) -> "ClassAnswers":
        """Return what the model says of these examples."""
        return ClassAnswers.of(model(**batch.inputs).logits, batch.targets)

    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return accuracy, loss (without weights), and what else is told of the answers."""
        labels = np.concatenate([one.labels for one in found])
        correct = sum(int((one.labels == one.named).sum()) for one in found)
        loss = sum(float(one.losses.sum()) for one in found)
        return Evaluation(accuracy=correct / len(labels), loss=loss / len(labels), scores=_scored(found, labels))


@dataclass(frozen=True)
class ClassAnswers:
    """What a model says of a micro-batch: arrays over its examples; `shares` only of few enough classes."""

    labels: np.ndarray
    named: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    shares: np.ndarray | None
    num_classes: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "ClassAnswers":
        """Return the answers of logits (N, num_classes)."""
        shares = logits.double().softmax(dim=-1).cpu().numpy()
        named = logits.argmax(dim=-1).cpu().numpy()
        num_classes = logits.shape[-1]
        return cls(
            labels.cpu().numpy(),
            named,
            cross_entropy(logits, labels).double().cpu().numpy(),
            shares[np.arange(len(named)), named],
            shares if num_classes <= MOST_CLASSES else None,
            num_classes,
        )


def _scored(found: Sequence[ClassAnswers], labels: np.ndarray) -> Scores:
    shares = [one.shares for one in found if one.shares is not None]
    return scores(
        labels,
        np.concatenate([one.named for one in found]),
        np.concatenate([one.confidences for one in found]),
        np.concatenate(shares) if shares else None,
        num_classes=found[0].num_classes,
    )
