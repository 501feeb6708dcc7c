"""Per-example losses: one number an example, which no other example can change.

Why not the model's own `outputs.loss`: for language models it averages over all tokens of the *batch*, so the
length of one example rescales every gradient before clipping, and the clip bound no longer bounds anything
(reliability.md, finding 1: one example moved the clipped sum by 20 times the bound).
"""

from collections.abc import Mapping
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_LABEL = -100  # the label that Hugging Face collators give to tokens that are not scored


class PerExampleLoss(Protocol):
    """Maps the model's output and the labels to one loss an example, shape (N,)."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses; entry i depends on row i of `logits` and `labels` alone."""
        ...


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


def losses_of(model: nn.Module, loss: PerExampleLoss, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Run the model and return one loss an example, (N,)."""
    losses = loss(model(**inputs).logits, labels)
    if losses.shape != labels.shape[:1]:
        raise ValueError("Expected a loss of shape (N,), one entry an example, got another shape")
    return losses


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
