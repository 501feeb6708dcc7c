"""FedRot-LoRA: what a rotation keeps, what it repairs, and when it may do nothing.

Mutants this file kills: R on A and R, not R^T, on B; a rotation of one factor alone; a rotation towards the first
client instead of the broadcast; interpolating without the projection back on orthogonal matrices; a reflection in the
soft variant; an arbitrary rotation where the reference is zero.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot, num_values
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.rotation import FedRot
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from tests.methods_of_files import method_of

PATHS = ("layer.0", "layer.1")
BOTH = (LORA_A, LORA_B)
R = 3
SOFT_AND_HARD = [0.2, 0.5, 1.0]


def orthogonal(seed: int, *, angle: float | None = None) -> Tensor:
    """A random orthogonal matrix; with an angle, a rotation by it in a random plane."""
    basis = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(seed)).double()).Q
    if angle is None:
        return basis
    turn = torch.eye(R).double()
    cos, sin = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    turn[:2, :2] = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    return basis @ turn @ basis.T


def rotated(update, rotation: Tensor):
    """The same product in other factors."""
    tensors = dict(update.tensors)
    for path in PATHS:
        tensors[Slot(path, LORA_A)] = rotation @ tensors[Slot(path, LORA_A)].double()
        tensors[Slot(path, LORA_B)] = tensors[Slot(path, LORA_B)].double() @ rotation.T
    return replace(update, tensors=tensors)


def copies(updates, rotations, *, base_round: int):
    """One client's product, sent by several clients in factors that are turned against each other."""
    same = [replace(update, tensors=updates[0].tensors, base_round=base_round) for update in updates]
    return [rotated(update, rotation) for update, rotation in zip(same, rotations, strict=True)]


def errors(aggregate, adapter, updates) -> dict[str, float]:
    return aggregation_error(Ideal.of(adapter, updates), aggregate(adapter, updates))


def turned(rule: FedRot, adapter, update) -> tuple[Tensor, Tensor]:
    """What the server makes of one client, of the first layer: the mean of one update is that update, turned."""
    layer = rule(adapter, [update]).factors()[PATHS[0]]
    return layer.lora_A, layer.lora_B


@pytest.mark.parametrize("strength", [0.0, *SOFT_AND_HARD])
@pytest.mark.parametrize("base_round", [0, 1])
def test_a_clients_product_is_unchanged(federation, strength, base_round):
    adapter, updates = federation(*BOTH, spread=2.0)
    for update in updates:
        lora_A, lora_B = turned(FedRot(strength), adapter, replace(update, base_round=base_round))
        expected = update.tensors[Slot(PATHS[0], LORA_B)] @ update.tensors[Slot(PATHS[0], LORA_A)]
        assert torch.dist(lora_B @ lora_A, expected) < 1e-13 * expected.norm()
        if strength:
            assert torch.dist(lora_A, update.tensors[Slot(PATHS[0], LORA_A)]) > 0.01


def test_a_rotation_that_is_not_undone_on_B_changes_the_product(federation):
    """The mutants: R on both factors, and R on lora_A alone."""
    _, updates = federation(*BOTH)
    lora_A, lora_B = (updates[0].tensors[Slot(PATHS[0], role)] for role in BOTH)
    rotation = orthogonal(1)
    assert torch.dist(lora_B @ rotation.T @ rotation @ lora_A, lora_B @ lora_A) < 1e-12
    for mutant in (lora_B @ rotation, lora_B):
        assert torch.dist(mutant @ rotation @ lora_A, lora_B @ lora_A) > 0.1


@pytest.mark.parametrize("base_round", [0, 1])
def test_rotated_copies_of_one_client_have_no_error_when_turned_all_the_way(federation, base_round):
    """Whatever orthogonal matrices turned them, reflections included."""
    adapter, updates = federation(*BOTH)
    cohort = copies(updates, [orthogonal(seed) for seed in range(4)], base_round=base_round)
    assert min(errors(weighted_mean, adapter, cohort).values()) > 0.1
    assert max(errors(FedRot(1.0), adapter, cohort).values()) < 1e-12


@pytest.mark.parametrize("base_round", [0, 1])
@pytest.mark.parametrize("angle", [0.2, 0.5, 1.0])
def test_a_soft_turn_has_a_smaller_error_than_none_on_rotated_copies(federation, angle, base_round):
    adapter, updates = federation(*BOTH, spread=0.1)
    rotations = [orthogonal(seed, angle=angle * (-1) ** seed) for seed in range(4)]
    cohort = copies(updates, rotations, base_round=base_round)
    by_strength = [errors(FedRot(strength), adapter, cohort) for strength in (0.0, 0.3, 0.6, 1.0)]
    for path in PATHS:
        values = [error[path] for error in by_strength]
        assert values == sorted(values, reverse=True) and values[0] > 10 * values[-1]


