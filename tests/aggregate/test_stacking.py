"""FLoRA's stack: exact for any ranks, folded into the side beside what was there, then new factors: property (17).

Mutants killed: a weight on both factors; no weight; factors that are averaged and then multiplied; a side that forgets
earlier rounds, or is folded once more; a lora_B that is kept beside the fold; a lora_A that is kept, the same in every
round, drawn from what the clients sent, or of another size; a stack that grows with the cohort.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fedlr.methods.aggregate.stacking as shipped
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.stacking import RunningProducts, folded, stack_and_fold
from tests.methods_of_files import method_of
from tests.training.small_models import mutant

PATHS = ("layer.0", "layer.1")
BOTH = (LORA_A, LORA_B)
MANY = tuple(1.0 + k % 5 for k in range(40))  # 40 clients of rank 3: more columns than either layer has rank


def dense(layer: LoraFactors) -> Tensor:
    return layer.lora_B.double() @ layer.lora_A.double()


def whole(adapter: AdapterState, path: str) -> Tensor:
    """What the adapter adds to a layer, without its scale: side and factors together."""
    product = dense(adapter.factors()[path])
    return product + dense(adapter.side[path]) if path in adapter.side else product


def ideal(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> Tensor:
    """sum_k p_k B_k A_k by the definition, D x K."""
    clients = (adapter.with_tensors(update.tensors).factors()[path] for update in updates)
    products = (update.weight * dense(layer) for update, layer in zip(updates, clients, strict=True))
    return sum(products) / sum(update.weight for update in updates)


def with_side(adapter: AdapterState) -> AdapterState:
    """The adapter with something folded into its first layer before."""
    generator, layer = torch.Generator().manual_seed(7), adapter.factors()["layer.0"]
    side_A = torch.randn((2, layer.lora_A.shape[1]), generator=generator, dtype=torch.float64).to(layer.lora_A.dtype)
    side_B = torch.randn((len(layer.lora_B), 2), generator=generator, dtype=torch.float64).to(layer.lora_A.dtype)
    return replace(adapter, side={"layer.0": LoraFactors(side_A, side_B)})


def of_rank(update: ClientUpdate, rank: int) -> ClientUpdate:
    """The update of a client of smaller rank, zero-padded as the server sees it."""
    tensors = {slot: tensor.clone() for slot, tensor in update.tensors.items()}
    for slot, tensor in tensors.items():
        if slot.role == LORA_A:
            tensor[rank:] = 0
        elif slot.role == LORA_B:
            tensor[:, rank:] = 0
    return replace(update, tensors=tensors)


def check_exact(module: ModuleType, adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    after = module.stack_and_fold(adapter, iter(updates))
    for path in PATHS:
        before = dense(adapter.side[path]) if path in adapter.side else 0.0
        torch.testing.assert_close(whole(after, path), before + ideal(adapter, updates, path), rtol=0, atol=1e-11)
        assert not after.factors()[path].lora_B.any()
    return after


@pytest.mark.parametrize("weights", [(3.0,), (1.0, 2.0, 5.0, 8.0), MANY], ids=len)
@pytest.mark.parametrize("trained", [BOTH, (LORA_A,), (LORA_B,), (*BOTH, HEAD)], ids="+".join)
def test_the_fold_is_exactly_the_sum_of_the_products(federation, trained, weights):  # (17)
    adapter, updates = federation(*trained, weights=weights)
    check_exact(shipped, adapter, updates)
    check_exact(shipped, with_side(adapter), updates)


def test_clients_of_any_rank_stack(federation):  # (17), (21)
    adapter, updates = federation(*BOTH)
    mixed = [of_rank(update, rank) for update, rank in zip(updates, (1, 3, 2, 1), strict=True)]
    after = check_exact(shipped, adapter, mixed)
    assert after.side["layer.0"].lora_A.shape == (7, 20)  # 1 + 3 + 2 + 1: nobody's padding is stacked


def test_several_rounds_add_up(federation):
    adapter, updates = federation(*BOTH, weights=(1.0, 3.0))
    for round_index in range(6):
        generator = torch.Generator().manual_seed(round_index)
        noisy = [
            replace(u, tensors={s: t + torch.randn(t.shape, generator=generator) for s, t in u.tensors.items()})
            for u in updates
        ]
        adapter = check_exact(shipped, adapter, noisy)
    assert len(adapter.side["layer.0"].lora_A) == 12 and len(adapter.side["layer.1"].lora_A) == 7


def test_the_stack_is_as_it_came_while_it_fits_and_compressed_to_full_rank_beyond(federation):
    adapter, updates = federation(*BOTH, weights=(1.0, 3.0))
    side = stack_and_fold(adapter, updates).side["layer.0"]
    assert torch.equal(side.lora_A, torch.cat([u.tensors[Slot("layer.0", LORA_A)] for u in updates]))
    adapter, updates = federation(*BOTH, weights=MANY)
    after = stack_and_fold(adapter, updates)
    assert [len(after.side[path].lora_A) for path in PATHS] == [12, 7]


def test_in_float32_the_fold_is_exact_to_rounding(federation):
    adapter, updates = federation(*BOTH, dtype=torch.float32)
    after = stack_and_fold(adapter, updates)
    assert {t.dtype for side in after.side.values() for t in (side.lora_A, side.lora_B)} == {torch.float32}
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.float32}
    for path in PATHS:
        expected = ideal(adapter, updates, path)
        assert torch.dist(whole(after, path), expected) < 1e-6 * expected.norm()


MISTAKES = {
    "weight on both factors": ("zeros(LoraFactors(lora_A,", "zeros(LoraFactors(lora_A * update.weight / 16,"),
    "no weight": ("LoraFactors(lora_A, lora_B)), update.weight)", "LoraFactors(lora_A, lora_B)), 1.0)"),
    "product of means": ("if path in self._stacks:\n                stack", "if False:\n                stack"),
    "earlier rounds forgotten": ("if side is not None:", "if False:"),
    "earlier rounds folded twice": ("total.add(side)", "total.add(side, weight=2.0)"),
    "lora_B is kept": (".with_factors(_restarted(adapter, products))", ""),
}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES)
def test_a_fold_that_is_not_exact_is_seen(federation, change):
    adapter, updates = federation(*BOTH)
    with pytest.raises(AssertionError):
        check_exact(mutant(shipped, change), with_side(adapter), updates)


def check_restart(module: ModuleType, make) -> None:
    adapter, updates = make(*BOTH, weights=(1.0, 3.0))
    first = module.stack_and_fold(adapter, updates)
    again = module.stack_and_fold(adapter, updates[:1])
    second = module.stack_and_fold(first, updates)
    other, _ = make(*BOTH, seed=1)
    elsewhere = module.stack_and_fold(other, updates)
    for path in PATHS:
        slot = Slot(path, LORA_A)
        drawn, bound = first.tensors[slot], adapter.tensors[slot].shape[1] ** -0.5
        assert torch.equal(drawn, again.tensors[slot])  # of the lora_A that was sent, not of what came back
        later = (adapter.tensors[slot], second.tensors[slot], elsewhere.tensors[slot])
        assert all(torch.dist(drawn, tensor) > 0.1 for tensor in later)
        assert 0.7 * bound < drawn.abs().max() <= bound and abs(drawn.mean()) < 0.4 * bound
        assert torch.linalg.matrix_rank(drawn) == 3


def test_lora_A_is_drawn_anew_from_the_lora_A_before(federation):
    check_restart(shipped, federation)


@pytest.mark.parametrize(
    "change",
    [
        ("LoraFactors(drawn_RK.to(lora_A.dtype)", "LoraFactors(lora_A"),
        ("int(public.fingerprint()[:8], 16)", "0"),
        ("_restarted(adapter, products)", "_restarted(running.mean(), products)"),
        ("shape[1] ** -0.5", "shape[1] ** 0.5"),
        ("uniform(-bound, bound", "uniform(0, bound"),
    ],
    ids=["kept", "the same in every round", "from what the clients sent", "too large", "one-sided"],
)
def test_a_wrong_restart_is_seen(federation, change):
    with pytest.raises(AssertionError):
        check_restart(mutant(shipped, change), federation)


def test_layers_of_one_shape_are_drawn_apart():
    slots = [Slot(path, role) for path in ("a", "b") for role in BOTH]
    tensors = {slot: torch.ones(2, 5) if slot.role == LORA_A else torch.ones(4, 2) for slot in slots}
    after = stack_and_fold(AdapterState(tensors, scale=1.0), [ClientUpdate(0, tensors, 1.0, 0)])
    assert not torch.equal(after.tensors[Slot("a", LORA_A)], after.tensors[Slot("b", LORA_A)])


def test_the_draw_is_that_of_pefts_initialisation(federation):
    """kaiming_uniform with a = sqrt(5): uniform on +-1 / sqrt(K)."""
    slots = {Slot("layer", LORA_A): (8, 400), Slot("layer", LORA_B): (30, 8)}
    tensors = {slot: torch.ones(shape, dtype=torch.float64) for slot, shape in slots.items()}
    after = stack_and_fold(AdapterState(tensors, scale=1.0), [ClientUpdate(0, tensors, 1.0, 0)])
    drawn = after.tensors[Slot("layer", LORA_A)]
    reference = torch.nn.init.kaiming_uniform_(
        torch.empty(8, 400), a=5**0.5, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.std() == pytest.approx(float(reference.std()), rel=0.05)
    assert drawn.abs().max() == pytest.approx(float(reference.abs().max()), rel=0.01)


def test_a_trained_head_is_averaged_and_a_frozen_one_is_kept(federation):
    slot = Slot("head.weight", HEAD)
    adapter, updates = federation(*BOTH, HEAD)
    assert torch.equal(stack_and_fold(adapter, updates).tensors[slot], weighted_mean(adapter, updates).tensors[slot])
    adapter, updates = federation(*BOTH)
    assert stack_and_fold(adapter, updates).tensors[slot] is adapter.tensors[slot]


def test_a_layer_in_which_nothing_trained_is_left_alone(federation):
    adapter, updates = federation(*BOTH)
    updates = [replace(u, tensors={s: t for s, t in u.tensors.items() if s.path == "layer.0"}) for u in updates]
    after = stack_and_fold(adapter, updates)
    assert after.side.keys() == {"layer.0"}
    assert all(after.tensors[s] is tensor for s, tensor in adapter.tensors.items() if s.path != "layer.0")
    assert all(after.tensors[Slot("layer.0", role)] is not adapter.tensors[Slot("layer.0", role)] for role in BOTH)


def test_nothing_learnt_folds_nothing(federation):
    adapter, updates = federation(*BOTH)
    zero = [
        replace(u, tensors={s: torch.zeros_like(t) if s.role == LORA_B else t for s, t in u.tensors.items()})
        for u in updates
    ]
    assert not stack_and_fold(adapter, zero).side
    before = with_side(adapter)
    assert stack_and_fold(before, zero).side is before.side


def test_the_arguments_are_not_changed(federation):
    adapter, updates = federation(*BOTH)
    adapter = with_side(adapter)
    before = (adapter.fingerprint(), [{s: t.clone() for s, t in u.tensors.items()} for u in updates])
    stack_and_fold(adapter, updates)
    assert adapter.fingerprint() == before[0]
    assert all(torch.equal(u.tensors[s], t) for u, old in zip(updates, before[1], strict=True) for s, t in old.items())


def test_the_order_and_the_scale_of_the_weights_do_not_matter(federation):  # (18)
    adapter, updates = federation(*BOTH, HEAD, weights=MANY)
    after = stack_and_fold(adapter, updates)
    others = (updates[::-1], [replace(update, weight=update.weight * 1024) for update in updates])
    for other in (stack_and_fold(adapter, changed) for changed in others):
        assert all(torch.dist(whole(other, path), whole(after, path)) < 1e-11 for path in PATHS)
        assert all(torch.allclose(other.tensors[slot], after.tensors[slot], atol=1e-13) for slot in after.tensors)


def test_a_weight_of_zero_counts_for_nothing(federation):
    adapter, updates = federation(*BOTH)
    silent = [*updates[:-1], replace(updates[-1], weight=0.0)]
    assert stack_and_fold(adapter, silent).fingerprint() == stack_and_fold(adapter, updates[:-1]).fingerprint()


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5), (1.0, float("nan"))])
def test_weights_that_are_no_weights_are_refused(federation, weights):
    adapter, updates = federation(*BOTH, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        stack_and_fold(adapter, updates)


def test_a_side_is_cut_to_the_best_approximation_above_its_most_columns(federation):
    adapter, _ = federation(LORA_B)
    layer = adapter.factors()["layer.0"]
    side = folded(None, layer, like=layer, max_rank=2)
    assert side is not None and len(side.lora_A) == 2
    tail = torch.linalg.svdvals(dense(layer))[2]
    assert torch.dist(dense(side), dense(layer)) == pytest.approx(float(tail), rel=1e-10)


def numbers_held(module: ModuleType, num_clients: int) -> int:
    """How many numbers the running products of a 40 x 24 layer hold after so many updates of both factors."""
    slots = {Slot("layer", LORA_A): (2, 24), Slot("layer", LORA_B): (40, 2)}
    adapter = AdapterState({slot: torch.zeros(shape) for slot, shape in slots.items()}, scale=1.0)
    running, generator = module.RunningProducts(adapter), torch.Generator().manual_seed(0)
    for client in range(num_clients):
        tensors = {slot: torch.randn(shape, generator=generator) for slot, shape in slots.items()}
        running.add(ClientUpdate(client, tensors, 1.0, 0))
    return sum(tensor.numel() for tensor in reachable_tensors(running))


def reachable_tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from reachable_tensors(one)
    elif hasattr(value, "__dict__"):
        yield from reachable_tensors(vars(value))


def most_numbers() -> int:
    return (2 * 24 + 2) * (40 + 24) + 2 * 2 * (40 + 24)  # 2 min(D, K) + R columns, and the adapter and its mean


def test_memory_is_bounded_however_large_the_cohort():
    assert numbers_held(shipped, 1) < 10 * (40 + 24)
    assert max(numbers_held(shipped, num_clients) for num_clients in (100, 300)) <= most_numbers()


def test_a_stack_that_grows_with_the_cohort_is_seen():
    grows = mutant(shipped, ("max_rank=min(self._max_rank or full, full)", "max_rank=10**6"))
    assert numbers_held(grows, 300) > most_numbers()


def test_the_method_of_the_file_keeps_what_every_round_learnt(federation):
    method = method_of("flora")
    adapter, _ = federation(*BOTH)
    adapter = method.finalise(adapter)
    for round_index in range(3):
        assert method.broadcast(adapter, method.block_schedule(round_index, adapter)) == adapter.select(frozenset(BOTH))
        generator = torch.Generator().manual_seed(round_index)
        updates = [
            ClientUpdate(
                client,
                {
                    slot: tensor + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    for slot, tensor in adapter.select(method.block_schedule(round_index, adapter)).items()
                },
                1.0 + client,
                round_index,
            )
            for client in range(3)
        ]
        before = {path: dense(adapter.side[path]) if path in adapter.side else 0.0 for path in PATHS}
        after = method.finalise(method.aggregate(adapter, updates))
        for path in PATHS:
            assert torch.dist(whole(after, path), before[path] + ideal(adapter, updates, path)) < 1e-11
        adapter = after
    assert method.folds and method.mixed_ranks


def test_products_of_layers_that_train_one_factor_keep_its_rank(federation):
    adapter, updates = federation(LORA_B, weights=MANY)
    running = RunningProducts(adapter)
    for update in updates:
        running.add(update)
    assert not running.both
    assert all(len(product.lora_A) == 3 for product in running.products().values())
