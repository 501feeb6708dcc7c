"""FedGSA's projection and FedASK's two sketches, against dense definitions.

Mutants this file kills: projectors without weights, or of the mean alone; bases with invented directions where B_k is
rank-deficient; a projection on the first R columns instead of the leading ones; p_k on both sketches; one Omega for
all rounds; lora_B and lora_A with all of Sigma each; a row of zeros beside a column of zeros.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot, num_values
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.subspace import FedAsk, _Projectors, projected_mean
from fedlr.methods.method import Method, SvdRefactor
from tests.methods_of_files import method_of

PATHS = ("layer.0", "layer.1")
R = 3


def load(name: str) -> Method:
    return method_of(name)


def product(adapter: AdapterState, path: str) -> Tensor:
    layer = adapter.factors()[path]
    return layer.lora_B.double() @ layer.lora_A.double()


def ideal(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> Tensor:
    total, slot_A, slot_B = sum(update.weight for update in updates), Slot(path, LORA_A), Slot(path, LORA_B)
    return sum(
        update.weight
        / total
        * update.tensors.get(slot_B, adapter.tensors[slot_B]).double()
        @ update.tensors.get(slot_A, adapter.tensors[slot_A]).double()
        for update in updates
    )


def projector(columns: Tensor) -> Tensor:
    U, S, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    U = U[:, S > 1e-6 * S[0]]
    return U @ U.T


def dense_fedgsa(adapter, updates, path, *, weigh=lambda weight: weight, of=projector) -> Tensor:
    """U U^T mean_B by the definition, with the D x D sum of projectors."""
    slot = Slot(path, LORA_B)
    average = sum(weigh(update.weight) * of(update.tensors[slot]) for update in updates)
    leading = torch.linalg.eigh(average).eigenvectors[:, -R:]
    return leading @ leading.T @ weighted_mean(adapter, updates).tensors[slot].double()


def with_column(updates, path: str, column: int, value: float) -> list[ClientUpdate]:
    """The updates with one column of every client's lora_B set to a number."""
    changed = []
    for update in updates:
        tensors = {slot: tensor.clone() for slot, tensor in update.tensors.items()}
        tensors[Slot(path, LORA_B)][:, column] = value
        changed.append(replace(update, tensors=tensors))
    return changed


# FedGSA


@pytest.mark.parametrize("num_clients", [2, 4, 5, 9])
def test_fedgsa_is_its_dense_definition(federation, num_clients):
    """Also where the stack of bases is wider than D = 12, or 9, and is folded into one matrix."""
    adapter, updates = federation(LORA_B, weights=tuple(range(1, num_clients + 1)))
    after = projected_mean(adapter, updates)
    for path in PATHS:
        expected = dense_fedgsa(adapter, updates, path)
        assert torch.dist(after.factors()[path].lora_B, expected) < 1e-10
        assert torch.dist(expected, weighted_mean(adapter, updates).factors()[path].lora_B) > 0.01


def test_unweighted_projectors_would_be_seen(federation):
    adapter, updates = federation(LORA_B, spread=1.0)
    after = projected_mean(adapter, updates)
    for path in PATHS:
        mutant = dense_fedgsa(adapter, updates, path, weigh=lambda weight: 1.0)
        assert torch.dist(after.factors()[path].lora_B, mutant) > 0.01


def test_fedgsa_keeps_the_product_when_the_clients_columns_span_the_same_space(federation):
    """One client, or clients whose lora_B differ by a mixing of columns: exact."""
    adapter, updates = federation(LORA_B)
    shared, generator = updates[0].tensors, torch.Generator().manual_seed(5)
    agreeing = []
    for update in updates:
        mixing = torch.randn(R, R, generator=generator, dtype=torch.float64)
        agreeing.append(replace(update, tensors={slot: tensor @ mixing for slot, tensor in shared.items()}))
    for cohort in (updates[:1], agreeing):
        after, mean = projected_mean(adapter, cohort), weighted_mean(adapter, cohort)
        assert all(torch.dist(product(after, path), product(mean, path)) < 1e-12 for path in PATHS)
        assert torch.dist(product(after, PATHS[0]), ideal(adapter, cohort, PATHS[0])) < 1e-12


