"""HetLoRA's penalty against autograd, client by client.

Mutants this file kills: squared norms; the norm of one factor alone; a tail of the adapter's rank for a client of a
smaller one; a tail that is one rank longer or shorter; NaN where a tail is zero.
"""

from dataclasses import replace
from math import floor

import pytest
import torch

import fedlr.methods.client_rules.tail as shipped
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.methods.client_rules.tail import TailPenalty
from tests.client_rules.points import (
    ROLES,
    C,
    R,
    changes_nothing_it_is_given,
    draw,
    point_of,
    same,
    serves_clients_apart,
)
from tests.training.small_models import mutant

KEEP, WEIGHT = 0.6, 0.3
RANKS = torch.tensor([R, 1, R])
MUTANTS = (
    ("size_C11 = own_tail.norm(dim=(1, 2), keepdim=True)", "size_C11 = torch.ones_like(own_tail[:, :1, :1])"),
    ("pull = other_tail.norm(dim=(1, 2), keepdim=True) * own_tail", "pull = own_tail"),
    ("if point.ranks is None else point.ranks", "if True else point.ranks"),
    (">= first_C1", "> first_C1"),
    (" & (number_R < ranks_C1)", ""),
)


def by_autograd(point, gradient, rule: TailPenalty):
    """The gradient plus that of the penalty, written as a loss of each client."""
    changed = {slot: value.clone() for slot, value in gradient.items()}
    for client in range(C):
        rank = R if point.ranks is None else int(point.ranks[client])
        first = floor(rule.keep * rank)
        own = {slot: tensor[client].clone().requires_grad_() for slot, tensor in point.values.items()}
        factors = {**point.frozen, **own}
        tails = [
            factors[Slot(path, LORA_B)][:, first:rank].norm() * factors[Slot(path, LORA_A)][first:rank].norm()
            for path in ("layer.0", "layer.1")
        ]
        (rule.weight * sum(tails)).backward()
        for slot, tensor in own.items():
            changed[slot][client] += 0 if tensor.grad is None else tensor.grad
    return changed


def at(*trained: str, ranks: torch.Tensor | None):
    point = point_of(*trained)
    for slot, tensor in point.values.items():
        for client, rank in enumerate([] if ranks is None else ranks.tolist()):
            if slot.role != HEAD:
                (tensor[client, rank:] if slot.role == LORA_A else tensor[client, :, rank:]).zero_()
    return replace(point, ranks=ranks)


def agrees(module, trained, ranks) -> bool:
    rule, gradient, point = module.TailPenalty(weight=WEIGHT, keep=KEEP), draw(*trained), at(*trained, ranks=ranks)
    wanted = by_autograd(point, gradient, rule)
    return all(torch.allclose(got, wanted[s], rtol=0, atol=1e-12) for s, got in rule(gradient, point).items())


@pytest.mark.parametrize("ranks", [None, RANKS], ids=["alike", "mixed"])
@pytest.mark.parametrize("trained", [ROLES, (LORA_B,), (LORA_A, LORA_B)], ids="+".join)
def test_the_gradient_gets_that_of_the_penalty(trained, ranks):
    assert agrees(shipped, trained, ranks)


@pytest.mark.parametrize(("old", "new"), MUTANTS, ids=[old for old, _ in MUTANTS])
def test_another_penalty_is_noticed(old, new):
    changed = mutant(shipped, (old, new))
    assert not (agrees(changed, ROLES, RANKS) and agrees(changed, (LORA_B,), RANKS))


@pytest.mark.parametrize("rule", [TailPenalty(weight=0.0, keep=KEEP), TailPenalty(weight=WEIGHT, keep=1.0)])
def test_no_weight_and_no_tail_leave_the_gradient(rule):
    gradient = draw(*ROLES)
    assert same(rule(gradient, at(*ROLES, ranks=RANKS)), gradient)


def test_a_tail_of_zeros_is_not_pulled_to_nan():
    point, gradient = point_of(*ROLES), draw(*ROLES)
    zeros = {slot: torch.zeros_like(tensor) for slot, tensor in point.values.items()}
    assert same(TailPenalty(weight=WEIGHT, keep=KEEP)(gradient, replace(point, values=zeros)), gradient)


def test_clients_stay_apart_and_arguments_unchanged():
    rule = TailPenalty(weight=WEIGHT, keep=KEEP)
    assert serves_clients_apart(rule, draw(*ROLES), point_of(*ROLES))
    assert changes_nothing_it_is_given(rule, draw(*ROLES), at(*ROLES, ranks=RANKS))


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"weight": float("nan")}, {"keep": 0.0}, {"keep": 1.5}], ids=str)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TailPenalty(**{"weight": 1.0, "keep": 0.5, **wrong})
