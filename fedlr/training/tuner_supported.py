"""What DP-SGD can train of another system than LoRA, checked on constant examples before any private one is read.

The probes of `fedlr.training.supported` that make sense of any adapter (module structure, dropout, batch statistics,
examples that do not interact, padding, float32), and one more: the system's own clipped sums of the probe against those
of a loop over single examples, at the start of the run.
"""

import math

import torch
from torch import Tensor, nn

from fedlr.adapters.state import HEAD, Block, Slot, roles_of
from fedlr.errors import InputError
from fedlr.models.peft_state import LAYOUT, train_only
from fedlr.models.zero_head import awake
from fedlr.tasks.probe import in_training
from fedlr.tasks.task import Task
from fedlr.training.copies import _layers_of
from fedlr.training.gradients import LoopGradients
from fedlr.training.supported import _check_modules, _check_trained, _probe, _trained_layers
from fedlr.training.tuner_gradients import engine

SAME_SUMS = 1e-3  # of the joint norm: far above the rounding of float32, far below one example that is missing


def check_tuner(model: nn.Module, block: Block, *, first: Block, grad_sample_mode: str, task: Task) -> None:
    """Check that per-example gradients of the blocks exist, are right, are of one example each, and not all zero.

    Args:
        model: what `fedlr.models.tuners.attach` made. Left with `block` trained; else as it was.
        block: what any round trains.
        first: what the first round trains: a block without a gradient there would make every client send its start.
        grad_sample_mode: `hooks`, by which a run means the system's own way, or `loop`.
        task: gives the constant examples and their losses.

    Raises:
        InputError: naming the first thing that is not supported, and what to change.
    """
    layout = getattr(model, LAYOUT)
    if grad_sample_mode == "ghost":
        raise InputError(
            f"Expected trainer.grad_sample_mode=hooks or loop for adapter.system={layout.system}, got ghost; it knows "
            "LoRA's layers only"
        )
    _check_modules(model)
    own, model = model, awake(model)  # behind a head of zeros no probe sees anything
    trained = train_only(model, block)
    for slot, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise InputError(f"Expected trained tensors in float32, got {parameter.dtype} at {slot.path}")
    layers: dict[str, nn.Module] = _trained_layers(model, roles_of(block) & {HEAD})
    if layers:
        _check_trained(layers)
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    names = {id(module): path for path, module in model.named_modules()}
    for call in _layers_of(model, trained):
        if not inside & {id(part) for part in call.layer.modules()}:
            layers[names[id(call.layer)]] = call.layer
    _probe(model, layers, "loop")
    for each in (first, block):
        _compare(model, each, must_move=each is first, task=task)
    train_only(own, block)


def _compare(model: nn.Module, block: Block, *, must_move: bool, task: Task) -> None:
    """Hold the system's clipped sums of the probe against those of a loop."""
    layout = getattr(model, LAYOUT)
    batch = task.probe(model)
    trained = train_only(model, block)
    with in_training(model):
        loop = LoopGradients(model, trained, loss=task.losses)
        norm = _norm(loop.clipped_sum(batch, max_grad_norm=math.inf))
        if norm == 0.0 and must_move:
            raise InputError(
                f"Expected a trained block with a gradient at the start, got {', '.join(sorted(roles_of(block)))}: "
                "another block of the system is zero there; train that one first"
            )
        bound = norm / 10 or 1.0  # so small that it clips
        expected = loop.clipped_sum(batch, max_grad_norm=bound)
        way = engine(layout.tuner, model, trained, loss=task.losses)
        try:
            found = way.clipped_sum(batch, max_grad_norm=bound)
        finally:
            way.close()
    if not _norm({slot: found[slot] - expected[slot] for slot in expected}) <= SAME_SUMS * bound:
        raise InputError(
            f"Expected the gradients of adapter.system={layout.system} to be those of single examples, got others; "
            "set trainer.grad_sample_mode=loop"
        )


def _norm(tensors: dict[Slot, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
