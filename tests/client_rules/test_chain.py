"""Rules in a row: in order, each on what the one before returned, and none that would miscount.

Mutants this file kills: the other order, the raw gradient for every rule, memory of the first rule, a pull on a tensor
that rests.
"""

from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B
from fedlr.errors import InputError
from fedlr.methods.client_rules.alternation import LocalAlternation
from fedlr.methods.client_rules.chain import Chain
from fedlr.methods.client_rules.preconditioned import LoraPlus, ScaledGradient
from fedlr.methods.client_rules.proximal import FedProx
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.client_rules.scaffold import ScaffoldClient
from tests.client_rules.points import (
    ROLES,
    changes_nothing_it_is_given,
    close,
    draw,
    point_of,
    same,
    serves_clients_apart,
)

SGD = "torch.optim.SGD"
PRECONDITIONED, PULLED, SCAFFOLD = ScaledGradient(reg=0.2), FedProx(mu=0.7), ScaffoldClient(lr=0.1, optimizer=SGD)


def test_rules_act_in_their_order():
    gradient, point = draw(*ROLES), point_of(*ROLES)
    changed = Chain([PRECONDITIONED, PULLED])(gradient, point)
    assert same(changed, PULLED(PRECONDITIONED(gradient, point), point))
    assert not close(changed, Chain([PULLED, PRECONDITIONED])(gradient, point), atol=1e-3)


def test_one_rule_is_itself_and_the_plain_one_changes_nothing():
    gradient, point = draw(*ROLES), point_of(*ROLES)
    assert same(Chain([PULLED])(gradient, point), PULLED(gradient, point))
    assert same(Chain([ClientRule(), PULLED, ClientRule()])(gradient, point), PULLED(gradient, point))
    assert same(Chain([])(gradient, point), gradient)


def test_scaffold_keeps_the_mean_of_what_the_rules_before_it_made():
    chain, point = Chain([LoraPlus(ratio=4.0, optimizer=SGD), SCAFFOLD]), point_of(*ROLES, control=True, num_steps=2)
    gradients, values = [draw(*ROLES, seed=s) for s in (7, 8)], dict(point.start)
    for step, gradient in enumerate(gradients):
        changed = chain(gradient, replace(point, step=step, values=values))
        values = {slot: values[slot] - 0.1 * changed[slot] for slot in values}
    kept = chain.remember(replace(point, step=2, values=values))
    factors = {LORA_A: 1.0, LORA_B: 4.0, HEAD: 1.0}
    assert chain.remembers and chain.changes
    assert close(kept, {s: factors[s.role] * (gradients[0][s] + gradients[1][s]) / 2 for s in point.values})


def test_what_rests_in_a_step_gets_no_gradient_from_any_rule():
    chain, point = Chain([PULLED, LocalAlternation(smooth=False)]), point_of(*ROLES, step=0)
    gradient = {s: torch.zeros_like(v) if s.role == LORA_A else v for s, v in draw(*ROLES).items()}
    changed = chain(gradient, point)
    assert chain.alternates and not chain.remembers
    assert chain.active(1, frozenset(ROLES)) == {LORA_A, HEAD}
    for slot, value in changed.items():
        assert torch.equal(value, PULLED(gradient, point)[slot]) == (slot.role != LORA_A)
        assert value.any() == (slot.role != LORA_A)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([SCAFFOLD, PULLED], "Expected only the method's rule to remember something"),
        ([SCAFFOLD, SCAFFOLD], "Expected only the method's rule to remember something"),
        ([LocalAlternation(), SCAFFOLD], "Expected rules that count the same steps"),
    ],
)
def test_rules_that_would_miscount_are_refused(rules, message):
    with pytest.raises(InputError, match=message):
        Chain(rules)


def test_arguments_are_left_alone_and_clients_apart():
    gradient, point = draw(*ROLES), point_of(*ROLES, control=True)
    chain = Chain([PRECONDITIONED, PULLED, SCAFFOLD])
    assert changes_nothing_it_is_given(chain, gradient, point)
    assert serves_clients_apart(chain, gradient, point)