def test_strength_zero_is_fedit(federation):
    adapter, updates = federation(*BOTH, HEAD)
    after, fedit = FedRot(0.0)(adapter, updates), weighted_mean(adapter, updates)
    assert all(torch.allclose(after.tensors[slot], fedit.tensors[slot], atol=1e-13) for slot in fedit.tensors)


def test_clients_that_return_what_they_got_are_not_turned(federation):
    adapter, updates = federation(*BOTH)
    still = {slot: adapter.tensors[slot] for slot in updates[0].tensors}
    for base_round in (0, 1):
        cohort = [replace(update, tensors=still, base_round=base_round) for update in updates]
        after = FedRot(1.0)(adapter, cohort)
        assert all(torch.allclose(after.tensors[slot], adapter.tensors[slot], atol=1e-13) for slot in after.tensors)


@pytest.mark.parametrize(("base_round", "role"), [(0, LORA_A), (1, LORA_B), (2, LORA_A), (7, LORA_B)])
def test_the_reference_alternates_and_no_other_rotation_is_nearer_to_it(federation, base_round, role):
    adapter, updates = federation(*BOTH, spread=1.0)
    rule, reference = FedRot(1.0), adapter.factors()[PATHS[0]]

    def distance(lora_A: Tensor, lora_B: Tensor) -> float:
        if role == LORA_A:
            return float(torch.dist(lora_A, reference.lora_A))
        return float(torch.dist(lora_B, reference.lora_B))

    others = [orthogonal(seed) if seed % 2 else orthogonal(seed, angle=0.01) for seed in range(16)]
    for update in updates:
        lora_A, lora_B = turned(rule, adapter, replace(update, base_round=base_round))
        nearest = distance(lora_A, lora_B)
        for other in others:
            assert nearest <= distance(other @ lora_A, lora_B @ other.T) + 1e-12


def test_a_soft_turn_is_orthogonal_and_turns_a_part_of_the_way(federation):
    """The mutant is the interpolation itself, which is no rotation and shrinks the product."""
    adapter, updates = federation(*BOTH)
    turn = orthogonal(3, angle=1.0)
    start = {slot: adapter.tensors[slot] for slot in updates[0].tensors}
    update = rotated(replace(updates[0], tensors=start), turn)
    reference = adapter.factors()[PATHS[0]].lora_A
    soft, _ = turned(FedRot(0.5), adapter, update)
    # (I + R) / 2 has the polar factor of half the angle.
    assert torch.dist(soft, orthogonal(3, angle=0.5) @ reference) < 1e-12
    mutant = (torch.eye(R).double() + turn.T) / 2
    assert torch.dist(mutant.T @ mutant, torch.eye(R).double()) > 0.1


def test_reflections_are_taken_when_hard_and_never_when_soft(federation):
    adapter, updates = federation(*BOTH)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]).double())
    start = {slot: adapter.tensors[slot] for slot in updates[0].tensors}
    update = rotated(replace(updates[0], tensors=start), mirror)
    reference = adapter.factors()[PATHS[0]].lora_A
    hard, _ = turned(FedRot(1.0), adapter, update)
    assert torch.dist(hard, reference) < 1e-12
    for strength in (0.3, 0.5, 0.9):
        soft, _ = turned(FedRot(strength), adapter, update)
        applied = soft @ torch.linalg.pinv(mirror @ reference)
        assert torch.dist(applied @ applied.T, torch.eye(R).double()) < 1e-10
        assert torch.linalg.det(applied) > 0.99


def test_without_reflections_no_other_rotation_is_nearer(federation):
    """The determinant is paid for in the direction that matters least: singular values 3, 2, 1 here."""
    adapter, updates = federation(*BOTH)
    rows = torch.linalg.qr(torch.randn(20, R, generator=torch.Generator().manual_seed(0)).double()).Q.T
    reference = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()).sqrt() @ rows
    adapter = adapter.with_tensors({Slot(PATHS[0], LORA_A): reference})
    turn = orthogonal(4, angle=1.0) @ torch.diag(torch.tensor([1.0, -1.0, 1.0]).double())
    start = {slot: adapter.tensors[slot] for slot in updates[0].tensors}
    update = rotated(replace(updates[0], tensors=start), turn)
    nearly_hard, _ = turned(FedRot(1 - 1e-12), adapter, update)
    distance = torch.dist(nearly_hard, reference)
    for seed in range(40):
        other = orthogonal(seed)
        other = other * torch.linalg.det(other).sign()  # three rows: the sign of all of them is the determinant's
        assert distance <= torch.dist(other @ turn @ reference, reference) + 1e-9
    for axis in range(R):
        other = torch.eye(R).double()
        other[axis, axis] = -1.0
        assert distance <= torch.dist(other @ reference, reference) + 1e-9


