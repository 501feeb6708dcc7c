"""How good an adapter is on held-out text that the server may see.

No score is noised: whoever runs with privacy declares, by naming rows to hold out, that the server may read these. All
that is said of them, label shares included, is theirs alone and says nothing of the rows that clients train on.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import write_adapter
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import ServerState
from fedlr.rounds.scores import MOST_CLASSES, Scores, mean_scores, scores
from fedlr.tasks.losses import cross_entropy
from fedlr.tasks.tokenise import TokenisedText, collate, micro_batches
from fedlr.training.first_token import first_token_only
from fedlr.training.threads import torch_threads

# Of clients with a model of their own, so many are scored, the first ones: each costs a pass over the held-out texts.
MOST_SCORED = 16


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy in [0, 1] over all examples, and what else is told of the answers."""

    accuracy: float
    loss: float
    scores: Scores | None = None


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenisedText, *, token_budget: int = 4096) -> Evaluation:
    """Score every example once, in micro-batches of similar length.

    Privacy: reads `data` in the clear and what it returns is not noised; call it on public or server-owned text only.
    """
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    answers: list[Answers] = []
    num_examples = len(data.labels)
    device = next(model.parameters()).device
    for indices in micro_batches(data.lengths, range(num_examples), token_budget=token_budget):
        inputs, labels = collate(data, indices)
        inputs, labels = {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)
        logits = model(**inputs).logits
        correct += int((logits.argmax(dim=-1) == labels).sum())
        loss += float(cross_entropy(logits, labels).double().sum())
        answers.append(Answers.of(logits, labels))
    model.train(was_training)
    return Evaluation(accuracy=correct / num_examples, loss=loss / num_examples, scores=scored(answers))


@dataclass(frozen=True)
class Answers:
    """What a model says of a micro-batch: arrays over its examples; `shares` only of few enough classes."""

    labels: np.ndarray
    named: np.ndarray
    confidences: np.ndarray
    shares: np.ndarray | None
    num_classes: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Answers":
        """Return the answers of logits (N, num_classes)."""
        shares = logits.double().softmax(dim=-1).cpu().numpy()
        named = logits.argmax(dim=-1).cpu().numpy()
        confidences = shares[np.arange(len(named)), named]
        num_classes = logits.shape[-1]
        return cls(
            labels.cpu().numpy(), named, confidences, shares if num_classes <= MOST_CLASSES else None, num_classes
        )


def scored(found: Sequence[Answers]) -> Scores:
    """Score the answers of all micro-batches together."""
    shares = [one.shares for one in found if one.shares is not None]
    return scores(
        np.concatenate([one.labels for one in found]),
        np.concatenate([one.named for one in found]),
        np.concatenate([one.confidences for one in found]),
        np.concatenate(shares) if shares else None,
        num_classes=found[0].num_classes,
    )


def mean_evaluation(found: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over several models.

    >>> mean_evaluation([Evaluation(0.5, 1.0), Evaluation(1.0, 0.0)])
    Evaluation(accuracy=0.75, loss=0.5, scores=None)
    """
    told = [one.scores for one in found if one.scores is not None]
    return Evaluation(
        fmean(one.accuracy for one in found),
        fmean(one.loss for one in found),
        mean_scores(told) if len(told) == len(found) else None,
    )


class Evaluator:
    """Scores states on the held-out texts, with all threads and a model of its own."""

    def __init__(self, working: nn.Module, test: TokenisedText, *, side: SideWeights, num_threads: int) -> None:
        self._model = first_token_only(sharing_base(working))
        self._test, self._side, self._num_threads = test, side, num_threads

    def score(self, state: ServerState, *, personal: Sequence[Mapping[Slot, Tensor]] = ()) -> tuple[Evaluation, float]:
        """Return how good the state's adapter is, and the seconds it took to know.

        With `personal` tensors it is the mean over the clients that keep them: there is no one model.
        """
        started = time.perf_counter()
        self._side.merge(state.adapter)
        found = []
        for own in personal or ({},):
            write_adapter(self._model, {**state.adapter.tensors, **own})
            with torch_threads(self._num_threads):
                found.append(evaluate(self._model, self._test))
        return mean_evaluation(found), time.perf_counter() - started
