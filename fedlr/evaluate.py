"""How good an adapter is on held-out text that the server may see."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from fedlr.data.tokenise import TokenisedText, collate, micro_batches
from fedlr.training.losses import cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy in [0, 1] over all examples."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenisedText, *, token_budget: int = 4096) -> Evaluation:
    """Score every example once, in micro-batches of similar length.

    Privacy: reads `data` in the clear and what it returns is not noised; call it on public or server-owned text only.
    """
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    num_examples = len(data.labels)
    device = next(model.parameters()).device
    for indices in micro_batches(data.lengths, range(num_examples), token_budget=token_budget):
        inputs, labels = collate(data, indices)
        inputs, labels = {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)
        logits = model(**inputs).logits
        correct += int((logits.argmax(dim=-1) == labels).sum())
        loss += float(cross_entropy(logits, labels).double().sum())
    model.train(was_training)
    return Evaluation(accuracy=correct / num_examples, loss=loss / num_examples)


def mean_evaluation(found: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over several models.

    >>> mean_evaluation([Evaluation(0.5, 1.0), Evaluation(1.0, 0.0)])
    Evaluation(accuracy=0.75, loss=0.5)
    """
    return Evaluation(fmean(one.accuracy for one in found), fmean(one.loss for one in found))
