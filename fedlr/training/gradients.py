"""Sums of clipped per-example gradients: three ways that agree, and the plain sum for no privacy.

`HookGradients` and `GhostGradients` stand on Opacus 1.6, which hooks the layers of the model as it is (no
wrapper, so PEFT and Hugging Face see their own model). `LoopGradients` runs example by example and shares no
code with the others: it is what they are tested against.

Notable choices:
- Opacus gives per-example gradients or norms; clipping is here. With its own factors, min(1, C / nan), one
  bad row makes the whole sum nan.
- An example whose gradient is not finite counts as zero. That is a rule about one example, so the bound
  stands.
- Norms are taken in float64, of the very tensors that are summed.
- Nothing outlives a call: no `grad`, no `grad_sample`, no activations, also when the call raises. A step that
  was cut off leaves nothing for the next one to release.

Legend: N examples, P values of one tensor.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, losses_of
from fedlr.training.ghost import Float64GhostHooks

# True of every model whose first trained layer reads a frozen embedding, and harmless: Opacus uses the
# outputs only.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

# Columns that are widened to float64 at once: bounds the memory that a norm takes.
NORM_CHUNK = 2**16
# Above it a ghost weight C / norm leaves the normal float32 numbers and rounds too coarsely; the example
# counts as zero.
LARGEST_GHOST_NORM = 1e35


class Gradients(Protocol):
    """Where the clipped sum of a micro-batch comes from."""

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """Return sum_i g_i * min(1, C / ||g_i||_2), the norm being joint over all trained tensors.

        Args:
            batch: N examples.
            max_grad_norm: C > 0; infinity means no clipping.

        Returns:
            One float32 tensor a trained slot, sorted by slot.

        Guarantees:
            Unit: one example (row). Adding or removing one moves the result by at most C in joint L2 norm, up
            to float32 rounding, whatever the row holds: a gradient that is not finite counts as zero. The
            result itself is *not* private; only what `fedlr.training.local.privatise` makes of it is.
        """
        ...

    def close(self) -> None:
        """Remove every hook from the model."""
        ...


class HookGradients:
    """Per-example gradients by Opacus hooks: one backward pass, N copies of the trained tensors."""

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss
        self._layers = _trained_layers(model)
        self._hooks = GradSampleHooks(model, loss_reduction="sum")

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `Gradients.clipped_sum`."""
        with _no_trace(self._layers, self._trained):
            losses = losses_of(self._model, self._loss, batch)
            losses.sum().backward()
            samples = {s: _attribute(p, "grad_sample", batch.num_examples, s) for s, p in self._trained.items()}
            return clipped_row_sums(samples, max_grad_norm=max_grad_norm)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._hooks.cleanup()


