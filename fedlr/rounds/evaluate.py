"""How good an adapter is on held-out rows that the server may see.

No score is noised: whoever runs with privacy declares, by naming rows to hold out, that the server may read these. All
that is said of them, label shares included, is theirs alone and says nothing of the rows that clients train on.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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
MOST_GROUPS = 64  # of held-out rows, beyond which they are scored together alone


@torch.no_grad()
def evaluate(model: nn.Module, data: Examples, *, task: Task, token_budget: int = 4096) -> Evaluation:
    """Score every example once, in micro-batches of similar length.

    Privacy: reads `data` in the clear and what it returns is not noised; call it on public or server-owned rows only.
    """
    was_training = model.training
    model.eval()
    device, budget = next(model.parameters()).device, token_budget
    answers = {
        name: [task.answers(model, data.batch(piece).to(device)) for piece in micro_batches(data.lengths, rows, budget)]
        for name, rows in _groups(data).items()
    }
    model.train(was_training)
    whole = task.evaluation([one for found in answers.values() for one in found])
    if len(answers) == 1:
        return whole
    more = task.of_groups({name: task.evaluation(found) for name, found in answers.items()})
    return replace(whole, measures={**whole.measures, **more})


def _groups(data: Examples) -> dict[str, Sequence[int] | np.ndarray]:
    """Return the rows of each group by its name; all together where there are none, or too many."""
    groups, names = getattr(data, "groups", None), getattr(data, "group_names", ())
    rows = {} if groups is None else {name: np.flatnonzero(groups == number) for number, name in enumerate(names)}
    found: dict[str, Sequence[int] | np.ndarray] = {name: mine for name, mine in rows.items() if len(mine)}
    return found if 1 < len(found) <= MOST_GROUPS else {"": range(len(data))}


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

    @torch.no_grad()
    def answers(self, state: ServerState, rows: Sequence[int] | np.ndarray) -> Any:
        """Return what the task tells of these held-out rows, in one micro-batch (`fedlr.tasks.task.Task.answers`)."""
        self._side.merge(state.adapter)
        write_adapter(self._model, state.adapter.tensors)
        self._model.eval()
        device = next(self._model.parameters()).device
        return self._task.answers(self._model, self._test.batch(rows).to(device))
