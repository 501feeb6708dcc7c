"""LoRA-FAIR and its closed form: property (20), against a dense objective and autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.fair import LoraFair, LoraFairRidge
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal

PATHS = ("layer.0", "layer.1")
BOTH = (LORA_A, LORA_B)
AGGREGATORS = [LoraFair(), LoraFair(penalty=0.0), LoraFair(squared_penalty=True), LoraFairRidge()]


def ideal(adapter, updates, path) -> Tensor:
    total = sum(update.weight for update in updates)
    products = (u.weight * u.tensors[Slot(path, LORA_B)] @ u.tensors[Slot(path, LORA_A)] for u in updates)
    return sum(products) / total


def objective(fair: LoraFair, delta_W: Tensor, lora_A: Tensor, mean_B: Tensor, residual: Tensor) -> Tensor:
    """The paper's objective with the D x K matrices that the library avoids."""
    cosine = torch.nn.functional.cosine_similarity(delta_W.flatten(), ((mean_B + residual) @ lora_A).flatten(), dim=0)
    norm = residual.norm()
    return 1 - cosine + fair.penalty * (norm**2 if fair.squared_penalty else norm)


def objectives(fair, adapter, updates, path) -> tuple[float, float]:
    """The dense objective at dB = 0 and at the aggregator's dB."""
    mean, after = weighted_mean(adapter, updates).factors()[path], fair(adapter, updates).factors()[path]
    delta_W = ideal(adapter, updates, path)
    residual = after.lora_B - mean.lora_B
    at_zero = objective(fair, delta_W, mean.lora_A, mean.lora_B, torch.zeros_like(residual))
    return float(at_zero), float(objective(fair, delta_W, mean.lora_A, mean.lora_B, residual))


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_nothing_is_corrected_when_only_B_trains(federation, aggregate):  # (20): all A_k equal
    adapter, updates = federation(LORA_B)
    assert aggregate(adapter, updates).fingerprint() == weighted_mean(adapter, updates).fingerprint()


@pytest.mark.parametrize("aggregate", AGGREGATORS)
@pytest.mark.parametrize("shared", BOTH)
def test_nothing_is_corrected_when_the_clients_return_the_same_factor(federation, aggregate, shared):  # (20)
    adapter, updates = federation(*BOTH)
    same = {slot: tensor for slot, tensor in updates[0].tensors.items() if slot.role == shared}
    updates = [replace(update, tensors={**update.tensors, **same}) for update in updates]
    assert aggregate(adapter, updates).fingerprint() == weighted_mean(adapter, updates).fingerprint()


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_only_B_is_corrected_and_the_head_is_averaged(federation, aggregate):
    adapter, updates = federation(*BOTH, HEAD)
    mean, after = weighted_mean(adapter, updates), aggregate(adapter, updates)
    for slot, tensor in mean.tensors.items():
        assert slot.role == LORA_B or torch.equal(after.tensors[slot], tensor)


