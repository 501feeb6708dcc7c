"""The rate that noise chooses: what a run of pure noise leaves in a weight is what is stated, and no unit matters.

Statistical: the sample deviation of 40,000 independent normal values is off by 2.5 % with probability below 1e-11 (chi
square of 39,999 degrees, twice its tail at 7 standard deviations); seeds are fixed besides. Mutants: a rate that
forgets the server's momentum, the client's, the number of steps, or that m clients are averaged.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedlr.adapters.state import HEAD, AdapterState, ClientUpdate, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.momentum import with_momentum
from fedlr.training.rates import (
    ACCUMULATED_NOISE,
    LARGEST_RATE,
    RATE_WITHOUT_NOISE,
    Schedule,
    accumulated_noise,
    accumulation,
    learning_rate,
)

SIZE, SIGMA, CLIP, DIVISOR = 40_000, 3.0, 0.5, 20.0
SLOT = Slot("classifier.weight", HEAD)
PLAIN = Schedule(num_rounds=6, cohort_size=3, num_steps=2)
SCHEDULES = [
    PLAIN,
    replace(PLAIN, server_momentum=0.5),
    replace(PLAIN, num_steps=4, momentum=0.8),
    replace(PLAIN, num_steps=4, momentum=0.8, nesterov=True, server_momentum=0.3),
    replace(PLAIN, num_steps=1, cohort_size=1, num_rounds=1),
]


def rate_of(schedule: Schedule, *, clip: float = CLIP, divisor: float = DIVISOR) -> float:
    return learning_rate(schedule, noise_multiplier=SIGMA, max_grad_norm=clip, divisor=divisor)


def run_of_noise(schedule: Schedule, lr: float) -> torch.Tensor:
    """Return a weight of the mean model after a run whose gradients are all zero, many times over."""
    generator = torch.Generator().manual_seed(7)
    make = partial(torch.optim.SGD, lr=lr, momentum=schedule.momentum, nesterov=schedule.nesterov)
    state = AdapterState({SLOT: torch.zeros(SIZE)}, scale=1.0)
    for round_index in range(schedule.num_rounds):
        updates = []
        for client in range(schedule.cohort_size):
            weight = torch.nn.Parameter(state.tensors[SLOT].clone())
            optimizer = make([weight])
            for _ in range(schedule.num_steps):
                weight.grad = SIGMA * CLIP / DIVISOR * torch.randn(SIZE, generator=generator)
                optimizer.step()
            updates.append(ClientUpdate(client, {SLOT: weight.detach()}, 1.0, round_index))
        aggregated = weighted_mean(state, updates)
        state = with_momentum(state, aggregated, momentum=schedule.server_momentum, moves=lambda slot: True)
    return state.tensors[SLOT]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_run_of_pure_noise_leaves_the_stated_noise_in_a_weight(schedule: Schedule) -> None:
    measured = float(run_of_noise(schedule, rate_of(schedule)).std())
    assert measured == pytest.approx(ACCUMULATED_NOISE, rel=0.025)


MUTANTS = [
    (SCHEDULES[1], {"server_momentum": 0.0}),
    (SCHEDULES[2], {"momentum": 0.0}),
    (SCHEDULES[3], {"nesterov": False}),
    (PLAIN, {"num_steps": 1}),
    (PLAIN, {"cohort_size": 1}),
]


@pytest.mark.parametrize(("schedule", "forgotten"), MUTANTS, ids=str)
def test_a_rate_that_forgets_something_is_found(schedule: Schedule, forgotten: dict[str, float]) -> None:
    mutant = rate_of(replace(schedule, **forgotten))
    measured = float(run_of_noise(schedule, mutant).std())
    assert measured != pytest.approx(ACCUMULATED_NOISE, rel=0.025)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
@pytest.mark.parametrize("factor", [0.25, 4.0])  # within the largest rate
def test_the_step_in_units_of_weights_depends_neither_on_the_divisor_nor_on_the_scale_of_the_loss(
    schedule: Schedule, factor: float
) -> None:
    def moved(*, loss: float, divisor: float) -> float:
        clipped_sum = 9.0 * CLIP * loss  # of gradients at the clip bound, which scales with the loss
        return rate_of(schedule, clip=CLIP * loss, divisor=divisor) * clipped_sum / divisor

    plain = moved(loss=1.0, divisor=DIVISOR)
    assert moved(loss=1.0, divisor=DIVISOR * factor) == pytest.approx(plain, rel=1e-3)
    assert moved(loss=factor, divisor=DIVISOR) == pytest.approx(plain, rel=1e-3)


def test_more_noise_steps_or_rounds_make_a_smaller_rate_and_more_clients_a_larger_one() -> None:
    plain = rate_of(PLAIN)
    assert rate_of(replace(PLAIN, num_steps=8)) == pytest.approx(plain / 2, rel=1e-3)
    assert rate_of(replace(PLAIN, num_rounds=24)) == pytest.approx(plain / 2, rel=1e-3)
    assert rate_of(replace(PLAIN, cohort_size=12)) == pytest.approx(plain * 2, rel=1e-3)
    assert rate_of(replace(PLAIN, server_lr=2.0)) == pytest.approx(plain / 2, rel=1e-3)


def test_the_recipe_of_the_experiments_is_met() -> None:
    """20 full rounds of 12 clients at epsilon 6: sigma 3.42, C 0.5, about 450 rows, momentum 0.5."""
    schedule = Schedule(num_rounds=20, cohort_size=12, num_steps=1, server_momentum=0.5)
    h = sum(((1 - 0.5 ** (20 - t)) / 0.5) ** 2 for t in range(20))
    lr = learning_rate(schedule, noise_multiplier=3.42, max_grad_norm=0.5, divisor=450)
    assert lr == pytest.approx(0.8 * 450 / (3.42 * 0.5 * math.sqrt(h / 12)), rel=1e-3)
    stated = accumulated_noise(lr, schedule, noise_multiplier=3.42, max_grad_norm=0.5, divisor=450)
    assert stated == pytest.approx(0.8, rel=1e-3)


def test_hardly_any_noise_makes_no_endless_rate() -> None:
    tiny = {"max_grad_norm": 1e-6, "divisor": 1e6}
    assert learning_rate(PLAIN, noise_multiplier=1e-3, **tiny) == LARGEST_RATE
    assert learning_rate(PLAIN, noise_multiplier=None, **tiny) == RATE_WITHOUT_NOISE
    assert learning_rate(PLAIN, noise_multiplier=0.0, **tiny) == RATE_WITHOUT_NOISE


def test_momentum_near_one_adds_up_as_its_sum_says() -> None:
    exact = sum(sum((1 - 1e-6) ** j for j in range(k)) ** 2 for k in range(1, 30))
    assert accumulation(1 - 1e-6, 29) == pytest.approx(exact, rel=1e-8)
