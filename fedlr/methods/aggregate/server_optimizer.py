"""Server optimisers: the mean of the clients is a direction, and the server takes its own step along it.

The pseudo-gradient of a round is Delta = mean - what was broadcast, tensor by tensor. Momentum and second moments are
the adapter's memory, float64; they belong to the coordinates of the factors, so no finaliser may turn those
(`methods.method.keep`, and one factor trained). Delta is made of released updates: post-processing, no privacy is
spent.

Under DP the noise of the clients is part of Delta. Momentum averages it over rounds. A second moment grows with its
variance: where noise dominates, FedAdam and FedYogi take steps of nearly one length in every coordinate.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError, in_range
from fedlr.methods.aggregate.mean import weighted_mean

MOMENTUM, SECOND_MOMENT, NUM_STEPS = "momentum", "second_moment", "num_steps"

Mean = Callable[[AdapterState, Iterable[ClientUpdate]], AdapterState]


@dataclass(frozen=True)
class FedAvgM:
    """Server momentum: m <- momentum m + Delta, x <- x + lr m.

    Source: Hsu et al. 2019, sec. 3, https://arxiv.org/abs/1909.06335; in the form of Reddi et al. 2021, sec. 3,
    https://arxiv.org/abs/2003.00295. In the long run a steady Delta moves x by lr / (1 - momentum) times it.

    Biased on purpose: the step is not the mean of this round. momentum 0 and lr 1 is the inner rule: bit for bit in a
    float32 adapter, up to values 30 binary orders apart, and to rounding in a float64 one.

    Args:
        inner: the rule that makes the mean; a configuration always has `weighted_mean`.
    """

    lr: float = 1.0
    momentum: float = 0.9
    inner: Mean = weighted_mean

    def __post_init__(self) -> None:
        _check(self.lr, momentum=self.momentum)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter one server step on, with the momentum in its memory."""
        after, delta = _pseudo_gradient(self.inner, adapter, updates)
        momentum = {s: self.momentum * _memory(adapter, MOMENTUM, s, delta[s]) + delta[s] for s in delta}
        return _moved(adapter, after, {s: self.lr * momentum[s] for s in delta}, {MOMENTUM: momentum})


@dataclass(frozen=True)
class FedAdam:
    """Server Adam: m <- beta_1 m + (1 - beta_1) Delta, v <- beta_2 v + (1 - beta_2) Delta^2,
    x <- x + lr m / (sqrt(v) + tau).

    Source: Reddi et al. 2021, algorithm 2, https://arxiv.org/abs/2003.00295: v starts at tau^2, and nothing corrects
    the bias of the first rounds. With `bias_correction` it is Adam as Kingma and Ba 2015, algorithm 1, have it: v
    starts at 0, and m and v are divided by 1 - beta^t, t the steps of a tensor. Biased on purpose, as `FedAvgM`.

    Args:
        tau: what keeps the step finite; the larger, the less adaptive. lr = tau -> infinity without betas is the mean.
        inner: the rule that makes the mean; a configuration always has `weighted_mean`.
    """

    lr: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 0.001
    bias_correction: bool = False
    inner: Mean = weighted_mean

    def __post_init__(self) -> None:
        _check(self.lr, self.tau, beta_1=self.beta_1, beta_2=self.beta_2)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter one server step on, with both moments in its memory."""
        return _adaptive(self, adapter, updates, lambda v, square: self.beta_2 * v + (1 - self.beta_2) * square)


@dataclass(frozen=True)
class FedYogi:
    """Server Yogi: as `FedAdam`, with v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2).

    Source: Reddi et al. 2021, algorithm 2, https://arxiv.org/abs/2003.00295. v moves by Delta^2 at most, so one quiet
    round does not make the next step long. Biased on purpose, as `FedAvgM`.

    Args: as `FedAdam`.
    """

    lr: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 0.001
    inner: Mean = weighted_mean

    def __post_init__(self) -> None:
        _check(self.lr, self.tau, beta_1=self.beta_1, beta_2=self.beta_2)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter one server step on, with both moments in its memory."""
        return _adaptive(
            self, adapter, updates, lambda v, square: v - (1 - self.beta_2) * square * torch.sign(v - square)
        )


def _adaptive(
    rule: FedAdam | FedYogi,
    adapter: AdapterState,
    updates: Iterable[ClientUpdate],
    second_moment: Callable[[Tensor, Tensor], Tensor],
) -> AdapterState:
    after, delta = _pseudo_gradient(rule.inner, adapter, updates)
    first: dict[Slot, Tensor] = {}
    second: dict[Slot, Tensor] = {}
    corrects = isinstance(rule, FedAdam) and rule.bias_correction
    start = 0.0 if corrects else rule.tau**2
    for slot, change in delta.items():
        first[slot] = rule.beta_1 * _memory(adapter, MOMENTUM, slot, change) + (1 - rule.beta_1) * change
        second[slot] = second_moment(_memory(adapter, SECOND_MOMENT, slot, change, start=start), change.square())
    moments = {MOMENTUM: first, SECOND_MOMENT: second}
    if not corrects:
        step = {slot: rule.lr * first[slot] / (second[slot].sqrt() + rule.tau) for slot in delta}
        return _moved(adapter, after, step, moments)
    zero = torch.zeros(1, dtype=torch.float64)
    taken = {slot: _memory(adapter, NUM_STEPS, slot, zero) + 1 for slot in delta}
    step = {}
    for slot, t in taken.items():
        mean, square = first[slot] / (1 - rule.beta_1**t), second[slot] / (1 - rule.beta_2**t)
        step[slot] = rule.lr * mean / (square.sqrt() + rule.tau)
    return _moved(adapter, after, step, {**moments, NUM_STEPS: taken})


def _pseudo_gradient(
    inner: Mean, adapter: AdapterState, updates: Iterable[ClientUpdate]
) -> tuple[AdapterState, dict[Slot, Tensor]]:
    """Return what the inner rule made of the updates, and how far every tensor that trained went, in float64."""
    trained: set[Slot] = set()

    def watched() -> Iterator[ClientUpdate]:
        for update in updates:
            trained.update(update.tensors)
            yield update

    after = inner(adapter, watched())
    return after, {s: after.tensors[s].double() - adapter.tensors[s].double() for s in sorted(trained)}


def _memory(adapter: AdapterState, name: str, slot: Slot, like: Tensor, *, start: float = 0.0) -> Tensor:
    remembered = adapter.memory.get(name, {})
    return remembered[slot] if slot in remembered else torch.full_like(like, start)


def _moved(
    adapter: AdapterState,
    after: AdapterState,
    step: Mapping[Slot, Tensor],
    moments: Mapping[str, Mapping[Slot, Tensor]],
) -> AdapterState:
    """Return `after` with every trained tensor a step from the broadcast one; other moments stay as they are."""
    new = {s: (adapter.tensors[s].double() + step[s]).to(adapter.tensors[s].dtype) for s in step}
    moved = after.with_tensors(new)
    for name, tensors in moments.items():
        moved = moved.remembering(name, {**adapter.memory.get(name, {}), **tensors})
    return moved


def _check(lr: float, tau: float = 1.0, **decays: float) -> None:
    for name, value in (("lr", lr), ("tau", tau)):
        if not 0 < value < math.inf:
            raise InputError(f"Expected {name} to be finite and above 0, got {value}")
        in_range(1e-12, 1e10, **{name: value})
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise InputError(f"Expected {name} in [0, 1), got {value}")