@pytest.mark.parametrize("squared_penalty", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("lr", [0.01, 10.0])
def test_the_objective_never_ends_above_its_value_at_zero(federation, squared_penalty, penalty, size, lr):  # (20)
    """Also with steps that are far too long: a small B, or a large lr."""
    fair = LoraFair(penalty, num_steps=100, lr=lr, squared_penalty=squared_penalty)
    adapter, updates = federation(*BOTH, size=size)
    for path in PATHS:
        at_zero, at_solution = objectives(fair, adapter, updates, path)
        assert at_solution <= at_zero + 1e-12


@pytest.mark.parametrize(("squared_penalty", "penalty"), [(False, 0.001), (True, 0.3)])
def test_the_sgd_is_that_of_the_dense_objective(federation, squared_penalty, penalty):
    """Same iterates as autograd on D x K matrices: T, G and the 2R rows are only a faster way there."""
    fair = LoraFair(penalty, num_steps=50, lr=0.05, squared_penalty=squared_penalty, tolerance=0.0)
    adapter, updates = federation(*BOTH, size=0.3)
    after = fair(adapter, updates)
    for path in PATHS:
        mean, delta_W = weighted_mean(adapter, updates).factors()[path], ideal(adapter, updates, path)
        iterates = [torch.zeros_like(mean.lora_B)]
        for _ in range(fair.num_steps):
            residual = iterates[-1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(fair, delta_W, mean.lora_A, mean.lora_B, residual), residual)
            iterates.append(iterates[-1] - fair.lr * gradient)
        best = min(iterates, key=lambda r: float(objective(fair, delta_W, mean.lora_A, mean.lora_B, r)))
        assert best.norm() > 0.01
        assert torch.dist(after.factors()[path].lora_B, mean.lora_B + best) < 1e-10


def test_the_sgd_reaches_the_best_cosine_without_a_penalty(federation):
    """The best cosine is that of the projection on the row space of the mean lora_A: ridge at penalty 0."""
    adapter, updates = federation(*BOTH, size=0.3)
    after = LoraFair(penalty=0.0, num_steps=20000, lr=0.1, tolerance=0.0)(adapter, updates)
    best = LoraFairRidge(penalty=0.0)(adapter, updates)
    for path in PATHS:
        found, projection = after.factors()[path], best.factors()[path]
        products = [(layer.lora_B @ layer.lora_A).flatten() for layer in (found, projection)]
        assert torch.nn.functional.cosine_similarity(*products, dim=0) > 1 - 1e-6


def test_a_penalty_above_the_gradient_at_zero_gives_fedit_exactly(federation):
    adapter, updates = federation(*BOTH)
    assert LoraFair(penalty=10.0)(adapter, updates).fingerprint() == weighted_mean(adapter, updates).fingerprint()


def test_the_residual_starts_at_zero_and_not_at_random(federation):
    """A Xavier-random start stays several times as long as the mean lora_B; a short step must stay short."""
    adapter, updates = federation(*BOTH)
    mean, after = weighted_mean(adapter, updates), LoraFair(num_steps=1, lr=1e-9)(adapter, updates)
    for path in PATHS:
        assert torch.dist(after.factors()[path].lora_B, mean.factors()[path].lora_B) < 1e-7
    assert LoraFair(num_steps=0)(adapter, updates).fingerprint() == mean.fingerprint()


def test_a_xavier_random_start_would_be_seen(federation):
    """The mutant of the test above: the same objective, descended from a Xavier-random residual."""
    fair = LoraFair(num_steps=1000)
    adapter, updates = federation(*BOTH)
    path, generator = "layer.0", torch.Generator().manual_seed(0)
    mean, delta_W = weighted_mean(adapter, updates).factors()[path], ideal(adapter, updates, path)
    residual = torch.nn.init.xavier_uniform_(torch.empty_like(mean.lora_B), generator=generator)
    for _ in range(fair.num_steps):
        residual.requires_grad_()
        value = objective(fair, delta_W, mean.lora_A, mean.lora_B, residual)
        residual = residual.detach() - fair.lr * torch.autograd.grad(value, residual)[0]
    at_zero, at_solution = objectives(fair, adapter, updates, path)
    ended = objective(fair, delta_W, mean.lora_A, mean.lora_B, residual)
    assert at_solution <= at_zero < ended


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_a_mean_B_of_zero_gives_finite_numbers(federation, aggregate):  # the cosine is undefined there
    adapter, updates = federation(*BOTH, weights=(1.0, 1.0))
    opposite = {s: -t if s.role == LORA_B else 2 * t for s, t in updates[0].tensors.items()}
    cancelling = [updates[0], replace(updates[1], tensors=opposite)]
    after = aggregate(adapter, cancelling)
    assert all(torch.isfinite(tensor).all() for tensor in after.tensors.values())
    if isinstance(aggregate, LoraFair):
        assert after.fingerprint() == weighted_mean(adapter, cancelling).fingerprint()


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_updates_that_are_all_zero_stay_zero(federation, aggregate):
    adapter, updates = federation(*BOTH)
    zero = [
        replace(u, tensors={s: torch.zeros_like(t) if s.role == LORA_B else t for s, t in u.tensors.items()})
        for u in updates
    ]
    after = aggregate(adapter, zero)
    assert not any(layer.lora_B.any() for layer in after.factors().values())


@pytest.mark.parametrize("penalty", [0.0, 0.01, 3.0])
def test_ridge_matches_its_normal_equations(federation, penalty):  # (20)
    adapter, updates = federation(*BOTH)
    mean, after = weighted_mean(adapter, updates), LoraFairRidge(penalty)(adapter, updates)
    for path in PATHS:
        layer, lora_A = after.factors()[path], mean.factors()[path].lora_A
        residual = layer.lora_B - mean.factors()[path].lora_B
        gradient = (layer.lora_B @ lora_A - ideal(adapter, updates, path)) @ lora_A.T + penalty * residual
        assert gradient.abs().max() < 1e-12 < residual.norm()


def test_ridge_with_a_large_penalty_is_fedit(federation):  # (20)
    adapter, updates = federation(*BOTH)
    mean, after = weighted_mean(adapter, updates), LoraFairRidge(penalty=1e12)(adapter, updates)
    assert all(torch.allclose(after.tensors[slot], mean.tensors[slot], atol=1e-10) for slot in mean.tensors)


def test_ridge_never_has_a_larger_aggregation_error_than_fedit(federation):
    adapter, updates = federation(*BOTH)
    ideals = Ideal.of(adapter, updates)
    fedit = aggregation_error(ideals, weighted_mean(adapter, updates))
    projection = aggregation_error(ideals, LoraFairRidge(penalty=0.0)(adapter, updates))
    for penalty in (0.01, 1.0):
        ridge = aggregation_error(ideals, LoraFairRidge(penalty)(adapter, updates))
        assert all(0 < projection[path] <= ridge[path] < fedit[path] for path in PATHS)


def test_ridge_without_a_penalty_serves_a_rank_deficient_mean_A(federation):
    adapter, updates = federation(*BOTH)
    for update in updates:
        for path in PATHS:
            update.tensors[Slot(path, LORA_A)][2] = update.tensors[Slot(path, LORA_A)][1]
    after = LoraFairRidge(penalty=0.0)(adapter, updates)
    assert all(torch.isfinite(tensor).all() for tensor in after.tensors.values())


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_the_result_has_the_dtype_of_the_adapter_and_no_memory_of_the_weights_scale(federation, aggregate):
    adapter, updates = federation(*BOTH, dtype=torch.float32)
    after = aggregate(adapter, updates)
    scaled = aggregate(adapter, [replace(update, weight=1024 * update.weight) for update in updates])
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.float32}
    assert scaled.fingerprint() == after.fingerprint()


