"""The noise that a round's update carries, as it is drawn beside the update.

A statistical test: the sample deviation of 40,000 values is off by 1 % with probability 5e-3 and by 5 % with 1e-44;
seeds are fixed besides. Mutants: noise that grows with the steps as if there were no momentum, noise of one client
taken for that of the mean.
"""

import math
from functools import partial

import pytest
import torch

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.methods.measure.diagnostics import ChangeWatch
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.training.local import LocalTraining
from fedlr.training.noise import update_noise

MECHANISM = Mechanism(noise_multiplier=2.0, max_grad_norm=0.5, sample_rate=0.1, divisor=8.0)
SIZE = 40_000


def training(**options: float) -> LocalTraining:
    optimizer = partial(torch.optim.SGD, **{"lr": 0.3, **options})
    return LocalTraining(5, optimizer, token_budget=64, divisor=8.0, sampler=PoissonSampler(0.1))


def drawn_noise(plan: LocalTraining, *, seed: int) -> torch.Tensor:
    """Return what pure noise makes of a vector of zeros in a round."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = plan.optimizer([vector])
    for _ in range(plan.num_steps):
        vector.grad = 2.0 * 0.5 / 8.0 * torch.randn(SIZE, generator=generator)
        optimizer.step()
    return vector.detach()


OPTIMIZERS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_the_stated_noise_is_what_a_round_of_pure_noise_shows(options: dict[str, float]) -> None:
    plan = training(**options)
    measured = float(drawn_noise(plan, seed=1).std())
    assert update_noise(plan, MECHANISM) == pytest.approx(measured, rel=0.05)
    plain = 0.3 * 2.0 * 0.5 / 8.0 * math.sqrt(5)  # the mutant: momentum and decay left out
    assert not options or not measured == pytest.approx(plain, rel=0.05)


def test_noise_of_several_clients_is_that_of_their_mean() -> None:
    slot, plan = Slot("x", "lora_B"), training()
    watch = ChangeWatch({slot: torch.zeros(SIZE)})
    weights = (1.0, 3.0, 4.0)
    updates = [ClientUpdate(k, {slot: drawn_noise(plan, seed=k)}, w, 0) for k, w in enumerate(weights)]
    assert list(watch.watch(updates)) == updates
    change = watch.mean()
    assert change is not None and change.num_values == SIZE
    assert change.noise_to_signal(update_noise(plan, MECHANISM)) == pytest.approx(1.0, rel=0.05)
    alone = update_noise(plan, MECHANISM) * math.sqrt(SIZE) / change.norm  # the mutant: of one client
    assert alone > 1.2
    assert change.noise_to_signal(None) is None and ChangeWatch({}).mean() is None


def test_what_is_not_known_is_not_stated() -> None:
    assert update_noise(training(), None) is None
    assert update_noise(training(dampening=0.5, momentum=0.9), MECHANISM) is None
    adam = LocalTraining(5, partial(torch.optim.Adam, lr=0.1), 64, 8.0, PoissonSampler(0.1))
    assert update_noise(adam, MECHANISM) is None
