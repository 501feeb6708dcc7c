"""Texts, or pairs of texts, each with a number in a declared range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from fedlr.data.scored import ScoredText
from fedlr.data.table import LabelledText, Table
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch
from fedlr.tasks.evaluation import Evaluation, Metric, entropy
from fedlr.tasks.probe import in_training, probe_inputs
from fedlr.tasks.reading import check_reading, read_texts
from fedlr.tasks.task import Base, Task
from fedlr.tasks.tokenise import TokenisedText

PEARSON = Metric("pearson", higher_is_better=True, is_share=False)


@dataclass(frozen=True)
class TextRegression(Task):
    """The task `text_regression`: a score is predicted as its place in the declared range, a share in [0, 1].

    The model has one output z, its prediction is 1 / (1 + exp(-z)), and the loss of a share t is the cross-entropy
    -t log p - (1 - t) log(1 - p): fractional logistic regression (Papke and Wooldridge 1996). Unlike a squared distance
    its gradient by z, p - t, is at most 1 whatever a row says, and has the size of a classifier's, so clip, noise and
    automatic rates are those of a classification.
    """

    name: str = "text_regression"
    metric: Metric = PEARSON

    def output_names(self, table: Table) -> tuple[str, ...]:
        """Return the name of the one output."""
        return ("score",)

    def declared_outputs(self, data: Mapping[str, Any], label_names: Sequence[str]) -> tuple[str, ...]:
        """Return the name of the one output."""
        return ("score",)

    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """See `fedlr.tasks.task.Task.check`."""
        check_reading(base, max_length=max_length, has_pairs=_scored(table).pairs is not None)

    def encode(self, base: Base, table: Table, *, max_length: int) -> TokenisedText:
        """See `fedlr.tasks.task.Task.encode`; targets are shares of the range."""
        data = _scored(table)
        texts = LabelledText(data.texts, data.labels, (), data.groups, data.source, pairs=data.pairs)
        low, high = data.score_range
        shares = ((data.scores - low) / (high - low)).astype(np.float32)
        return replace(read_texts(texts, base, max_length=max_length), scores=shares)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example's share."""
        outputs: Tensor = cast(Any, model)(**batch.inputs).logits[:, 0]
        return F.binary_cross_entropy_with_logits(outputs.float(), batch.targets, reduction="none")

    def probe(self, model: nn.Module) -> Batch:
        """Return constant examples at the end of the range that the model is farther from: a loss with a gradient."""
        inputs = probe_inputs(model)
        with torch.no_grad(), in_training(model):
            outputs = cast(Any, model)(**inputs).logits[:, 0]
        return Batch(inputs, (outputs <= 0).float())

    def answers(self, model: nn.Module, batch: Batch) -> "Predictions":
        """Return what the model says of these examples."""
        outputs: Tensor = cast(Any, model)(**batch.inputs).logits[:, 0].float()
        losses = F.binary_cross_entropy_with_logits(outputs, batch.targets, reduction="none")
        return Predictions(*(x.double().cpu().numpy() for x in (outputs.sigmoid(), batch.targets, losses)))

    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return correlations and errors.

        `accuracy` is the share of rows that are predicted on their side of the middle of the range; a prediction that
        is the same for all rows has correlations of 0. Errors are shares of the range.
        """
        predicted = np.concatenate([one.predicted for one in found])
        target = np.concatenate([one.target for one in found])
        error, losses = predicted - target, np.concatenate([one.losses for one in found])
        return Evaluation(
            accuracy=float(((predicted > 0.5) == (target > 0.5)).mean()),
            loss=float(losses.mean()),
            measures={
                "pearson": correlation(predicted, target),
                "spearman": correlation(rankdata(predicted), rankdata(target)),
                "rmse": float(np.sqrt((error**2).mean())),
                "mae": float(np.abs(error).mean()),
                "loss_of_one_answer": float(entropy(target.mean())),
                "loss_error": float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0,
            },
        )


@dataclass(frozen=True)
class Predictions:
    """What a model says of a micro-batch, what is so, and how wrong it is: (N,) each; shares of the range, and nats."""

    predicted: np.ndarray
    target: np.ndarray
    losses: np.ndarray


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's correlation, 0 where either is constant.

    >>> round(correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
    1.0
    >>> correlation(np.ones(3), np.arange(3.0))
    0.0
    """
    centred, against = one - one.mean(), other - other.mean()
    length = float(np.linalg.norm(centred) * np.linalg.norm(against))
    smallest = 1e-9 * len(one) ** 0.5 * max(1e-300, float(np.abs(one).max()) * float(np.abs(against).max()))
    return float(centred @ against) / length if length > smallest else 0.0


def text_regression(
    *, label_names: tuple[str, ...], label_weights: Mapping[str, float] | None = None
) -> TextRegression:
    """Return the task of texts with a number each.

    Raises:
        InputError: for weights of labels, which there are not.
    """
    if label_weights:
        raise InputError(
            "Expected data.label_weights=null for task=text_regression, whose rows have no labels, got some"
        )
    return TextRegression()


def _scored(table: Table) -> ScoredText:
    if not isinstance(table, ScoredText):
        raise InputError(
            f"Expected texts with scores for task=text_regression, got {table.source}, a table of another kind; set "
            "data=scored_table data.score_range=[LOW,HIGH], or task=text_classification"
        )
    return table
