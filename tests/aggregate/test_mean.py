"""The weighted mean: properties (15), (16), (18), (19), (25), and public mistakes that these tests catch."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.factors import svd_refactor
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, ROLES, AdapterState, ClientUpdate, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import SvdRefactor

PATHS = ("layer.0", "layer.1")


def dense_ideal(adapter, updates, path) -> Tensor:
    """sum_k p_k B_k A_k by the definition, D x K, as no library code may do it."""
    total = sum(update.weight for update in updates)
    slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
    return sum(
        update.weight
        / total
        * update.tensors.get(slot_B, adapter.tensors[slot_B]).double()
        @ update.tensors.get(slot_A, adapter.tensors[slot_A]).double()
        for update in updates
    )


def dense_product(adapter, path) -> Tensor:
    layer = adapter.factors()[path]
    return layer.lora_B.double() @ layer.lora_A.double()


def normalised_weights(updates) -> list[float]:
    total = sum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def is_exact(aggregate, adapter, updates) -> bool:
    after = aggregate(adapter, updates)
    errors = [torch.dist(dense_product(after, p), dense_ideal(adapter, updates, p)) for p in PATHS]
    return max(errors) < 1e-12


@pytest.mark.parametrize("trained", [LORA_A, LORA_B])
def test_the_mean_is_exact_when_one_factor_trains(federation, trained):  # (16)
    assert is_exact(weighted_mean, *federation(trained))


def test_the_mean_is_biased_when_both_factors_train(federation):
    assert not is_exact(weighted_mean, *federation(LORA_A, LORA_B))


def test_the_bias_of_fedit_is_the_weighted_covariance_of_the_factors(federation):  # (15)
    adapter, updates = federation(LORA_A, LORA_B)
    after = weighted_mean(adapter, updates)
    for path in PATHS:
        mean, weights = after.factors()[path], normalised_weights(updates)
        covariance = sum(
            weight
            * (update.tensors[Slot(path, LORA_B)] - mean.lora_B)
            @ (update.tensors[Slot(path, LORA_A)] - mean.lora_A)
            for weight, update in zip(weights, updates, strict=True)
        )
        missed = dense_ideal(adapter, updates, path) - dense_product(after, path)
        assert torch.dist(missed, covariance) < 1e-12 < covariance.norm()


@pytest.mark.parametrize("shared", [LORA_A, LORA_B])
def test_fedit_is_exact_when_the_clients_return_the_same_factor(federation, shared):  # (15)
    adapter, updates = federation(LORA_A, LORA_B)
    same = {slot: tensor for slot, tensor in updates[0].tensors.items() if slot.role == shared}
    updates = [replace(update, tensors={**update.tensors, **same}) for update in updates]
    assert is_exact(weighted_mean, adapter, updates)


def test_fedit_is_exact_with_one_client(federation):  # (15): K' = 1
    adapter, updates = federation(LORA_A, LORA_B, weights=(3.0,))
    assert is_exact(weighted_mean, adapter, updates)


def test_a_constant_update_is_its_own_mean(federation):  # (18): fails if weights do not sum to 1
    adapter, updates = federation(*ROLES)
    updates = [replace(update, tensors=updates[0].tensors) for update in updates]
    after = weighted_mean(adapter, updates)
    for slot, tensor in updates[0].tensors.items():
        assert torch.allclose(after.tensors[slot], tensor, rtol=1e-14)


def test_the_mean_does_not_depend_on_the_order_of_the_clients(federation):  # (18)
    adapter, updates = federation(*ROLES)
    after, reversed_ = weighted_mean(adapter, updates), weighted_mean(adapter, updates[::-1])
    assert all(torch.allclose(after.tensors[s], reversed_.tensors[s], atol=1e-14) for s in after.tensors)


def test_the_mean_does_not_depend_on_the_scale_of_the_weights(federation):  # (18)
    adapter, updates = federation(*ROLES)
    scaled = [replace(update, weight=1024 * update.weight) for update in updates]
    assert weighted_mean(adapter, scaled).fingerprint() == weighted_mean(adapter, updates).fingerprint()


def test_a_weight_of_zero_counts_for_nothing(federation):
    adapter, updates = federation(LORA_B)
    without = weighted_mean(adapter, updates[:-1])
    silent = weighted_mean(adapter, [*updates[:-1], replace(updates[-1], weight=0.0)])
    assert silent.fingerprint() == without.fingerprint()


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5), (1.0, float("nan")), (1.0, float("inf"))])
def test_weights_that_are_no_weights_are_refused(federation, weights):
    adapter, updates = federation(LORA_B, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        weighted_mean(adapter, updates)


def test_updates_that_hold_other_tensors_are_refused(federation):
    adapter, updates = federation(LORA_B)
    _, others = federation(LORA_A, LORA_B)
    with pytest.raises(ValueError, match="Expected the same tensors in every update, got others from 1"):
        weighted_mean(adapter, [updates[0], others[1]])


def test_only_trained_tensors_change(federation):
    adapter, updates = federation(LORA_B)
    after = weighted_mean(adapter, updates)
    for slot, tensor in adapter.tensors.items():
        assert (after.tensors[slot] is tensor) == (slot.role != LORA_B)
    assert after.scale == adapter.scale


def test_a_trained_head_is_averaged_and_a_frozen_one_is_kept(federation):
    slot = Slot("head.weight", HEAD)
    adapter, updates = federation(LORA_B, HEAD)
    total = sum(update.weight for update in updates)
    expected = sum(update.weight * update.tensors[slot] for update in updates) / total
    assert torch.allclose(weighted_mean(adapter, updates).tensors[slot], expected, rtol=1e-13)
    adapter, updates = federation(LORA_B)
    assert weighted_mean(adapter, updates).tensors[slot] is adapter.tensors[slot]


def test_sums_are_float64_and_the_result_has_the_dtype_of_the_adapter(federation):
    slot = Slot("layer.0", LORA_B)
    adapter, updates = federation(LORA_B, dtype=torch.bfloat16)
    exact = sum(u.weight / 16 * u.tensors[slot].double() for u in updates)
    mean = weighted_mean(adapter, updates).tensors[slot]
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, exact.to(torch.bfloat16))


def test_updates_may_be_a_stream_that_is_read_once(federation):
    adapter, updates = federation(*ROLES)
    assert weighted_mean(adapter, iter(updates)).fingerprint() == weighted_mean(adapter, updates).fingerprint()


def test_fedsvd_is_the_svd_of_the_ideal_product(
    federation,
):  # (19): FlexLoRA's server step with a shared lora_A
    adapter, updates = federation(LORA_B)
    after = SvdRefactor()(weighted_mean(adapter, updates))
    for path in PATHS:
        U, S, Vh = torch.linalg.svd(dense_ideal(adapter, updates, path), full_matrices=False)
        assert torch.dist(dense_product(after, path), (U[:, :3] * S[:3]) @ Vh[:3]) < 1e-12
        assert torch.allclose(after.factors()[path].lora_B.norm(dim=0), S[:3])
    assert max(aggregation_error(Ideal.of(adapter, updates), after).values()) < 1e-12


def test_the_server_sees_nothing_of_a_client_but_what_it_released(federation):  # (25)
    """A new field would be a new release: it must be thought about here, and in the privacy statement."""
    # `rank` is the server's own word: what it asked the client for.
    assert [field.name for field in fields(ClientUpdate)] == ["client_id", "tensors", "weight", "base_round", "rank"]
    adapter, updates = federation(LORA_B)
    clients_renamed = [replace(update, client_id=update.client_id + 7, base_round=3) for update in updates]
    after = weighted_mean(adapter, clients_renamed)
    assert after.fingerprint() == weighted_mean(adapter, updates).fingerprint()


# Mistakes of public implementations. Each must fail the property that the real mean passes above.


def weights_on_both_factors(adapter: AdapterState, updates) -> AdapterState:
    """FLoRA-style stacking with p_k on both factors, collapsed on a shared lora_A: sum_k p_k^2 B_k A."""
    weights = normalised_weights(updates)
    slots = updates[0].tensors
    new = {s: sum(w**2 * u.tensors[s] for w, u in zip(weights, updates, strict=True)) for s in slots}
    return adapter.with_tensors(new)


def only_the_first_client(adapter: AdapterState, updates) -> AdapterState:
    """FLoRA's FedIT branch: a misspelled variable drops every client but the first from the running sum."""
    weight = normalised_weights(updates)[0]
    return adapter.with_tensors({slot: weight * tensor for slot, tensor in updates[0].tensors.items()})