def test_a_reference_of_zero_is_replaced_by_A_in_round_1(federation):
    """lora_B is still zero after a first round without answers."""
    adapter, updates = federation(*BOTH)
    zero = {Slot(path, LORA_B): torch.zeros_like(adapter.factors()[path].lora_B) for path in PATHS}
    empty = adapter.with_tensors(zero)
    odd = FedRot(1.0)(empty, [replace(update, base_round=1) for update in updates])
    even = FedRot(1.0)(adapter, updates)
    assert odd.fingerprint() == even.fingerprint()


def test_where_the_reference_says_nothing_a_client_is_not_turned(federation):
    """Zero factors, and zero rows of a client of smaller rank: an SVD alone would turn them at random."""
    adapter, updates = federation(*BOTH)
    blank = adapter.with_tensors({slot: torch.zeros_like(adapter.tensors[slot]) for slot in updates[0].tensors})
    for strength in SOFT_AND_HARD:
        lora_A, lora_B = turned(FedRot(strength), blank, updates[0])
        assert torch.dist(lora_A, updates[0].tensors[Slot(PATHS[0], LORA_A)]) < 1e-12
        assert torch.dist(lora_B, updates[0].tensors[Slot(PATHS[0], LORA_B)]) < 1e-12
    padded = {}
    for slot in updates[0].tensors:
        padded[slot] = adapter.tensors[slot].clone()
        (padded[slot] if slot.role == LORA_A else padded[slot].T)[1:] = 0.0
    small = replace(updates[0], tensors=padded)  # rank 1, and otherwise what was broadcast
    for base_round in (0, 1):
        lora_A, lora_B = turned(FedRot(1.0), adapter, replace(small, base_round=base_round))
        expected = padded[Slot(PATHS[0], LORA_B)] @ padded[Slot(PATHS[0], LORA_A)]
        assert torch.dist(lora_B @ lora_A, expected) < 1e-12


def test_directions_that_the_reference_leaves_open_turn_as_little_as_they_can(federation):
    """A reference of rank 1: one direction of R is settled, and an SVD alone would draw the others at random."""
    adapter, updates = federation(*BOTH)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        mine, theirs = (
            torch.nn.functional.normalize(torch.randn(R, generator=generator).double(), dim=0) for _ in "ab"
        )
        row = torch.randn(20, generator=generator).double()
        flat = adapter.with_tensors({Slot(PATHS[0], LORA_A): torch.outer(mine, row)})
        tensors = {**updates[0].tensors, Slot(PATHS[0], LORA_A): torch.outer(theirs, row)}
        _, lora_B = turned(FedRot(1.0), flat, replace(updates[0], tensors=tensors))
        found = (torch.linalg.pinv(tensors[Slot(PATHS[0], LORA_B)]) @ lora_B).T
        assert torch.dist(found @ theirs, mine) < 1e-10
        open_directions = torch.linalg.svd(theirs[None]).Vh[1:].T
        identity = torch.eye(R).double()
        for seed in range(10):
            mixing = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)).double()).Q
            other = found @ (torch.outer(theirs, theirs) + open_directions @ mixing @ open_directions.T)
            assert torch.dist(found, identity) <= torch.dist(other, identity) + 1e-9


@pytest.mark.parametrize("trained", BOTH)
def test_a_round_that_trains_one_factor_is_the_mean(federation, trained):
    adapter, updates = federation(trained)
    assert FedRot(1.0)(adapter, updates).fingerprint() == weighted_mean(adapter, updates).fingerprint()


def test_the_mean_of_the_turned_uses_the_weights_and_no_order(federation):
    adapter, updates = federation(*BOTH, HEAD, dtype=torch.float32)
    rule = FedRot(1.0)
    after = rule(adapter, iter(updates))
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.float32}
    scaled = rule(adapter, [replace(update, weight=1024 * update.weight) for update in updates])
    assert scaled.fingerprint() == after.fingerprint()
    reversed_ = rule(adapter, updates[::-1])
    assert all(torch.allclose(reversed_.tensors[slot], after.tensors[slot], atol=1e-6) for slot in after.tensors)
    unweighted = rule(adapter, [replace(update, weight=1.0) for update in updates])
    assert torch.dist(unweighted.tensors[Slot(PATHS[0], LORA_B)], after.tensors[Slot(PATHS[0], LORA_B)]) > 0.01
    slot, total = Slot("head.weight", HEAD), sum(update.weight for update in updates)
    expected = sum(update.weight / total * update.tensors[slot].double() for update in updates)
    assert torch.allclose(after.tensors[slot].double(), expected, atol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_and_1_is_refused(strength):
    with pytest.raises(InputError, match="Expected strength in"):
        FedRot(strength)


def test_fedrot_lora_trains_and_sends_both_factors(federation):
    adapter, _ = federation(*BOTH)
    method = method_of("fedrot_lora")
    block = method.block_schedule(0, adapter)
    expected = R * (12 + 20) + R * (9 + 7)
    assert method.name == "fedrot_lora" and isinstance(method.aggregate, FedRot)
    assert num_values(adapter.select(block).values()) == expected
    assert num_values(method.broadcast(adapter, block).values()) == expected
