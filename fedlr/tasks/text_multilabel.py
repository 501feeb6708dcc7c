"""Texts, or pairs of texts, each with any of several labels, or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.data.multilabel import MultiLabelText, declared_labels
from fedlr.data.table import LabelledText, Table
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch
from fedlr.tasks.evaluation import MICRO_F1, Evaluation, Metric, entropy
from fedlr.tasks.probe import in_training, probe_inputs
from fedlr.tasks.reading import check_reading, read_texts
from fedlr.tasks.task import Base, Task
from fedlr.tasks.tokenise import TokenisedText


@dataclass(frozen=True)
class TextMultilabel(Task):
    """The task `text_multilabel`: a yes or no for each label, each with a logistic output of its own.

    The model has one output z_k per label, its probability is 1 / (1 + exp(-z_k)), and the loss of a row is the sum
    over the labels of their cross-entropies: the negative log-likelihood of labels that are independent given the text
    (binary relevance; Tsoumakas and Katakis 2007, section 2). One row is one example of privacy, however many labels
    it has: its gradient is clipped once, over all labels.
    """

    name: str = "text_multilabel"
    metric: Metric = MICRO_F1

    def output_names(self, table: Table) -> tuple[str, ...]:
        """Return the names of the labels."""
        return _rows(table).output_names

    def declared_outputs(self, data: Mapping[str, Any], label_names: Sequence[str]) -> tuple[str, ...]:
        """Return the labels that `data.labels` names."""
        return declared_labels(data.get("labels"))

    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """See `fedlr.tasks.task.Task.check`."""
        check_reading(base, max_length=max_length, has_pairs=_rows(table).pairs is not None)

    def encode(self, base: Base, table: Table, *, max_length: int) -> TokenisedText:
        """See `fedlr.tasks.task.Task.encode`; targets are (N, K), 1 where a row has a label, else 0."""
        data = _rows(table)
        texts = LabelledText(data.texts, data.labels, (), data.groups, data.source, pairs=data.pairs)
        return replace(read_texts(texts, base, max_length=max_length), scores=data.has_label)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example, summed over its labels."""
        return _losses(cast(Any, model)(**batch.inputs).logits, batch.targets)

    def probe(self, model: nn.Module) -> Batch:
        """Return constant examples that have the labels which the model finds unlikely: a loss with a gradient."""
        inputs = probe_inputs(model)
        with torch.no_grad(), in_training(model):
            outputs = cast(Any, model)(**inputs).logits
        return Batch(inputs, (outputs <= 0).float())

    def answers(self, model: nn.Module, batch: Batch) -> "LabelAnswers":
        """Return what the model says of these examples."""
        outputs: Tensor = cast(Any, model)(**batch.inputs).logits
        losses = _losses(outputs, batch.targets).double().cpu().numpy()
        return LabelAnswers((outputs > 0).cpu().numpy(), batch.targets.cpu().numpy() > 0.5, losses)

    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return how good the answers are; a label is answered from a probability of one half.

        `accuracy` is the share of rows whose labels are all answered right, none more and none less (exact match).
        `micro_f1` is F1 over all pairs of row and label, `macro_f1` the mean over the labels that occur or are
        answered, and both are 0 where nothing is right; `hamming_loss` is the share of wrong pairs.
        """
        answered = np.concatenate([one.answered for one in found])
        true = np.concatenate([one.true for one in found])
        losses = np.concatenate([one.losses for one in found])
        hits, named, held = ((x.sum(axis=0)) for x in (answered & true, answered, true))
        counted = named + held > 0
        each = 2 * hits[counted] / (named + held)[counted]
        exact = float((answered == true).all(axis=1).mean())
        return Evaluation(
            accuracy=exact,
            loss=float(losses.mean()),
            measures={
                "micro_f1": float(2 * hits.sum() / max(1, (named + held).sum())),
                "macro_f1": float(each.mean()) if len(each) else 0.0,
                "exact_match": exact,
                "hamming_loss": float((answered != true).mean()),
                "loss_of_one_answer": float(entropy(true.mean(axis=0)).sum()),
                "loss_error": float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0,
            },
        )


@dataclass(frozen=True)
class LabelAnswers:
    """What a model says of a micro-batch, what is so, (N, K) each, and how wrong it is, (N,) nats."""

    answered: np.ndarray
    true: np.ndarray
    losses: np.ndarray


def text_multilabel(
    *, label_names: tuple[str, ...], label_weights: Mapping[str, float] | None = None
) -> TextMultilabel:
    """Return the task of texts with any of several labels.

    Raises:
        InputError: for weights of labels.
    """
    if label_weights:
        raise InputError(
            "Expected data.label_weights=null for task=text_multilabel, whose labels all count alike, got some"
        )
    return TextMultilabel()


def _losses(outputs: Tensor, has_label: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.float(), has_label, reduction="none").sum(dim=1)


def _rows(table: Table) -> MultiLabelText:
    if not isinstance(table, MultiLabelText):
        raise InputError(
            f"Expected texts with any of several labels for task=text_multilabel, got {table.source}, a table of "
            "another kind; set data=multilabel_table 'data.labels=[NAME,NAME]', or task=text_classification"
        )
    return table
