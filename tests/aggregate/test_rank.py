"""Clients of different ranks: FlexLoRA against a dense SVD, properties (19) and (21); HetLoRA's weights by definition.

Mutants killed, FlexLoRA: no weights; the SVD of the product of the means; singular values on lora_A, or not in order;
rows of lora_A that are zero beyond the rank of the sum. HetLoRA: squared norms; norms of the factors apart; one weight
for all layers; the server's weights instead; norms from before the training; no fall-back.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fedlr.methods.aggregate.rank as shipped
from fedlr.adapters.client_ranks import narrowed, widened
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.rank import norm_weighted_mean, svd_redistribution
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import SvdRefactor
from tests.methods_of_files import method_of
from tests.training.small_models import mutant

PATHS = ("layer.0", "layer.1")
BOTH = (LORA_A, LORA_B)
MANY = tuple(1.0 + k % 5 for k in range(40))
RULES = (svd_redistribution, norm_weighted_mean)


def dense(layer: LoraFactors) -> Tensor:
    return layer.lora_B.double() @ layer.lora_A.double()


def products(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> list[Tensor]:
    return [dense(adapter.with_tensors(update.tensors).factors()[path]) for update in updates]


def ideal(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> Tensor:
    """sum_k p_k B_k A_k by the definition, D x K."""
    weighted = (u.weight * product for u, product in zip(updates, products(adapter, updates, path), strict=True))
    return sum(weighted) / sum(update.weight for update in updates)


def of_rank(update: ClientUpdate, rank: int) -> ClientUpdate:
    """The update of a client of smaller rank, zero-padded as the server sees it."""
    return widened(replace(update, tensors=narrowed(update.tensors, rank)), update.tensors)


def changed(updates: list[ClientUpdate], role: str, change) -> list[ClientUpdate]:
    """The updates with another tensor wherever the role is that."""
    return [replace(u, tensors={s: change(t) if s.role == role else t for s, t in u.tensors.items()}) for u in updates]


# FlexLoRA


def is_best(rule, adapter: AdapterState, updates: list[ClientUpdate]) -> bool:
    """Whether every client, of rank 1, 2 or 3, gets the best approximation of its rank, of rows that can train."""
    for path, layer in rule(adapter, updates).factors().items():
        U, S, Vh = torch.linalg.svd(ideal(adapter, updates, path), full_matrices=False)
        for rank in (1, 2, 3):
            own = LoraFactors(layer.lora_A[:rank], layer.lora_B[:, :rank])
            if torch.dist(dense(own), (U[:, :rank] * S[:rank]) @ Vh[:rank]) > 1e-11:
                return False
        if not torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(3, dtype=torch.float64), atol=1e-12):
            return False
        if not torch.allclose(layer.lora_B.norm(dim=0), S[:3], atol=1e-12):
            return False
    return True


@pytest.mark.parametrize("weights", [(3.0,), (1.0, 2.0, 5.0, 8.0), MANY], ids=len)
@pytest.mark.parametrize("trained", [BOTH, (LORA_A,), (LORA_B,), (*BOTH, HEAD)], ids="+".join)
def test_every_client_gets_the_best_approximation_of_its_rank(federation, trained, weights):
    assert is_best(svd_redistribution, *federation(*trained, weights=weights))


def test_clients_of_several_ranks_are_summed_as_they_are(federation):
    adapter, updates = federation(*BOTH)
    assert is_best(svd_redistribution, adapter, [of_rank(u, r) for u, r in zip(updates, (1, 3, 2, 1), strict=True)])


def svd_of_the_product_of_the_means(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    return SvdRefactor()(weighted_mean(adapter, updates))


def singular_values_on_A(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    after = svd_redistribution(adapter, updates)
    sizes = {path: layer.lora_B.norm(dim=0) for path, layer in after.factors().items()}
    layers = after.factors().items()
    return after.with_factors({p: LoraFactors(f.lora_A * sizes[p][:, None], f.lora_B / sizes[p]) for p, f in layers})


def in_no_order(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    after = svd_redistribution(adapter, updates)
    layers = after.factors().items()
    return after.with_factors({path: LoraFactors(f.lora_A.flip(0), f.lora_B.flip(1)) for path, f in layers})


def unweighted(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    return svd_redistribution(adapter, [replace(update, weight=1.0) for update in updates])


@pytest.mark.parametrize(
    "mistake", [svd_of_the_product_of_the_means, singular_values_on_A, in_no_order, unweighted, weighted_mean]
)
def test_a_mistake_of_the_redistribution_is_seen(federation, mistake):
    assert not is_best(mistake, *federation(*BOTH))


@pytest.mark.parametrize("trained", [(LORA_B,), BOTH], ids="+".join)
@pytest.mark.parametrize("rank_of_B", [3, 2])
def test_with_one_lora_A_for_all_it_is_the_step_of_fedsvd(federation, trained, rank_of_B):  # (19)
    """Also where lora_B has a column of zeros less: both then keep the row space of that lora_A."""
    adapter, updates = federation(*trained)
    same = {slot: tensor for slot, tensor in updates[0].tensors.items() if slot.role == LORA_A}
    updates = [replace(update, tensors={**update.tensors, **same}) for update in updates]
    updates = changed(updates, LORA_B, lambda lora_B: lora_B * (torch.arange(3) < rank_of_B))
    flex, fedsvd = svd_redistribution(adapter, updates), SvdRefactor()(weighted_mean(adapter, updates))
    for path in PATHS:
        found, expected = flex.factors()[path], fedsvd.factors()[path]
        assert torch.dist(found.lora_B, expected.lora_B) < 1e-11
        assert torch.dist(found.lora_A[:rank_of_B], expected.lora_A[:rank_of_B]) < 1e-11
        # A row beside a zero column may have either sign; the span has none.
        assert torch.dist(found.lora_A.T @ found.lora_A, expected.lora_A.T @ expected.lora_A) < 1e-11
    assert max(aggregation_error(Ideal.of(adapter, updates), flex).values()) < 1e-12


def completes(module, adapter: AdapterState, updates: list[ClientUpdate]) -> None:
    after = module.svd_redistribution(adapter, updates)
    for layer in after.factors().values():
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
        assert layer.lora_B[:, 0].any() and not layer.lora_B[:, 1:].any()


def test_rows_beside_singular_values_of_zero_can_train(federation):
    """A cohort of rank 1 whose rows are all the same: the sum has rank 1."""
    adapter, updates = federation(*BOTH)
    same = {slot: tensor for slot, tensor in updates[0].tensors.items() if slot.role == LORA_A}
    updates = [of_rank(replace(update, tensors={**update.tensors, **same}), 1) for update in updates]
    completes(shipped, adapter, updates)
    with pytest.raises(AssertionError):
        completes(
            mutant(shipped, ("best.lora_A.to(", "(best.lora_A * best.lora_B.any(0)[:, None]).to(")), adapter, updates
        )


def test_a_sum_of_zero_leaves_the_mean_of_A_as_fedsvd_does(federation):
    adapter, updates = federation(*BOTH)
    zero = changed(updates, LORA_B, torch.zeros_like)
    after, fedsvd = svd_redistribution(adapter, zero), SvdRefactor()(weighted_mean(adapter, zero))
    assert after.fingerprint() == fedsvd.fingerprint()
    assert all(layer.lora_A.any() and not layer.lora_B.any() for layer in after.factors().values())


def test_a_rank_above_the_inputs_of_a_layer_is_refused():
    tensors = {Slot("layer", LORA_A): torch.ones(3, 2), Slot("layer", LORA_B): torch.ones(4, 3)}
    with pytest.raises(InputError, match="2 in_features, got 3"):
        svd_redistribution(AdapterState(tensors, scale=1.0), [ClientUpdate(0, tensors, 1.0, 0)])


def test_a_layer_with_fewer_outputs_than_the_rank_is_served():
    generator = torch.Generator().manual_seed(0)
    shapes = {Slot("layer", LORA_A): (3, 6), Slot("layer", LORA_B): (2, 3)}
    tensors = {s: torch.randn(shape, generator=generator, dtype=torch.float64) for s, shape in shapes.items()}
    adapter, updates = AdapterState(tensors, scale=1.0), [ClientUpdate(0, tensors, 1.0, 0)]
    layer = svd_redistribution(adapter, updates).factors()["layer"]
    assert torch.dist(dense(layer), ideal(adapter, updates, "layer")) < 1e-12
    assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(3, dtype=torch.float64))


# HetLoRA


def is_norm_weighted(rule, adapter: AdapterState, updates: list[ClientUpdate]) -> bool:
    """Whether factors are means with weights ||B_k A_k||_F of their layer, by dense products, and heads plain."""
    after, plain = rule(adapter, updates), weighted_mean(adapter, updates)
    for slot in updates[0].tensors:
        if slot.role == HEAD:
            expected = plain.tensors[slot]
        else:
            norms = [float(product.norm()) for product in products(adapter, updates, slot.path)]
            expected = sum(n / sum(norms) * u.tensors[slot] for n, u in zip(norms, updates, strict=True))
        if torch.dist(after.tensors[slot], expected) > 1e-12:
            return False
    return True


@pytest.mark.parametrize("weights", [(3.0,), (1.0, 2.0, 5.0, 8.0), MANY], ids=len)
@pytest.mark.parametrize("trained", [BOTH, (LORA_A,), (LORA_B,), (*BOTH, HEAD)], ids="+".join)
def test_factors_are_weighted_by_the_norm_of_their_product_and_heads_by_the_server(federation, trained, weights):
    adapter, updates = federation(*trained, weights=weights)
    assert is_norm_weighted(norm_weighted_mean, adapter, updates)
    mixed = [of_rank(update, 1 + update.client_id % 3) for update in updates]
    assert is_norm_weighted(norm_weighted_mean, adapter, mixed)


NORM = "product_norm(trained[path]) if"


@pytest.mark.parametrize(
    "change",
    [
        (NORM, "product_norm(trained[path]) ** 2 if"),
        (NORM, "float(trained[path].lora_B.norm() * trained[path].lora_A.norm()) if"),
        (NORM, "product_norm(trained['layer.0']) if"),
        (NORM, "update.weight if"),
        (NORM, "product_norm(adapter.factors()[path]) if"),
    ],
    ids=["squared", "factors apart", "one layer for all", "the server's", "before training"],
)
def test_a_mistake_of_the_norms_is_seen(federation, change):
    adapter, updates = federation(*BOTH, HEAD)
    assert not is_norm_weighted(mutant(shipped, change).norm_weighted_mean, adapter, updates)


def test_the_weights_of_the_server_serve_where_all_norms_are_zero(federation):
    """In that layer only."""
    adapter, updates = federation(*BOTH)
    slot = Slot("layer.1", LORA_B)
    zero = [replace(u, tensors={**u.tensors, slot: torch.zeros_like(u.tensors[slot])}) for u in updates]
    after, plain = norm_weighted_mean(adapter, zero), weighted_mean(adapter, zero)
    for role in BOTH:
        assert torch.equal(after.tensors[Slot("layer.1", role)], plain.tensors[Slot("layer.1", role)])
        assert torch.dist(after.tensors[Slot("layer.0", role)], plain.tensors[Slot("layer.0", role)]) > 0.01


def test_no_fall_back_is_seen(federation):
    adapter, updates = federation(*BOTH)
    always = mutant(shipped, ("for path in grew:", "for path in layers:"))
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        always.norm_weighted_mean(adapter, changed(updates, LORA_B, torch.zeros_like))


def test_otherwise_the_server_has_no_say_but_who_counts(federation):
    adapter, updates = federation(*BOTH)
    after = norm_weighted_mean(adapter, updates)
    assert norm_weighted_mean(adapter, [replace(u, weight=1.0) for u in updates]).fingerprint() == after.fingerprint()
    silent = norm_weighted_mean(adapter, [*updates[:-1], replace(updates[-1], weight=0.0)])
    assert silent.fingerprint() == norm_weighted_mean(adapter, updates[:-1]).fingerprint() != after.fingerprint()


def test_rows_that_few_clients_have_are_diluted_and_the_mean_is_biased(federation):
    """What the docstring warns of, so that nobody takes it for exact."""
    adapter, updates = federation(*BOTH, weights=(1.0, 1.0))
    mixed = [updates[0], of_rank(updates[1], 1)]
    after, slot = norm_weighted_mean(adapter, mixed), Slot("layer.0", LORA_A)
    norms = [float(product.norm()) for product in products(adapter, mixed, "layer.0")]
    assert torch.allclose(after.tensors[slot][1:], norms[0] / sum(norms) * updates[0].tensors[slot][1:])
    assert min(aggregation_error(Ideal.of(adapter, mixed), after).values()) > 0.1


@pytest.mark.parametrize("num_clients", [1, 4])
def test_what_all_clients_return_comes_back(federation, num_clients):
    adapter, updates = federation(*BOTH, HEAD)
    alike = [replace(update, tensors=updates[0].tensors) for update in updates[:num_clients]]
    after = norm_weighted_mean(adapter, alike)
    assert all(torch.allclose(after.tensors[slot], tensor, rtol=1e-13) for slot, tensor in alike[0].tensors.items())


# Both


@pytest.mark.parametrize("rule", RULES)
def test_padding_to_the_same_rank_changes_nothing(federation, rule):  # (21)
    adapter, updates = federation(*BOTH)
    assert (
        rule(adapter, [of_rank(update, 3) for update in updates]).fingerprint() == rule(adapter, updates).fingerprint()
    )


@pytest.mark.parametrize("rule", RULES)
def test_only_what_trained_changes_and_its_dtype_stays(federation, rule):
    adapter, updates = federation(*BOTH, dtype=torch.float32)
    updates = [replace(u, tensors={s: t for s, t in u.tensors.items() if s.path == "layer.0"}) for u in updates]
    after = rule(adapter, updates)
    for slot, tensor in adapter.tensors.items():
        assert (after.tensors[slot] is tensor) == (slot.path != "layer.0") and after.tensors[
            slot
        ].dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_a_stream_in_any_order(federation, rule):  # (18)
    adapter, updates = federation(*BOTH, HEAD)
    after, reversed_ = rule(adapter, iter(updates)), rule(adapter, iter(updates[::-1]))
    assert all(torch.allclose(after.tensors[s], reversed_.tensors[s], atol=1e-11) for s in after.tensors)
    scaled = rule(adapter, [replace(update, weight=update.weight * 1024) for update in updates])
    assert all(torch.allclose(after.tensors[s], scaled.tensors[s], atol=1e-11) for s in after.tensors)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5)])
def test_weights_that_are_no_weights_are_refused(federation, rule, weights):
    adapter, updates = federation(*BOTH, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        rule(adapter, updates)


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_the_method_of_the_file_takes_clients_of_any_rank_and_folds_nothing(federation, name):
    method = method_of(name)
    adapter, updates = federation(*BOTH)
    mixed = [of_rank(update, 1 + update.client_id % 3) for update in updates]
    after = method.finalise(method.aggregate(method.finalise(adapter), iter(mixed)))
    rule = {"flexlora": svd_redistribution, "hetlora": norm_weighted_mean}[name]  # ranks go into the memory
    assert after.fingerprint() == rule(adapter, mixed).fingerprint() and not after.side
    assert method.mixed_ranks and not method.folds and method.name == name
    assert method.broadcast(after, method.block_schedule(0, after)).keys() == updates[0].tensors.keys()
