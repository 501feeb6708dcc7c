"""LoRA+ and the Riemannian preconditioner against plain loops, and the invariance that names the latter.

Mutants this file kills: the ratio on lora_A, the preconditioner of the factor itself instead of the other's, on the
wrong side, one for all clients, B B^T for B^T B, reg forgotten.
"""

import math
from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.methods.client_rules.preconditioned import LoraPlus, ScaledGradient
from tests.client_rules.points import (
    ROLES,
    C,
    R,
    changes_nothing_it_is_given,
    close,
    draw,
    point_of,
    same,
    serves_clients_apart,
)

SGD = "torch.optim.SGD"
EYE = torch.eye(R, dtype=torch.float64)
PATHS = ("layer.0", "layer.1")


def by_the_formula(gradient, factor_A, factor_B, reg):
    """Client by client, with an explicit inverse."""
    out = {slot: value.clone() for slot, value in gradient.items()}
    for path in PATHS:
        for client in range(C):
            A, B = factor_A(path, client), factor_B(path, client)
            if (slot := Slot(path, LORA_B)) in out:
                out[slot][client] = gradient[slot][client] @ torch.linalg.inv(A @ A.T + reg * EYE)
            if (slot := Slot(path, LORA_A)) in out:
                out[slot][client] = torch.linalg.inv(B.T @ B + reg * EYE) @ gradient[slot][client]
    return out


def test_each_factor_is_preconditioned_by_the_clients_own_other_one():
    gradient, point, reg = draw(*ROLES), point_of(*ROLES), 0.3
    expected = by_the_formula(
        gradient,
        lambda path, k: point.values[Slot(path, LORA_A)][k],
        lambda path, k: point.values[Slot(path, LORA_B)][k],
        reg,
    )
    assert close(ScaledGradient(reg=reg)(gradient, point), expected)


@pytest.mark.parametrize("trained", [LORA_A, LORA_B])
def test_a_frozen_factor_preconditions_all_clients_alike(trained):
    gradient, point, reg = draw(trained), point_of(trained), 0.3
    expected = by_the_formula(
        gradient,
        lambda path, k: point.frozen.get(Slot(path, LORA_A), torch.zeros(R, 1).double()),
        lambda path, k: point.frozen.get(Slot(path, LORA_B), torch.zeros(1, R).double()),
        reg,
    )
    assert close(ScaledGradient(reg=reg)(gradient, point), expected)


def test_orthonormal_rows_of_A_make_it_another_learning_rate():
    gradient, point, reg = draw(LORA_B, HEAD), point_of(LORA_B, HEAD), 0.25
    frozen = {slot: torch.linalg.qr(tensor.T).Q.T for slot, tensor in point.frozen.items()}
    changed = ScaledGradient(reg=reg)(gradient, replace(point, frozen=frozen))
    factors = {LORA_B: 1 / (1 + reg), HEAD: 1.0}
    assert close(changed, {slot: factors[slot.role] * value for slot, value in gradient.items()})


def product_step(A, B, gradient_DK, rule):
    """The first-order change of B A under one step along the rule's gradients, for one client."""
    slot_A, slot_B = Slot("layer", LORA_A), Slot("layer", LORA_B)
    gradient = {slot_A: (B.T @ gradient_DK)[None], slot_B: (gradient_DK @ A.T)[None]}
    values = {slot_A: A[None], slot_B: B[None]}
    changed = rule(gradient, replace(point_of(LORA_B), values=values))
    return changed[slot_B][0] @ A + B @ changed[slot_A][0]


def test_a_step_depends_on_the_product_and_not_on_its_factors():
    generator = torch.Generator().manual_seed(5)
    A, B, G, M = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(R, 9), (7, R), (7, 9), (R, R)]
    )
    rule, plain = ScaledGradient(reg=1e-13), LoraPlus(ratio=1.0, optimizer=SGD)
    other_A, other_B = M @ A, B @ torch.linalg.inv(M)
    assert torch.allclose(product_step(A, B, G, rule), product_step(other_A, other_B, G, rule), atol=1e-8)
    assert not torch.allclose(product_step(A, B, G, plain), product_step(other_A, other_B, G, plain), atol=1e-2)


def test_noise_on_lora_A_grows_by_one_over_reg_while_lora_B_is_zero():
    gradient, point = draw(LORA_A), point_of(LORA_A)
    point = replace(point, frozen={slot: torch.zeros_like(tensor) for slot, tensor in point.frozen.items()})
    changed = ScaledGradient(reg=0.01)(gradient, point)
    assert close(changed, {slot: 100 * value for slot, value in gradient.items()}, atol=1e-9)


