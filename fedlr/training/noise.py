"""How much noise one client's update carries, from public constants alone: for a picture, never for a guarantee."""

import math
from functools import partial

import torch

from fedlr.privacy.mechanism import Mechanism
from fedlr.training.local import LocalTraining

MOST_STEPS = 10_000  # beyond them the figure is not worth its time


def update_noise(training: LocalTraining, mechanism: Mechanism | None) -> float | None:
    """Return the standard deviation of the noise in one number that a client returns from a round.

    Each step adds N(0, (sigma C / divisor)^2) to the gradient, and SGD is linear in its gradients, so the noise of all
    steps comes out with the norm of the optimizer's response to a unit gradient. What noise does to later gradients is
    left out.

    Returns:
        None without a mechanism, and where an update is not linear in its noise: another optimizer than SGD, a rule
        after the noise. Public: nothing here is computed from data.
    """
    make = training.optimizer
    is_sgd = isinstance(make, partial) and make.func is torch.optim.SGD and not make.keywords.get("dampening")
    if mechanism is None or training.rule.changes or not is_sgd or training.num_steps > MOST_STEPS:
        return None
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer, responses = make([parameter]), []
    for step in range(training.num_steps):
        parameter.grad = torch.ones_like(parameter) if step == 0 else torch.zeros_like(parameter)
        optimizer.step()
        responses.append(float(parameter.detach()))
    step_sd = mechanism.noise_std / mechanism.divisor
    return step_sd * math.hypot(*responses)