def test_what_fedgsa_loses_is_the_mean_outside_the_shared_directions(federation):
    """It is a projection: the lost part is orthogonal to the kept one, so no norm grows."""
    adapter, updates = federation(LORA_B)
    after, mean = projected_mean(adapter, updates), weighted_mean(adapter, updates)
    for path in PATHS:
        kept = after.factors()[path].lora_B
        lost = mean.factors()[path].lora_B - kept
        assert (kept.T @ lost).abs().max() < 1e-12 < lost.norm()
        assert kept.norm() < mean.factors()[path].lora_B.norm()
        assert torch.linalg.matrix_rank(kept) == R


def test_a_direction_that_every_client_shares_is_kept_and_one_clients_own_is_not(federation):
    """Three clients in one space outvote a fourth of equal weight, whatever its numbers' size."""
    adapter, updates = federation(LORA_B, weights=(1.0, 1.0, 1.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    for path in PATHS:
        basis = torch.linalg.qr(torch.randn(len(adapter.factors()[path].lora_B), 2 * R, generator=generator).double()).Q
        cohort = []
        for number, update in enumerate(updates):
            space = basis[:, R:] * 100 if number == 3 else basis[:, :R]
            mixed = space @ torch.randn(R, R, generator=generator).double()
            cohort.append(replace(update, tensors={**update.tensors, Slot(path, LORA_B): mixed}))
        kept = projected_mean(adapter, cohort).factors()[path].lora_B
        assert torch.dist(basis[:, :R] @ basis[:, :R].T @ kept, kept) < 1e-10 < kept.norm()


def test_the_columns_of_a_rank_deficient_client_count_and_no_others(federation):
    """A QR of a zero or dependent column invents a direction, with a full vote."""
    adapter, updates = federation(LORA_B, dtype=torch.float32)
    path = PATHS[0]
    updates = with_column(with_column(updates, path, 1, 0.0), path, 2, 0.0)
    after = projected_mean(adapter, updates)
    expected = dense_fedgsa(adapter, updates, path)
    assert torch.dist(after.factors()[path].lora_B.double(), expected) < 1e-5

    def qr_projector(lora_B: Tensor) -> Tensor:
        basis = torch.linalg.qr(lora_B.double()).Q
        return basis @ basis.T

    mutant = dense_fedgsa(adapter, updates, path, of=qr_projector)
    assert torch.dist(mutant, expected) > 0.01


def test_a_column_that_depends_on_others_to_the_rounding_of_float32_has_no_vote(federation):
    """Taken for a direction of its own, such a rest of rounding would count as much as any other."""
    adapter, updates = federation(LORA_B, dtype=torch.float32)
    path, cohort = PATHS[0], []
    for update in updates:
        lora_B = update.tensors[Slot(path, LORA_B)].clone()
        lora_B[:, 2] = 0.3 * lora_B[:, 0] + 0.7 * lora_B[:, 1]
        cohort.append(replace(update, tensors={**update.tensors, Slot(path, LORA_B): lora_B}))
    found = projected_mean(adapter, cohort).factors()[path].lora_B.double()
    expected = dense_fedgsa(adapter, cohort, path)
    assert torch.dist(found, expected) < 1e-4
    mutant = dense_fedgsa(adapter, cohort, path, of=lambda lora_B: projector(lora_B.double() + 1e-5 * torch.eye(12, R)))
    assert torch.dist(mutant, expected) > 0.01


def test_the_memory_of_fedgsa_does_not_grow_with_the_cohort():
    projectors, generator = _Projectors(), torch.Generator().manual_seed(0)
    for _ in range(50):
        projectors.add(torch.randn(12, R, generator=generator), 1.0)
        assert sum(columns.numel() for columns in projectors._stack) <= 12 * 12


def test_a_first_round_of_zeros_stays_zero_and_a_client_of_zeros_has_no_vote(federation):
    adapter, updates = federation(LORA_B)
    zeros = {slot: torch.zeros_like(tensor) for slot, tensor in updates[0].tensors.items()}
    nothing = projected_mean(adapter, [replace(update, tensors=zeros) for update in updates])
    assert not any(layer.lora_B.any() for layer in nothing.factors().values())
    silent = [updates[0], replace(updates[1], tensors=zeros)]
    after, mean = projected_mean(adapter, silent), weighted_mean(adapter, silent)
    assert all(torch.dist(product(after, path), product(mean, path)) < 1e-12 for path in PATHS)


def test_fedgsa_with_its_finaliser_never_leaves_the_first_row_space():
    method, generator = load("fedgsa"), torch.Generator().manual_seed(0)
    slots = {Slot("layer", LORA_A): torch.randn(R, 20, generator=generator), Slot("layer", LORA_B): torch.zeros(12, R)}
    adapter = first = method.finalise(AdapterState(slots, scale=1.0))
    for round_index in range(10):
        trained = adapter.select(method.block_schedule(round_index, adapter))
        updates = []
        for client_id in range(3):
            new = {slot: tensor + torch.randn(tensor.shape, generator=generator) for slot, tensor in trained.items()}
            updates.append(ClientUpdate(client_id, new, 1.0, round_index))
        adapter = method.finalise(method.aggregate(adapter, updates))
    start, last = first.factors()["layer"].lora_A.double(), adapter.factors()["layer"].lora_A.double()
    rows = start.T @ torch.linalg.solve(start @ start.T, start)
    assert torch.dist(last @ rows, last) < 1e-5
    assert torch.allclose(last @ last.T, torch.eye(R).double(), atol=1e-5)


def test_fedgsa_refuses_a_lora_A_that_trains(federation):
    adapter, updates = federation(LORA_A, LORA_B)
    with pytest.raises(InputError, match="train lora_B and not lora_A"):
        projected_mean(adapter, updates)


# FedASK


@pytest.mark.parametrize("trained", [(LORA_B,), (LORA_A,)])
@pytest.mark.parametrize("oversampling", [0, 5])
def test_fedask_is_exact_when_one_factor_trains(federation, trained, oversampling):
    adapter, updates = federation(*trained)
    after = FedAsk(oversampling)(adapter, updates)
    for path in PATHS:
        assert torch.dist(product(after, path), ideal(adapter, updates, path)) < 1e-12


@pytest.mark.parametrize(
    ("num_clients", "oversampling", "best"), [(2, 3, True), (2, 8, True), (4, 9, True), (4, 0, False)]
)
def test_fedask_is_the_best_approximation_when_the_sketch_is_as_wide_as_the_sum(
    federation, num_clients, oversampling, best
):
    """Layer 0 is 12 x 20: a sketch of R + oversampling columns catches a sum of rank min(C R, 12)."""
    adapter, updates = federation(LORA_A, LORA_B, weights=tuple(range(1, num_clients + 1)))
    path = PATHS[0]
    X = ideal(adapter, updates, path)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    found = product(FedAsk(oversampling)(adapter, updates), path)
    assert (torch.dist(found, (U[:, :R] * S[:R]) @ Vh[:R]) < 1e-10) == best
    optimum = S[R:].norm()
    assert optimum * (1 - 1e-12) <= torch.dist(found, X) < 2 * optimum


def test_a_wider_sketch_is_closer_on_average(federation):
    adapter, updates = federation(LORA_A, LORA_B)
    X = ideal(adapter, updates, PATHS[0])

    def error(oversampling: int) -> float:
        rules = [FedAsk(oversampling, seed=seed) for seed in range(10)]
        return sum(float(torch.dist(product(rule(adapter, updates), PATHS[0]), X)) for rule in rules)

    assert error(0) > error(3) > error(9)


def test_fedask_is_exact_where_the_sum_has_the_adapters_rank(federation):
    """Both factors train, and all clients return one product in other factors."""
    adapter, updates = federation(LORA_A, LORA_B)
    same = []
    for number, update in enumerate(updates):
        tensors = dict(updates[0].tensors)
        for path in PATHS:
            mixing = torch.eye(R).double() * (number + 1) + 0.3
            tensors[Slot(path, LORA_B)] = updates[0].tensors[Slot(path, LORA_B)] @ mixing
            tensors[Slot(path, LORA_A)] = torch.linalg.solve(mixing, updates[0].tensors[Slot(path, LORA_A)])
        same.append(replace(update, tensors=tensors))
    after = FedAsk(oversampling=0)(adapter, same)
    for path in PATHS:
        assert torch.dist(product(after, path), ideal(adapter, same, path)) < 1e-10


def test_weights_on_both_sketches_would_not_be_exact(federation):
    """p_k on B_k and on A_k: sum_k p_k^2 B_k A_k, which is what the weights of two passes make when multiplied."""
    adapter, updates = federation(LORA_B)
    total = sum(update.weight for update in updates)
    squared = [replace(u, tensors={s: t * u.weight / total for s, t in u.tensors.items()}) for u in updates]
    after = FedAsk()(adapter, squared)
    assert torch.dist(product(after, PATHS[0]), ideal(adapter, updates, PATHS[0])) > 0.1


def test_both_factors_of_fedask_get_the_root_of_the_singular_values(federation):
    adapter, updates = federation(LORA_A, LORA_B, weights=(1.0, 2.0))
    after = FedAsk(oversampling=9)(adapter, updates)
    for path in PATHS:
        layer, S = after.factors()[path], torch.linalg.svdvals(ideal(adapter, updates, path))[:R]
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.diag(S), atol=1e-10)
        assert torch.allclose(layer.lora_B.T @ layer.lora_B, torch.diag(S), atol=1e-10)
        largest = layer.lora_A.gather(1, layer.lora_A.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()


def test_the_sketch_is_new_in_every_round_and_layer_and_the_same_for_a_seed(federation):
    adapter, updates = federation(LORA_A, LORA_B)
    later = [replace(update, base_round=1) for update in updates]
    rule = FedAsk(oversampling=0)
    assert rule(adapter, updates).fingerprint() == rule(adapter, updates).fingerprint()
    for other in (rule(adapter, later), FedAsk(oversampling=0, seed=1)(adapter, updates)):
        assert torch.dist(product(other, PATHS[0]), product(rule(adapter, updates), PATHS[0])) > 1e-3
    layer = adapter.factors()[PATHS[0]]
    sketches = [rule._omega(layer, round_index=0, number=number) for number in (0, 1)]
    assert sketches[0].shape == (20, R) and torch.dist(*sketches) > 1


@pytest.mark.parametrize("trained", [(LORA_B,), (LORA_A, LORA_B)])
def test_a_direction_of_singular_value_zero_can_train_again(federation, trained):
    """Two zero factors would have no gradient, either of them, for good."""
    adapter, updates = federation(*trained)
    path = PATHS[0]
    shared = {Slot(path, LORA_B): updates[0].tensors[Slot(path, LORA_B)].clone()}
    if LORA_A in trained:
        shared[Slot(path, LORA_A)] = updates[0].tensors[Slot(path, LORA_A)]
    shared[Slot(path, LORA_B)][:, 1:] = 0.0
    cohort = [replace(update, tensors={**update.tensors, **shared}) for update in updates]
    layer = FedAsk()(adapter, cohort).factors()[path]
    assert torch.dist(layer.lora_B @ layer.lora_A, ideal(adapter, cohort, path)) < 1e-12
    assert not layer.lora_B[:, 1:].any()
    assert torch.allclose(layer.lora_A[1:] @ layer.lora_A[1:].T, torch.eye(R - 1).double())
    old = adapter.factors()[path].lora_A
    if LORA_A not in trained:  # and the row space is the old one
        rows = old.T @ torch.linalg.solve(old @ old.T, old)
        assert torch.dist(layer.lora_A @ rows, layer.lora_A) < 1e-12


def test_fedask_leaves_a_product_of_zero_alone(federation):
    adapter, updates = federation(LORA_B)
    zeros = {slot: torch.zeros_like(tensor) for slot, tensor in updates[0].tensors.items()}
    after = FedAsk()(adapter, [replace(update, tensors=zeros) for update in updates])
    for path in PATHS:
        assert not after.factors()[path].lora_B.any()
        assert torch.equal(after.factors()[path].lora_A, adapter.factors()[path].lora_A)


@pytest.mark.parametrize(("out", "into", "rank"), [(2, 20, 4), (12, 4, 4), (5, 5, 5)])
def test_fedask_serves_layers_as_narrow_as_the_rank(out, into, rank):
    generator = torch.Generator().manual_seed(0)
    slots = {Slot("x", LORA_A): (rank, into), Slot("x", LORA_B): (out, rank)}
    adapter = AdapterState({s: torch.randn(shape, generator=generator) for s, shape in slots.items()}, scale=1.0)
    for trained in ((LORA_B,), (LORA_A, LORA_B)):
        updates = [
            ClientUpdate(k, {s: torch.randn(slots[s], generator=generator) for s in slots if s.role in trained}, 1.0, 0)
            for k in range(3)
        ]
        after = FedAsk()(adapter, updates)  # rank >= min(D, K): nothing is cut
        assert torch.dist(product(after, "x"), ideal(adapter, updates, "x")) < 1e-5


# Both


@pytest.mark.parametrize("aggregate", [projected_mean, FedAsk()])
def test_the_server_averages_a_head_keeps_the_dtype_and_reads_a_stream_once(federation, aggregate):
    adapter, updates = federation(LORA_B, HEAD, dtype=torch.float32)
    slot, total = Slot("head.weight", HEAD), sum(update.weight for update in updates)
    after = aggregate(adapter, iter(updates))
    expected = sum(update.weight / total * update.tensors[slot].double() for update in updates)
    assert torch.allclose(after.tensors[slot].double(), expected, atol=1e-6)
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.float32}
    scaled = aggregate(adapter, [replace(update, weight=1024 * update.weight) for update in updates])
    assert all(torch.allclose(product(scaled, path), product(after, path), atol=1e-5) for path in PATHS)


@pytest.mark.parametrize("aggregate", [projected_mean, FedAsk()])
def test_the_result_does_not_depend_on_the_order_of_the_clients(federation, aggregate):  # (18)
    adapter, updates = federation(LORA_B)
    first, second = aggregate(adapter, updates), aggregate(adapter, updates[::-1])
    assert all(torch.dist(product(first, path), product(second, path)) < 1e-10 for path in PATHS)


@pytest.mark.parametrize("aggregate", [projected_mean, FedAsk()])
@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5)])
def test_weights_that_are_no_weights_are_refused(federation, aggregate, weights):
    adapter, updates = federation(LORA_B, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        aggregate(adapter, updates)


@pytest.mark.parametrize(("oversampling", "seed"), [(-1, 0), (0, -1), (0, 2**32)])
def test_arguments_that_make_no_sketch_are_refused(oversampling, seed):
    with pytest.raises(InputError, match="Expected (oversampling|seed)"):
        FedAsk(oversampling, seed)


@pytest.mark.parametrize(("name", "up", "down"), [("fedgsa", R * 12, R * 32), ("fedask", R * 12, R * 32)])
def test_a_method_trains_and_sends_the_bytes_of_the_table(name, up, down):
    method = load(name)
    slots = {Slot("layer", LORA_A): torch.ones(R, 20), Slot("layer", LORA_B): torch.zeros(12, R)}
    adapter = AdapterState(slots, scale=1.0)
    block = method.block_schedule(0, adapter)
    assert method.name == name and isinstance(method.finalise, SvdRefactor) == (name == "fedgsa")
    assert num_values(adapter.select(block).values()) == up
    assert num_values(method.broadcast(adapter, block).values()) == down
