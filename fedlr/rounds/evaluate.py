"""How good an adapter is on held-out rows that the server may see.

No score is noised: whoever runs with privacy declares, by naming rows to hold out, that the server may read these. All
that is said of them, label shares included, is theirs alone and says nothing of the rows that clients train on.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import write_adapter
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import ServerState
from fedlr.tasks.evaluation import Evaluation, mean_evaluation
from fedlr.tasks.examples import Examples, micro_batches
from fedlr.tasks.task import Task
from fedlr.training.first_token import first_token_only
from fedlr.training.threads import torch_threads

# Of clients with a model of their own, so many are scored, the first ones: each costs a pass over the held-out rows.
MOST_SCORED = 16


@torch.no_grad()
def evaluate(model: nn.Module, data: Examples, *, task: Task, token_budget: int = 4096) -> Evaluation:
    """Score every example once, in micro-batches of similar length.

    Privacy: reads `data` in the clear and what it returns is not noised; call it on public or server-owned rows only.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pieces = micro_batches(data.lengths, range(len(data)), token_budget=token_budget)
    answers = [task.answers(model, data.batch(rows).to(device)) for rows in pieces]
    model.train(was_training)
    return task.evaluation(answers)


class Evaluator:
    """Scores states on the held-out rows, with all threads and a model of its own."""

    def __init__(self, working: nn.Module, test: Examples, *, task: Task, side: SideWeights, num_threads: int) -> None:
        self._model = first_token_only(sharing_base(working))
        self._test, self._task, self._side, self._num_threads = test, task, side, num_threads

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
                found.append(evaluate(self._model, self._test, task=self._task))
        return mean_evaluation(found), time.perf_counter() - started
