"""The ladder of per-example gradients: Opacus hooks, else torch.func, else single examples.

Each entry of the registry names its rung, the cheapest that is right for it. Nothing falls back by itself: a path that
does not fit raises, and `simulations.tuner_measure.measure` compares every engine of an entry's rung with a loop.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.models.tuners.entry import Path, Tuner
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss
from fedlr.training.copies import CopiesGradients, SplitGradients
from fedlr.training.functorch import FunctorchGradients, hook_rows, loop_rows
from fedlr.training.gradients import Gradients, HookGradients, LoopGradients

Trained = Mapping[Slot, nn.Parameter]


class Engine(Protocol):
    """Makes a source of clipped sums; what `fedlr.training.local` takes."""

    def __call__(self, model: nn.Module, trained: Trained, *, loss: PerExampleLoss) -> Gradients:
        """See `fedlr.training.gradients`."""
        ...


# The first is what trains. vmap has two: copies run inside any model, vmap(grad) over whole examples does not need
# them to keep apart; where both run they are the same. copies is for layers that torch.func cannot follow.
ENGINES: Mapping[Path, tuple[Engine, ...]] = {
    "hooks": (HookGradients,),
    "vmap": (CopiesGradients, FunctorchGradients),
    "copies": (SplitGradients, LoopGradients),
    "loop": (LoopGradients,),
}


def engine(tuner: Tuner, model: nn.Module, trained: Trained, *, loss: PerExampleLoss) -> Gradients:
    """Return where clipped sums of a tuner's gradients come from; see `fedlr.training.gradients.Gradients`."""
    return ENGINES[tuner.path][0](model, trained, loss=loss)


def rows(
    tuner: Tuner,
    model: nn.Module,
    trained: Trained,
    batch: Batch,
    *,
    loss: PerExampleLoss,
) -> list[dict[Slot, Tensor]]:
    """Return the gradient of each example, (N, ...) a slot, by each engine of the tuner's path; for checks only."""
    if tuner.path == "hooks":
        return [hook_rows(model, trained, batch, loss=loss)]
    if tuner.path == "loop":
        return [loop_rows(model, trained, batch, loss=loss)]
    kinds = (CopiesGradients, FunctorchGradients) if tuner.path == "vmap" else (SplitGradients,)
    return [kind(model, trained, loss=loss).rows(batch) for kind in kinds]
