"""One training step of a PEFT model as its users write it: without privacy, and with three modes of Opacus.

Opacus hooks the model as it is (`wrap_model=False`, its recommendation for Hugging Face models since 1.6) and its own
`DPOptimizer` clips, adds noise and steps. Only `lora_B` trains, the frozen rest is skipped by autograd in all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class PlainStep:
    """Forward, backward, optimizer: no privacy."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[Slot, nn.Parameter],
        *,
        loss: PerExampleLoss,
        optimizer: OptimizerFactory,
    ) -> None:
        self._model, self._trained, self._loss = model, trained, loss
        self._optimizer = optimizer(list(trained.values()))

    def step(self, batch: Batch) -> None:
        """Take one step on the summed loss."""
        self._optimizer.zero_grad()
        self._loss(self._model, batch).sum().backward()
        self._optimizer.step()

    def sums(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the gradient of the summed loss."""
        self._optimizer.zero_grad()
        self._loss(self._model, batch).sum().backward()
        found = {
            slot: parameter.grad.clone() for slot, parameter in self._trained.items() if parameter.grad is not None
        }
        self._optimizer.zero_grad()
        return found


class OpacusStep:
    """Per-example gradients by Opacus hooks, or by functorch where `functorch` is set."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[Slot, nn.Parameter],
        *,
        loss: PerExampleLoss,
        optimizer: OptimizerFactory,
        max_grad_norm: float,
        noise_multiplier: float,
        functorch: bool = False,
    ) -> None:
        self._model, self._trained, self._loss = model, trained, loss
        self._hooks: Any = GradSampleHooks(model, loss_reduction="sum", force_functorch=functorch)
        self._optimizer: Any = DPOptimizer(
            optimizer(list(trained.values())),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    def step(self, batch: Batch) -> None:
        """Take one private step."""
        self._optimizer.zero_grad()
        self._loss(self._model, batch).sum().backward()
        self._optimizer.step()

    def sums(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the sum of clipped gradients, before any noise."""
        self._optimizer.zero_grad()
        self._loss(self._model, batch).sum().backward()
        self._optimizer.clip_and_accumulate()
        found = {slot: parameter.summed_grad.clone() for slot, parameter in self._trained.items()}  # type: ignore[attr-defined]
        self._optimizer.zero_grad()
        return found


class OpacusGhostStep:
    """Fast gradient clipping of Opacus with ghost norms: two backward passes."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[Slot, nn.Parameter],
        *,
        loss: PerExampleLoss,
        optimizer: OptimizerFactory,
        max_grad_norm: float,
        noise_multiplier: float,
    ) -> None:
        self._model, self._trained, self._loss = model, trained, loss
        self._hooks: Any = GradSampleHooksFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=max_grad_norm, use_ghost_clipping=True
        )
        self._optimizer: Any = DPOptimizerFastGradientClipping(
            optimizer(list(trained.values())),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    def step(self, batch: Batch) -> None:
        """Take one private step."""
        self._backward(batch)
        self._optimizer.step()

    def sums(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the sum of clipped gradients, before any noise."""
        self._backward(batch)
        found = {
            slot: parameter.grad.clone() for slot, parameter in self._trained.items() if parameter.grad is not None
        }
        self._optimizer.zero_grad()
        return found

    def _backward(self, batch: Batch) -> None:
        self._optimizer.zero_grad()
        losses = self._loss(self._model, batch)
        DPTensorFastGradientClipping(self._hooks, self._optimizer, losses, "sum").backward()
