"""LA-LoRA: whose turn it is, and the filter against its definition, entry by entry.

Mutants this file kills: lora_A first (as in the authors' script, where its gradient is pure noise while lora_B is
zero), a head that rests, filtering along the rank or across clients, the smoothed gradient added to the raw one (as in
the same script), zeros beyond the ends.
"""

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.alternation import KERNEL, LocalAlternation, smoothed
from tests.client_rules.points import (
    ROLES,
    SHAPES,
    C,
    R,
    changes_nothing_it_is_given,
    close,
    draw,
    point_of,
    same,
    serves_clients_apart,
)


def by_definition(row: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(row)
    for i in range(len(row)):
        near = [(KERNEL[j - i + 2], row[j]) for j in range(len(row)) if abs(i - j) <= 2]
        out[i] = sum(weight * value for weight, value in near) / sum(weight for weight, _ in near)
    return out


def test_lora_B_comes_first_and_then_the_factors_take_turns():
    turns = [LocalAlternation().active(step, frozenset({LORA_A, LORA_B})) for step in range(5)]
    assert turns == [{LORA_B}, {LORA_A}, {LORA_B}, {LORA_A}, {LORA_B}]


def test_a_head_trains_in_every_step():
    for step, resting in enumerate((LORA_A, LORA_B)):
        assert LocalAlternation().active(step, frozenset(ROLES)) == frozenset(ROLES) - {resting}


def test_single_slots_take_turns_as_roles_do():
    slots = frozenset(SHAPES)
    for step in range(2):
        by_slot, by_role = (LocalAlternation().active(step, block) for block in (slots, frozenset(ROLES)))
        assert {s for s in slots if in_block(s, by_slot)} == {s for s in slots if in_block(s, by_role)}


@pytest.mark.parametrize("block", [{LORA_B}, {LORA_A, HEAD}, {Slot("layer.0", LORA_B)}])
def test_a_round_that_trains_one_factor_is_refused(block):
    with pytest.raises(InputError, match="Expected a round that trains lora_A and lora_B for LA-LoRA"):
        LocalAlternation().active(0, frozenset(block))


def test_each_row_of_A_and_each_column_of_B_is_filtered_for_itself():
    gradient = draw(*ROLES)
    changed = LocalAlternation()(gradient, point_of(*ROLES))
    for slot, value in gradient.items():
        for client in range(C):
            if slot.role == HEAD:
                assert torch.equal(changed[slot][client], value[client])
                continue
            for r in range(R):
                pick = (client, r) if slot.role == LORA_A else (client, slice(None), r)
                assert torch.allclose(changed[slot][pick], by_definition(value[pick]), rtol=0, atol=1e-12)


def test_a_constant_gradient_is_kept_up_to_the_ends():
    # Mutant: applied on top of the raw gradient it would be doubled; with zeros beyond the ends it would shrink there.
    gradient = {slot: torch.full_like(value, 3.0) for slot, value in draw(*ROLES).items()}
    assert close(LocalAlternation()(gradient, point_of(*ROLES)), gradient)


def test_independent_noise_keeps_about_half_of_its_standard_deviation():
    noise = torch.randn(4000, 60, generator=torch.Generator().manual_seed(3))
    std = smoothed(noise, axis=1)[:, 2:-2].std()
    assert abs(float(std) - 70**0.5 / 16) < 0.005


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_tensors_are_filtered_too(length):
    row = torch.arange(1.0, length + 1, dtype=torch.float64)
    assert torch.allclose(smoothed(row, axis=0), by_definition(row), rtol=0, atol=1e-12)


def test_without_the_filter_gradients_are_left_alone():
    gradient = draw(*ROLES)
    assert same(LocalAlternation(smooth=False)(gradient, point_of(*ROLES)), gradient)


def test_a_rested_factor_whose_gradient_is_zero_stays_where_it_is():
    gradient = {s: torch.zeros_like(v) if s.role == LORA_A else v for s, v in draw(LORA_A, LORA_B).items()}
    changed = LocalAlternation()(gradient, point_of(LORA_A, LORA_B))
    assert all(not value.any() for slot, value in changed.items() if slot.role == LORA_A)


def test_what_lies_beyond_a_clients_rank_stays_zero():
    gradient = draw(LORA_A, LORA_B)
    for slot, value in gradient.items():
        (value[0, 1:] if slot.role == LORA_A else value[0, :, 1:]).zero_()
    for slot, value in LocalAlternation()(gradient, point_of(LORA_A, LORA_B)).items():
        assert not (value[0, 1:] if slot.role == LORA_A else value[0, :, 1:]).any()


def test_arguments_are_left_alone_and_clients_apart():
    gradient, point = draw(*ROLES), point_of(*ROLES)
    assert changes_nothing_it_is_given(LocalAlternation(), gradient, point)
    assert serves_clients_apart(LocalAlternation(), gradient, point)
    assert LocalAlternation.alternates
