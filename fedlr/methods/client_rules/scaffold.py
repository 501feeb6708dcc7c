"""SCAFFOLD: control variates against the drift of clients whose data differ.

Source: Karimireddy et al. 2020, algorithm 1, option II, https://arxiv.org/abs/1910.06378, with a global step size of 1.
Client k starts from x, takes num_steps steps of SGD with gradient + c - c_k and ends at y_k; then
    c_k <- c_k - c + (x - y_k) / (num_steps * lr),     c <- c + |S| / N * mean_S (c_k after - c_k before).
The new c_k is the mean of the noised gradients of client k's round.

Notable choices:
- Nothing is uploaded but y_k: the server works out c_k after - c_k before = (x - y_k) / (num_steps * lr) - c. The paper
  sends it, twice the bytes. Its option I would need another pass over the private rows, and noise for that.
- Only what the server sent a control for is corrected: the first round and personal tensors are plain.
- The formulas are those of SGD without momentum and weight decay, over num_steps steps, on tensors of one rank.
  Others are refused where they can be seen.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.methods.client_rules.rule import CONTROL, ClientRule, LocalPoint

SGD = ("torch.optim.SGD", "torch.optim.sgd.SGD")


@dataclass(frozen=True)
class ScaffoldClient(ClientRule):
    """Step with gradient + c - c_k, and keep c_k for the next round.

    Args:
        lr: of the local optimizer.
        optimizer, momentum, weight_decay: its `_target_` and options, to be refused unless it is plain SGD.

    Privacy: c_k is a function of the client's own noised gradients and of what was broadcast.

    Guarantees: without a control the gradient is unchanged. If every client takes part, the corrections of a cohort add
    up to zero: what one step is moved by, the others make up for.

    Raises: InputError for a learning rate that is not positive, and for another optimizer than plain SGD.
    """

    lr: float
    optimizer: str
    momentum: float = 0.0
    weight_decay: float = 0.0
    remembers = True

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_sgd("SCAFFOLD", self.optimizer, momentum=self.momentum, weight_decay=self.weight_decay)

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the gradient plus c - c_k, (C, ...) a slot."""
        return {slot: _corrected(value, slot, point) for slot, value in gradient.items()}

    def remember(self, point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the new c_k of every trained tensor, (C, ...) a slot."""
        moved = {slot: point.start[slot] - value for slot, value in point.values.items()}
        means = {slot: value / (point.num_steps * self.lr) for slot, value in moved.items()}
        return {slot: value - _corrected(torch.zeros_like(value), slot, point) for slot, value in means.items()}


@dataclass(frozen=True)
class ScaffoldServer:
    """Average what the clients trained, and keep c in `adapter.memory["control"]`.

    Where both factors train their means are biased, as FedIT's are (`methods.aggregate.mean`); of one factor it is
    exact.

    Args:
        lr, num_steps: of the clients' local training.
        num_clients: N, all clients that may ever take part.

    Guarantees: c is the mean of c_k over all N clients as long as every client that trained is also aggregated. One
    whose update is lost keeps a c_k that c never counts, and the difference, 1/N of it, stays. Reads released tensors
    only; each update is read once and let go.

    Raises: InputError for arguments that are not positive, or for weights that differ: c counts clients alike.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)

    lr: float
    num_steps: int
    num_clients: int

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, num_steps=self.num_steps, num_clients=self.num_clients)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the mean of the updates, which remembers the new control of what they hold."""
        running, weights, num_updates = RunningMean(), set(), 0
        for update in updates:
            running.add(update)
            weights.add(update.weight)
            num_updates += 1
            if len(weights) > 1:
                raise InputError(f"Expected weighting=uniform for SCAFFOLD, got weights {sorted(weights)}")
        if num_updates > self.num_clients:
            raise ValueError(f"Expected at most num_clients={self.num_clients} updates, got {num_updates}")
        mean, share = running.values(), num_updates / self.num_clients
        before = adapter.memory.get(CONTROL, {})
        control = dict(before)
        for slot, value in mean.items():
            start = adapter.tensors[slot].double()
            old = before[slot].double() if slot in before else torch.zeros_like(start)
            change = (start - value) / (self.num_steps * self.lr) - old
            # No coarser than float32: a sum of many small changes would stand still in bfloat16.
            control[slot] = (old + share * change).to(torch.promote_types(adapter.tensors[slot].dtype, torch.float32))
        new = adapter.with_rounded(mean)
        return new.remembering(CONTROL, control)


def check_positive(**values: float) -> None:
    """Refuse arguments that are not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"Expected {name} to be positive and finite, got {value}")


def check_sgd(rule: str, optimizer: str, **absent: float) -> None:
    """Refuse another optimizer than torch's SGD, and options of it that should be zero.

    >>> check_sgd("SCAFFOLD", "torch.optim.SGD", momentum=0.0)
    >>> check_sgd("LoRA+", "AdamW")
    Traceback (most recent call last):
    ...
    fedlr.errors.InputError: Expected trainer.optimizer to be torch.optim.SGD for LoRA+, got AdamW; set trainer=sgd
    """
    if optimizer not in SGD:
        raise InputError(f"Expected trainer.optimizer to be {SGD[0]} for {rule}, got {optimizer}; set trainer=sgd")
    for name, value in absent.items():
        if value != 0:
            raise InputError(f"Expected trainer.optimizer.{name}=0 for {rule}, got {value}")


def _corrected(value: Tensor, slot: Slot, point: LocalPoint) -> Tensor:
    """Return value + c - c_k; where the server sent no control, the value."""
    if slot not in point.control:
        return value
    with_c = value + point.control[slot].to(value)
    return with_c - point.memory[slot] if slot in point.memory else with_c