def the_last_client_is_dropped(adapter: AdapterState, updates) -> AdapterState:
    """A client is lost and the others are not renormalised."""
    weights = normalised_weights(updates)[:-1]
    slots = updates[0].tensors
    new = {s: sum(w * u.tensors[s] for w, u in zip(weights, updates, strict=False)) for s in slots}
    return adapter.with_tensors(new)


def an_unweighted_mean(adapter: AdapterState, updates) -> AdapterState:
    """FedEx-LoRA's code averages without the weights its paper has."""
    return weighted_mean(adapter, [replace(update, weight=1.0) for update in updates])


@pytest.mark.parametrize(
    "mistake",
    [weights_on_both_factors, only_the_first_client, the_last_client_is_dropped, an_unweighted_mean],
)
def test_a_known_mistake_is_not_exact(federation, mistake):
    assert not is_exact(mistake, *federation(LORA_B))


def test_averaging_factors_that_were_factored_apart_is_not_exact(federation):
    """Clients that refactor by themselves return a basis each: averaging the factors is then meaningless."""
    adapter, updates = federation(LORA_B)
    path = "layer.0"
    trained = adapter.factors()[path].lora_A
    apart = []
    for update in updates:
        tensor = update.tensors[Slot(path, LORA_B)]
        layer = svd_refactor(replace(adapter.factors()[path], lora_A=trained, lora_B=tensor))
        apart.append(replace(update, tensors={Slot(path, LORA_A): layer.lora_A, Slot(path, LORA_B): layer.lora_B}))
    missed = weighted_mean(adapter, apart)
    assert torch.dist(dense_product(missed, path), dense_ideal(adapter, updates, path)) > 0.1