@pytest.mark.parametrize("aggregate", [LoraFair(penalty=0.0), LoraFairRidge()])
def test_the_correction_uses_the_weights(federation, aggregate):
    """An unweighted ideal would pull lora_B away from the client that counts most."""
    adapter, updates = federation(*BOTH, size=0.3, weights=(1.0, 1.0, 200.0))
    unweighted = aggregate(adapter, [replace(update, weight=1.0) for update in updates])
    ideals = Ideal.of(adapter, updates)
    right, wrong = (aggregation_error(ideals, a) for a in (aggregate(adapter, updates), unweighted))
    assert all(right[path] < wrong[path] / 2 for path in PATHS)


@pytest.mark.parametrize("aggregate", AGGREGATORS)
def test_updates_may_be_a_stream_that_is_read_once(federation, aggregate):
    adapter, updates = federation(*BOTH, HEAD)
    assert aggregate(adapter, iter(updates)).fingerprint() == aggregate(adapter, updates).fingerprint()


@pytest.mark.parametrize("solver", [LoraFair, LoraFairRidge])
@pytest.mark.parametrize("penalty", [-0.1, float("nan"), float("inf")])
def test_a_penalty_that_is_no_penalty_is_refused(solver, penalty):
    with pytest.raises(InputError, match="Expected penalty to be finite and at least 0"):
        solver(penalty=penalty)
