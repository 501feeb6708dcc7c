"""The server's momentum, on the paper's sum, in coordinates that turn, and where it means nothing.

Mutants: a velocity of lora_B that is not turned with its rows; one that turns the wrong way.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Block, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate import momentum as momentum_module
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.rank import svd_redistribution
from fedlr.methods.aggregate.server_optimizer import FedAvgM
from fedlr.methods.method import Always, Method, OrthonormalRows, SvdRefactor, full_adapter, keep, trained_block
from fedlr.runs.outcome import has_moved

A, B, TOP = Slot("layer", LORA_A), Slot("layer", LORA_B), Slot("head.weight", HEAD)
BLOCK: Block = frozenset({LORA_B, HEAD})
ROUNDS = 5


def start() -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {A: torch.randn(3, 8, generator=generator), B: torch.zeros(5, 3), TOP: torch.zeros(2, 5)}
    return AdapterState(tensors, scale=1.0)


def method(finalise: object, *, momentum: float, roles: Sequence[str] = (LORA_B,)) -> Method:
    return Method("m", Always(roles), weighted_mean, finalise, full_adapter, server_momentum=momentum)  # type: ignore[arg-type]


def steps() -> list[tuple[Tensor, Tensor]]:
    """Return per round a step of delta_W (D, K) and one of the head."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 8, generator=generator), torch.randn(2, 5, generator=generator)) for _ in range(ROUNDS)]


def played(chosen: Method) -> AdapterState:
    """Return the adapter after rounds whose gradients of delta_W are given: B moves by G A^T, as under SGD."""
    state = OrthonormalRows()(start())  # FedSVD leaves the rows of a zero product as they are drawn
    for round_index, (gradient, head) in enumerate(steps()):
        tensors = {B: state.tensors[B] + gradient @ state.tensors[A].T, TOP: state.tensors[TOP] + head}
        aggregated = chosen.aggregate(state, [ClientUpdate(0, tensors, 1.0, round_index)])
        state = chosen.finish(state, aggregated, BLOCK)
    return state


def product(state: AdapterState) -> Tensor:
    return state.tensors[B].double() @ state.tensors[A].double()


def test_the_velocity_is_a_sum_of_all_steps_that_fade() -> None:
    b, state, expected, velocity = 0.5, start(), torch.zeros(2, 5).double(), torch.zeros(2, 5).double()
    chosen = method(keep, momentum=b)
    for _, head in steps():
        velocity = b * velocity + head.double()
        expected += velocity
        aggregated = state.with_tensors({TOP: state.tensors[TOP] + head})
        state = chosen.finish(state, aggregated, BLOCK)
    torch.testing.assert_close(state.tensors[TOP].double(), expected, atol=1e-5, rtol=1e-5)


def test_fedsvd_with_momentum_is_a_fixed_orthonormal_lora_A_with_momentum() -> None:
    fixed, refactored = (played(method(choice, momentum=0.5)) for choice in (OrthonormalRows(), SvdRefactor()))
    torch.testing.assert_close(product(fixed), product(refactored), atol=1e-4, rtol=1e-5)
    assert torch.equal(fixed.tensors[TOP], refactored.tensors[TOP])
    plain = played(method(SvdRefactor(), momentum=0.0))
    assert float((product(plain) - product(refactored)).norm()) > 0.1 * float(product(plain).norm())


@pytest.mark.parametrize("mutant", ["not turned", "turned back"])
def test_a_velocity_in_the_wrong_coordinates_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = momentum_module._change_of_rows
    wrong = {"not turned": lambda old, new: torch.eye(3).double(), "turned back": lambda old, new: right(old, new).T}
    monkeypatch.setattr(momentum_module, "_change_of_rows", wrong[mutant])
    fixed, refactored = (played(method(choice, momentum=0.5)) for choice in (OrthonormalRows(), SvdRefactor()))
    assert float((product(fixed) - product(refactored)).norm()) > 0.05 * float(product(fixed).norm())


def test_the_direction_in_the_product_stays_when_the_rows_turn() -> None:
    state = start()
    state = state.with_tensors({B: torch.ones(5, 3)}).remembering(
        momentum_module.VELOCITY, {B: torch.randn(5, 3).double()}
    )
    after = momentum_module.turned(state, SvdRefactor()(state))
    old, new = (momentum_module.velocity_of(one)[B] @ one.tensors[A].double() for one in (state, after))
    torch.testing.assert_close(old, new, atol=1e-5, rtol=1e-5)
    assert not torch.equal(state.tensors[A], after.tensors[A])


def test_without_momentum_nothing_changes_to_the_bit_and_nothing_is_remembered() -> None:
    chosen = method(SvdRefactor(), momentum=0.0)
    aggregated = start().with_tensors({B: torch.ones(5, 3)})
    assert chosen.finish(start(), aggregated, BLOCK).fingerprint() == chosen.finalise(aggregated).fingerprint()
    assert not chosen.finish(start(), aggregated, BLOCK).memory


def test_the_first_round_is_the_aggregate_to_the_bit() -> None:
    aggregated = start().with_tensors({B: torch.randn(5, 3), TOP: torch.randn(2, 5)})
    after = method(keep, momentum=0.9).finish(start(), aggregated, BLOCK)
    assert after.fingerprint() == aggregated.fingerprint() and has_moved(start(), after)


def test_what_does_not_train_in_a_round_keeps_its_place_and_its_velocity() -> None:
    chosen = method(keep, momentum=0.5, roles=(LORA_A, LORA_B))
    one = chosen.finish(start(), start().with_tensors({B: torch.ones(5, 3)}), frozenset({LORA_B}))
    two = chosen.finish(one, one.with_tensors({A: one.tensors[A] + 1}), frozenset({LORA_A}))
    assert torch.equal(two.tensors[B], one.tensors[B])
    assert torch.equal(momentum_module.velocity_of(two)[B], torch.ones(5, 3).double())


def test_factors_whose_coordinates_do_not_last_have_no_momentum() -> None:
    both = (LORA_A, LORA_B)
    assert method(keep, momentum=0.5, roles=both).momentum_roles == {LORA_A, LORA_B, HEAD}
    assert method(SvdRefactor(), momentum=0.5).momentum_roles == {LORA_B, HEAD}
    assert method(SvdRefactor(), momentum=0.5, roles=both).momentum_roles == {HEAD}
    ranks = replace(method(keep, momentum=0.5, roles=both), aggregate=svd_redistribution)
    assert ranks.momentum_roles == {HEAD}


def test_a_server_with_an_optimizer_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="server_momentum=0 for method=own"):
        Method("own", Always([LORA_B]), FedAvgM(), keep, trained_block, server_momentum=0.5)


def test_a_method_that_folds_is_refused_by_name_also_when_it_says_so_late() -> None:
    with pytest.raises(InputError, match="server_momentum=0 for method=folder, which folds"):
        Method("folder", Always([LORA_B]), weighted_mean, keep, full_adapter, folds=True, server_momentum=0.5)
