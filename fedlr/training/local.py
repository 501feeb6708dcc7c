"""One client's local training: DP-SGD on the trained block (Abadi et al. 2016, algorithm 1; Poisson batches).

Every step does the same, whatever the client holds: draw a Poisson batch, add up clipped gradients, add
noise, divide by a constant, hand the result to a fresh optimizer. An empty batch is a step like any other:
its sum is zero, and zero plus noise is released. Nothing else that depends on the data leaves, is logged, or
is branched on.

Notable choices:
- The divisor comes from the configuration. Dividing by the batch or by the number of rows would release both.
- Noise and sampling have streams of their own, by client, round and step; torch's global generator is never
  used.
- How long a step takes does depend on the batch. That is not protected here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, RuleInputs
from fedlr.methods.rate_schedule import RateSchedule
from fedlr.privacy.mechanism import Mechanism, gaussian_noise, on_grid
from fedlr.privacy.sampling import PoissonSampler, Sampler
from fedlr.streams import Draws, Randomness
from fedlr.tasks.examples import Examples, Share, micro_batches
from fedlr.tasks.losses import PerExampleLoss, class_losses
from fedlr.training.gradients import Gradients


@dataclass(frozen=True)
class LocalTraining:
    """What one client does in one round: public, from the configuration, the same for every client."""

    num_steps: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    token_budget: int  # tokens of one micro-batch, padding included: memory and speed, never the result
    divisor: float  # the sum of a step is divided by this constant
    sampler: Sampler
    rule: ClientRule = ClientRule()
    loss: PerExampleLoss = class_losses  # of one example, before its gradient is clipped
    rates: RateSchedule = RateSchedule()  # of the optimizer's rate, by round

    def optimizer_of(self, parameters: Iterable[nn.Parameter], *, round_index: int) -> torch.optim.Optimizer:
        """Return a fresh optimizer, at the rate of a round."""
        optimizer, factor = self.optimizer(parameters), self.rates.factor(round_index)
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        return optimizer

    def __post_init__(self) -> None:
        """Refuse numbers that no step could use."""
        if self.num_steps < 1 or self.token_budget < 1:
            raise InputError(f"Expected num_steps and token_budget >= 1, got {self.num_steps} and {self.token_budget}")
        if not 0.0 < self.divisor < math.inf:
            raise InputError(f"Expected divisor in (0, inf), got {self.divisor}")
        if self.rule.alternates:
            _check_alternation(self.optimizer)


def train_client(
    model: nn.Module,
    gradients: Gradients,
    data: Share,
    *,
    training: LocalTraining,
    mechanism: Mechanism | None,
    randomness: Randomness,
    client_id: int,
    round_index: int,
    trained: Mapping[Slot, nn.Parameter],
    inputs: RuleInputs | None = None,
) -> int:
    """Take `num_steps` noised steps from the values that the trained tensors have now, in place.

    Args:
        model: what `gradients` was made for; put into train mode.
        gradients: clips under a mechanism; without one it may be the plain sum.
        data: this client's private rows; none at all is fine.
        training: the public configuration of the steps.
        mechanism: clip bound and noise; None trains without privacy, with the same sampling and divisor.
        randomness: streams of sampling and noise.
        client_id: which client; part of the key of both streams.
        round_index: which round; part of the key of both streams.
        trained: what `train_only` returned.
        inputs: what the rule of the method reads, of this client alone (C = 1); its memory is replaced.

    Returns:
        The number of steps taken, always `training.num_steps`.

    Raises:
        InputError: before any row is read, if the mechanism and the steps do not fit together.

    Guarantees:
        Unit: one example (row) of this client; neighbours differ by adding or removing one. What leaves are
        the values of `trained`, a function of `num_steps` Gaussian sums with sensitivity C, noise std
        `noise_multiplier` * C and the sampler's event; the caller's ledger must hold these steps before
        anyone else sees the values. If the call raises, the tensors hold the last finished step, and no trace
        of the unfinished one is left.
    """
    check_training(training, mechanism)
    if training.rule.alternates:
        raise InputError("Expected trainer.engine=fused for a method that alternates within a round, got opacus")
    model.train()
    optimizer = training.optimizer_of(list(trained.values()), round_index=round_index)
    rule, inputs = training.rule, inputs or RuleInputs()
    values = {slot: parameter.detach()[None] for slot, parameter in trained.items()}  # views: they follow the steps
    start = {slot: value.clone() for slot, value in values.items()} if rule.changes else {}
    for step in range(training.num_steps):
        key = {"client": client_id, "round_index": round_index, "step": step}
        rows = data.rows[training.sampler.draw(len(data), randomness.sampling(**key))]
        total = sum_over(gradients, data.table, rows, training=training, mechanism=mechanism, trained=trained)
        if mechanism is not None:
            total = privatise(total, mechanism=mechanism, generator=randomness.noise(**key))
        gradient: Mapping[Slot, Tensor] = {slot: value / training.divisor for slot, value in total.items()}
        if rule.changes:
            stacked = {slot: value[None] for slot, value in gradient.items()}
            changed = rule(stacked, inputs.at(step, training.num_steps, values=values, start=start))
            gradient = {slot: value[0] for slot, value in changed.items()}
        apply(optimizer, trained, gradient)
    if rule.remembers:
        inputs.memory.update(
            rule.remember(inputs.at(training.num_steps, training.num_steps, values=values, start=start))
        )
    return training.num_steps


def sum_over(
    gradients: Gradients,
    table: Examples,
    rows: np.ndarray,
    *,
    training: LocalTraining,
    mechanism: Mechanism | None,
    trained: Mapping[Slot, nn.Parameter],
) -> dict[Slot, Tensor]:
    """Return the sum of (clipped) gradients over these rows of a table, by micro-batches; zeros for no rows.

    Privacy: raw data go in and the result is private; it moves by at most C when a row is added or removed.
    """
    max_grad_norm = math.inf if mechanism is None else mechanism.max_grad_norm
    total = {slot: torch.zeros_like(trained[slot], dtype=torch.float32) for slot in sorted(trained)}
    device = next(iter(total.values())).device
    for indices in micro_batches(table.lengths, rows, token_budget=training.token_budget):
        part = gradients.clipped_sum(table.batch(indices).to(device), max_grad_norm=max_grad_norm)
        for slot, value in part.items():
            total[slot] += value
    return total


def privatise(total: Mapping[Slot, Tensor], *, mechanism: Mechanism, generator: Draws) -> dict[Slot, Tensor]:
    """Add Gaussian noise of standard deviation `noise_multiplier` * C to every entry of the sum, on a grid or not.

    One draw a slot, in the order of the slots: a stream gives the same noise whatever the caller's order was.

    Privacy: the only way for a sum to leave a step. What it returns is the release of one Gaussian mechanism.
    """
    std = mechanism.noise_multiplier * mechanism.max_grad_norm
    grid = mechanism.grid_of(total.values())
    private = {}
    for slot in sorted(total):
        if grid is not None:
            private[slot] = on_grid(total[slot], grid, generator=generator)
            continue
        noise = gaussian_noise(total[slot].shape, std=std, generator=generator)
        private[slot] = total[slot] + noise.to(total[slot].device)
    return private


def apply(
    optimizer: torch.optim.Optimizer, trained: Mapping[Slot, nn.Parameter], gradient: Mapping[Slot, Tensor]
) -> None:
    """Take one optimizer step on `gradient`, and leave no gradient behind."""
    try:
        for slot, parameter in trained.items():
            # Overwrites whatever a hook or a caller may have left there.
            parameter.grad = gradient[slot].to(parameter.dtype)
        optimizer.step()
    finally:
        for parameter in trained.values():
            parameter.grad = None


def _check_alternation(optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that would move a tensor in a step that does not train it."""
    made = optimizer([nn.Parameter(torch.zeros(1))])
    if type(made) is not torch.optim.SGD or made.defaults["momentum"] or made.defaults["weight_decay"]:
        raise InputError(
            "Expected SGD without momentum and weight decay in trainer.optimizer for a method that alternates within a "
            f"round, got {type(made).__name__} with others; set trainer=sgd"
        )


def check_training(training: LocalTraining, mechanism: Mechanism | None) -> None:
    if mechanism is None:
        return
    # A sampler that no accountant knows raises here, before it can draw.
    drawn = training.sampler.dp_event(mechanism.noise_multiplier)
    if drawn != PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier):
        raise InputError(
            f"Expected a sampler that draws as the mechanism is accounted, "
            f"sample_rate={mechanism.sample_rate}, got {training.sampler}"
        )
    if mechanism.divisor != training.divisor:
        raise InputError(f"Expected one divisor, got {mechanism.divisor} (mechanism) and {training.divisor} (training)")