def test_rows_beyond_a_clients_rank_stay_zero():
    gradient, point = draw(LORA_A, LORA_B), point_of(LORA_A, LORA_B)
    for stack in (gradient, point.values):
        for slot, value in stack.items():
            (value[0, 1:] if slot.role == LORA_A else value[0, :, 1:]).zero_()
    for slot, value in ScaledGradient(reg=0.1)(gradient, point).items():
        assert not (value[0, 1:] if slot.role == LORA_A else value[0, :, 1:]).any()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_client_that_diverged_leaves_the_others_alone(broken):
    gradient, point = draw(LORA_A, LORA_B), point_of(LORA_A, LORA_B)
    sound = ScaledGradient(reg=0.1)(gradient, point)
    for value in point.values.values():
        value[0] = broken
    for slot, value in ScaledGradient(reg=0.1)(gradient, point).items():
        assert torch.isnan(value[0]).any()
        assert torch.allclose(value[1:], sound[slot][1:], rtol=0, atol=1e-12)


def test_results_have_the_dtype_of_the_gradient():
    gradient = {slot: value.float() for slot, value in draw(*ROLES).items()}
    point = point_of(*ROLES)
    point = replace(point, values={slot: value.float() for slot, value in point.values.items()})
    assert {value.dtype for value in ScaledGradient(reg=0.1)(gradient, point).values()} == {torch.float32}


@pytest.mark.parametrize("reg", [0.0, -1.0, math.inf, math.nan])
def test_a_preconditioner_without_an_inverse_is_refused(reg):
    with pytest.raises(InputError, match="Expected reg to be positive and finite"):
        ScaledGradient(reg=reg)


def test_lora_plus_multiplies_lora_B_alone():
    gradient = draw(*ROLES)
    factors = {LORA_A: 1.0, LORA_B: 16.0, HEAD: 1.0}
    changed = LoraPlus(ratio=16.0, optimizer=SGD)(gradient, point_of(*ROLES))
    assert same(changed, {slot: factors[slot.role] * value for slot, value in gradient.items()})


def test_a_ratio_of_one_leaves_the_gradient():
    gradient = draw(*ROLES)
    assert same(LoraPlus(ratio=1.0, optimizer=SGD)(gradient, point_of(*ROLES)), gradient)


def steps(optimizer_of, rule, gradients):
    """Where SGD with two learning rates, or one and a rule, ends after these gradients."""
    parameters = {slot: torch.nn.Parameter(value.clone()) for slot, value in draw(LORA_A, LORA_B, seed=20).items()}
    optimizer = optimizer_of(parameters)
    for gradient in gradients:
        for slot, value in rule(gradient, point_of(LORA_A, LORA_B)).items():
            parameters[slot].grad = value.clone()
        optimizer.step()
    return {slot: parameter.detach() for slot, parameter in parameters.items()}


def one_rate(kind, **options):
    return lambda parameters: kind(list(parameters.values()), lr=0.1, **options)


def two_rates(kind, **options):
    def make(parameters):
        groups = [
            {"params": [p for slot, p in parameters.items() if slot.role == role], "lr": lr}
            for role, lr in ((LORA_A, 0.1), (LORA_B, 0.4))
        ]
        return kind(groups, **options)

    return make


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_under_sgd_a_ratio_is_a_learning_rate_of_its_own(momentum):
    gradients = [draw(LORA_A, LORA_B, seed=seed) for seed in range(4)]
    with_rule = steps(one_rate(torch.optim.SGD, momentum=momentum), LoraPlus(ratio=4.0, optimizer=SGD), gradients)
    expected = steps(two_rates(torch.optim.SGD, momentum=momentum), LoraPlus(ratio=1.0, optimizer=SGD), gradients)
    assert close(with_rule, expected)


def test_under_adam_a_ratio_would_do_nothing_and_so_is_refused():
    gradients = [draw(LORA_A, LORA_B, seed=seed) for seed in range(4)]
    adam = one_rate(torch.optim.Adam, eps=1e-12)
    with_ratio, without = (steps(adam, LoraPlus(ratio=ratio, optimizer=SGD), gradients) for ratio in (4.0, 1.0))
    assert close(with_ratio, without, atol=1e-9)
    with pytest.raises(InputError, match="Expected trainer.optimizer to be torch.optim.SGD for LoRA"):
        LoraPlus(ratio=4.0, optimizer="torch.optim.AdamW")
    with pytest.raises(InputError, match="Expected trainer.optimizer.weight_decay=0 for LoRA"):
        LoraPlus(ratio=4.0, optimizer=SGD, weight_decay=0.1)


@pytest.mark.parametrize("ratio", [0.0, -2.0, math.inf])
def test_a_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(InputError, match="Expected ratio to be positive and finite"):
        LoraPlus(ratio=ratio, optimizer=SGD)


@pytest.mark.parametrize(
    "rule", [LoraPlus(ratio=4.0, optimizer=SGD), ScaledGradient(reg=0.3)], ids=["lora_plus", "scaled"]
)
def test_arguments_are_left_alone_and_clients_apart(rule):
    gradient, point = draw(*ROLES), point_of(*ROLES)
    assert changes_nothing_it_is_given(rule, gradient, point)
    assert serves_clients_apart(rule, gradient, point)
