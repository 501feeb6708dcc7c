"""Per-example losses: one number an example, which no other example can change.

Why not the model's own `outputs.loss`: for language models it averages over all tokens of the *batch*, so the
length of one example rescales every gradient before clipping, and the clip bound no longer bounds anything
(reliability.md, finding 1: one example moved the clipped sum by 20 times the bound).

Weights of labels are part of the loss, so they act before the clip: one example moves a sum by at most C whatever its
weight. They are declared, never counted in the data, whose label counts are private.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.errors import InputError
from fedlr.tasks.batch import Batch

IGNORED_LABEL = -100  # the label that Hugging Face collators give to tokens that are not scored


class PerExampleLoss(Protocol):
    """Runs a model on N examples and returns one loss per example, shape (N,); what every engine differentiates."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the losses; entry i depends on example i of the batch alone."""
        ...


class LossOfLogits:
    """The loss of a model that has one row of logits per example.

    Args:
        of_logits: maps logits (N, K) and targets (N,) to losses (N,), each row by itself.
    """

    def __init__(self, of_logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._of_logits = of_logits

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the losses, (N,)."""
        return self._of_logits(model(**batch.inputs).logits, batch.targets)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each example's class.

    Args:
        logits: (N, num_classes).
        labels: (N,), class indices; an example labelled -100 has loss 0.

    Returns:
        (N,), in nats, float32 or wider.

    >>> import torch
    >>> [round(x, 4) for x in cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100])).tolist()]
    [1.3863, 0.0]
    """
    return F.cross_entropy(_widened(logits), labels, ignore_index=IGNORED_LABEL, reduction="none")


class LabelWeighted:
    """A loss of logits times the declared weight of the example's label; an example labelled -100 keeps loss 0.

    Guarantees:
        Entry i depends on row i alone, as that of the loss does. Public: the weights, of the configuration.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], weights: Sequence[float]) -> None:
        """Take the weight of each class, in the order of the label indices."""
        self._loss, self._weights = loss, torch.tensor(list(weights), dtype=torch.float64)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted losses, (N,)."""
        losses = self._loss(logits, labels)
        return losses * self._weights.to(losses)[labels.clamp(min=0)]


def weighted_cross_entropy(
    label_weights: Mapping[str, float] | None, label_names: Sequence[str]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the cross-entropy, times the weights of labels if there are any.

    Args:
        label_weights: by label, those of `data.label_weights`; a label that is not named has weight 1.
        label_names: of all classes, in the order of their indices.

    Raises:
        InputError: for a label that is none of the names.

    >>> import torch
    >>> loss = weighted_cross_entropy({"spam": 3.0}, ["ham", "spam"])
    >>> [round(x, 4) for x in loss(torch.zeros(2, 2), torch.tensor([0, 1])).tolist()]
    [0.6931, 2.0794]
    """
    if not label_weights:
        return cross_entropy
    if unknown := sorted(set(label_weights) - set(label_names)):
        raise InputError(
            f"Expected data.label_weights to name labels of the data, {', '.join(label_names[:20])}, got "
            f"{unknown[0]!r}; spell it as data.labels does (case counts)"
        )
    return LabelWeighted(cross_entropy, [label_weights.get(name, 1.0) for name in label_names])


def causal_lm(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sequence's next-token cross-entropy, averaged over its *own* scored tokens.

    Args:
        logits: (N, T, vocabulary). Position t predicts token t + 1.
        labels: (N, T), aligned with the inputs, not shifted; -100 marks tokens that are not scored.

    Returns:
        (N,), in nats a token, float32 or wider; 0 for a sequence without a scored token.

    >>> import torch
    >>> labels = torch.tensor([[0, 1, -100], [-100, -100, -100]])
    >>> [round(x, 4) for x in causal_lm(torch.zeros(2, 3, 4), labels).tolist()]
    [1.3863, 0.0]
    """
    targets = labels[:, 1:]
    token_losses = F.cross_entropy(
        _widened(logits[:, :-1]).transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    num_scored = (targets != IGNORED_LABEL).sum(dim=1)
    return token_losses.sum(dim=1) / num_scored.clamp(min=1)


class_losses = LossOfLogits(cross_entropy)
token_losses = LossOfLogits(causal_lm)


def losses_of(model: nn.Module, loss: PerExampleLoss, batch: Batch) -> Tensor:
    """Return one loss per example, (N,), after checking that it is one."""
    losses = loss(model, batch)
    if losses.shape != (batch.num_examples,):
        raise ValueError("Expected a loss of shape (N,), one entry an example, got another shape")
    return losses


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