class GhostGradients:
    """Opacus fast gradient clipping (Li et al. 2022): norms first, then the gradient of a weighted loss.

    Two backward passes, and no per-example gradient is ever stored. The weights are constants of the second
    pass. The bound holds up to the float32 rounding of that pass, because what is summed is not what was
    measured.
    """

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss
        self._layers = _trained_layers(model)
        self._hooks = Float64GhostHooks(model, loss_reduction="sum", use_ghost_clipping=True)

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `Gradients.clipped_sum`."""
        with _no_trace(self._layers, self._trained):
            losses = losses_of(self._model, self._loss, batch)
            losses.sum().backward(retain_graph=True)
            norms = torch.stack(
                [_attribute(p, "_norm_sample", batch.num_examples, s).double() for s, p in self._trained.items()]
            ).norm(dim=0)
            weights = clip_weights(norms, max_grad_norm=max_grad_norm).to(losses.dtype)
            usable = norms < LARGEST_GHOST_NORM
            if not usable.all():
                # 0 * nan is nan: the weight cannot silence such a row, so the second pass runs without it.
                weights, batch = weights[usable], batch.rows(usable)
            if len(weights) == 0:
                return {slot: torch.zeros_like(p, dtype=torch.float32) for slot, p in self._trained.items()}
            self._hooks.disable_hooks()
            try:
                if not usable.all():
                    losses = losses_of(self._model, self._loss, batch)
                return _gradients((weights * losses).sum(), self._trained)
            finally:
                self._hooks.enable_hooks()

    def close(self) -> None:
        """Remove every hook from the model."""
        self._hooks.cleanup()


class LoopGradients:
    """Example by example with plain autograd: slow, short, and the oracle of the other two."""

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """See `Gradients.clipped_sum`."""
        total = {slot: torch.zeros_like(p, dtype=torch.float64) for slot, p in self._trained.items()}
        for row in range(batch.num_examples):
            loss = losses_of(self._model, self._loss, batch.one(row)).sum()
            gradient = {slot: g.double() for slot, g in _gradients(loss, self._trained).items()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
            if math.isfinite(norm):
                for slot, g in gradient.items():
                    total[slot] += g * (min(1.0, max_grad_norm / norm) if norm > 0 else 1.0)
        return {slot: g.float() for slot, g in total.items()}

    def close(self) -> None:
        """Do nothing: there are no hooks."""


class SumGradients:
    """The plain gradient of the summed loss, for training without privacy: it refuses to clip."""

    def __init__(self, model: nn.Module, trained: Mapping[Slot, nn.Parameter], *, loss: PerExampleLoss) -> None:
        self._model, self._trained, self._loss = model, sorted_trained(model, trained), loss

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        """Return sum_i g_i. Nothing bounds it, so any `max_grad_norm` but infinity is an InputError."""
        if max_grad_norm != math.inf:
            raise InputError(
                f"Expected hooks, ghost or loop gradients for max_grad_norm={max_grad_norm}, got a plain "
                "sum; it clips nothing and no epsilon would hold"
            )
        return _gradients(losses_of(self._model, self._loss, batch).sum(), self._trained)

    def close(self) -> None:
        """Do nothing: there are no hooks."""


def clip_weights(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """Return min(1, C / norm) of each example, and 0 where the norm is not finite.

    >>> clip_weights(torch.tensor([0.0, 0.5, 4.0, math.nan, math.inf]), max_grad_norm=1.0).tolist()
    [1.0, 1.0, 0.25, 0.0, 0.0]
    """
    return (max_grad_norm / norms).clamp(max=1.0).where(norms.isfinite(), 0.0)


def clipped_row_sums(samples: Mapping[Slot, Tensor], *, max_grad_norm: float) -> dict[Slot, Tensor]:
    """Clip each example's gradient jointly over all slots and add them up; overwrites `samples`.

    Args:
        samples: per-example gradients, (N, ...) each.
        max_grad_norm: C.

    Returns:
        float32 tensors (...), whose joint norm is at most N * C.

    >>> samples = {Slot("a", "lora_B"): torch.tensor([[3e38], [0.5], [math.nan]])}
    >>> round(clipped_row_sums(samples, max_grad_norm=1.0)[Slot("a", "lora_B")].item(), 5)
    1.5
    """
    rows = {slot: sample.flatten(1).float() for slot, sample in samples.items()}
    norms = torch.stack([_row_norms(row) for row in rows.values()]).norm(dim=0)
    # The weight is applied as two square roots: at 1e38 it is itself too small for float32 to hold exactly.
    roots = clip_weights(norms, max_grad_norm=max_grad_norm).sqrt().float()[:, None]
    bad = ~norms.isfinite()
    sums = {}
    for slot, row in rows.items():
        row[bad] = 0.0  # 0 * nan is nan
        sums[slot] = row.mul_(roots).mul_(roots).sum(dim=0).reshape(samples[slot].shape[1:])
    return sums


def _row_norms(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row of (N, P) in float64: no float32 entry overflows it."""
    parts = [part.double().norm(dim=1) for part in torch.split(rows, NORM_CHUNK, dim=1)]
    norms: Tensor = torch.stack(parts).norm(dim=0)
    return norms


def _gradients(loss: Tensor, trained: Mapping[Slot, nn.Parameter]) -> dict[Slot, Tensor]:
    # Not backward(): p.grad stays untouched, so whoever hooks or writes it cannot reach the sum.
    return dict(zip(trained, (g.float() for g in torch.autograd.grad(loss, list(trained.values()))), strict=True))


def _attribute(parameter: nn.Parameter, name: str, num_examples: int, slot: Slot) -> Tensor:
    """Return what Opacus hung on a parameter; without N rows the model merges examples."""
    value = getattr(parameter, name, None)
    if not isinstance(value, Tensor) or len(value) != num_examples:
        # Says nothing of shapes: N is private.
        raise ValueError(
            f"Expected one gradient an example for {slot}, got none or another number; "
            "is the model in train mode, and did check_supported pass?"
        )
    return value


def sorted_trained(model: nn.Module, trained: Mapping[Slot, nn.Parameter]) -> dict[Slot, nn.Parameter]:
    """Return the trained tensors in the order of their slots; they must be all that the model trains."""
    wanted = {id(parameter) for parameter in trained.values()}
    if len(wanted) < len(trained):
        raise InputError(
            "Expected every trained tensor to have one slot, got tied tensors; an adapter cannot hold them"
        )
    if not trained or wanted != {id(p) for p in model.parameters() if p.requires_grad}:
        raise ValueError("Expected the model to train exactly the tensors that train_only returned; call it first")
    return {slot: trained[slot] for slot in sorted(trained)}


def _trained_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that Opacus hooks: those with trained tensors of their own."""
    return [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


@contextmanager
def _no_trace(layers: Sequence[nn.Module], trained: Mapping[Slot, nn.Parameter]) -> Iterator[None]:
    """Forget what passes through the model leave behind: on entry others' traces, on any exit ours."""
    _forget(layers, trained)
    try:
        yield
    finally:
        _forget(layers, trained)


def _forget(layers: Sequence[nn.Module], trained: Mapping[Slot, nn.Parameter]) -> None:
    for module in layers:
        module.__dict__.pop("activations", None)
        module.__dict__.pop("max_batch_len", None)
    for parameter in trained.values():
        parameter.grad = None
        for name in ("_current_grad_sample", "_norm_sample"):
            parameter.__dict__.pop(name, None)
        parameter.grad_sample, parameter._forward_counter = None, 0  # type: ignore[attr-defined]
