"""How good an adapter is on held-out text that the server may see."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import write_adapter
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import ServerState
from fedlr.tasks.losses import cross_entropy
from fedlr.tasks.tokenise import TokenisedText, collate, micro_batches
from fedlr.training.first_token import first_token_only
from fedlr.training.threads import torch_threads

# Of clients with a model of their own, so many are scored, the first ones: each costs a pass over the held-out texts.
MOST_SCORED = 16


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
