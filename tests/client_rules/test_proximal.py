"""FedProx against a loop over clients and against autograd.

Mutants this file kills: the sign of the penalty, its factor 1/2 or 2, the distance from another point than the start of
the round, a pull towards the mean of the group, in-place addition.
"""

import math

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B
from fedlr.errors import InputError
from fedlr.methods.client_rules.proximal import FedProx
from tests.client_rules.points import (
    ROLES,
    C,
    changes_nothing_it_is_given,
    close,
    draw,
    of_client,
    point_of,
    same,
    serves_clients_apart,
)


def test_the_gradient_gets_that_of_the_penalty():
    gradient, point, mu = draw(*ROLES), point_of(*ROLES), 0.3
    changed = FedProx(mu=mu)(gradient, point)
    for client in range(C):
        for slot, got in of_client(changed, client).items():
            theta = point.values[slot][client].clone().requires_grad_()
            (mu / 2 * (theta - point.start[slot][client]).square().sum()).backward()
            assert torch.allclose(got, gradient[slot][client] + theta.grad, rtol=0, atol=1e-12)


def test_no_pull_leaves_the_gradient():
    gradient = draw(LORA_A, LORA_B)
    assert same(FedProx(mu=0.0)(gradient, point_of(LORA_A, LORA_B)), gradient)


def test_nothing_pulls_at_the_start_of_a_round():
    gradient, point = draw(LORA_B), point_of(LORA_B)
    start = type(point)(0, point.num_steps, point.start, point.start, point.frozen, {})
    assert same(FedProx(mu=5.0)(gradient, start), gradient)


def test_a_client_with_a_strong_pull_ends_where_the_penalised_loss_is_least():
    # loss h/2 (theta - a)^2 with its penalty: theta* = (h a + mu start) / (h + mu).
    point, mu, h, lr = point_of(LORA_B), 2.0, 0.5, 0.1
    target, theta = draw(LORA_B, seed=9), dict(point.start)
    for step in range(400):
        gradient = {slot: h * (theta[slot] - target[slot]) for slot in theta}
        now = type(point)(step, 400, theta, point.start, point.frozen, {})
        theta = {slot: theta[slot] - lr * value for slot, value in FedProx(mu=mu)(gradient, now).items()}
    best = {slot: (h * target[slot] + mu * point.start[slot]) / (h + mu) for slot in theta}
    assert close(theta, best, atol=1e-9)


def test_arguments_are_left_alone_and_clients_apart():
    gradient, point = draw(*ROLES), point_of(*ROLES)
    assert changes_nothing_it_is_given(FedProx(mu=0.3), gradient, point)
    assert serves_clients_apart(FedProx(mu=0.3), gradient, point)


@pytest.mark.parametrize("mu", [-0.1, math.inf, math.nan])
def test_a_pull_that_is_none_is_refused(mu):
    with pytest.raises(InputError, match="Expected mu to be finite and at least 0"):
        FedProx(mu=mu)
