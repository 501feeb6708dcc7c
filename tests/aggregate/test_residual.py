"""FedEx-LoRA: FedIT's mean, and beside it exactly what FedIT misses: property (17). No layer here is square but one.

Mutants killed: the plain mean that the authors' code takes, of factors and of heads; a residual that is transposed
(their code again), also in a square layer, where no shape gives it away; a mean that is added and not subtracted; half
the sum of products; a residual that replaces those of earlier rounds, lacks one of its ranks, or is not there at all.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fedlr.methods.aggregate.residual as shipped
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.residual import ExactResidual
from tests.methods_of_files import method_of
from tests.training.small_models import mutant

BOTH = (LORA_A, LORA_B)
MANY = tuple(1.0 + k % 5 for k in range(40))
SQUARE = {Slot("layer", LORA_A): (2, 8), Slot("layer", LORA_B): (8, 2)}

Rule = Callable[[AdapterState, list[ClientUpdate]], AdapterState]


def dense(layer: LoraFactors) -> Tensor:
    return layer.lora_B.double() @ layer.lora_A.double()


def ideal(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> Tensor:
    """sum_k p_k B_k A_k by the definition, D x K."""
    total = sum(update.weight for update in updates)
    return sum(u.weight / total * dense(adapter.with_tensors(u.tensors).factors()[path]) for u in updates)


def is_exact(rule: Rule, adapter: AdapterState, updates: list[ClientUpdate]) -> bool:
    """Whether side and factors grow to the ideal beside the former side, in every layer."""
    after = rule(adapter, updates)
    for path, layer in after.factors().items():
        expected = ideal(adapter, updates, path)
        expected += dense(adapter.side[path]) if path in adapter.side else 0.0
        side = dense(after.side[path]) if path in after.side else torch.zeros_like(expected)
        if side.shape != expected.shape or torch.dist(dense(layer) + side, expected) > 1e-11:
            return False
    return True


def square_federation() -> tuple[AdapterState, list[ClientUpdate]]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> dict[Slot, Tensor]:
        return {s: torch.randn(shape, generator=generator, dtype=torch.float64) for s, shape in SQUARE.items()}

    return AdapterState(normal(), scale=0.5), [ClientUpdate(k, normal(), 1.0 + k, 0) for k in range(3)]


def with_side(adapter: AdapterState) -> AdapterState:
    return replace(
        adapter,
        side={path: LoraFactors(f.lora_A[:2], f.lora_B[:, :2].flip(1)) for path, f in adapter.factors().items()},
    )


@pytest.mark.parametrize("weights", [(3.0,), (1.0, 2.0, 5.0, 8.0), MANY], ids=len)
@pytest.mark.parametrize("trained", [BOTH, (LORA_A,), (LORA_B,), (*BOTH, HEAD)], ids="+".join)
def test_mean_and_side_are_exactly_the_sum_of_the_products(federation, trained, weights):  # (17)
    adapter, updates = federation(*trained, weights=weights)
    assert is_exact(ExactResidual(), adapter, updates)
    assert is_exact(ExactResidual(), with_side(adapter), updates)


def test_residuals_of_several_rounds_add_up(federation):
    adapter, updates = federation(*BOTH)
    for round_index in range(4):
        generator = torch.Generator().manual_seed(round_index)
        updates = [
            replace(u, tensors={s: t + torch.randn(t.shape, generator=generator) for s, t in u.tensors.items()})
            for u in updates
        ]
        assert is_exact(ExactResidual(), adapter, updates)
        adapter = ExactResidual()(adapter, updates)
    assert len(adapter.side["layer.0"].lora_A) == 12 and len(adapter.side["layer.1"].lora_A) == 7


def test_everything_but_the_side_is_fedit(federation):
    adapter, updates = federation(*BOTH, HEAD)
    after = ExactResidual()(adapter, updates)
    assert replace(after, side={}).fingerprint() == weighted_mean(adapter, updates).fingerprint()


def test_the_residual_is_the_weighted_covariance_in_its_rank(federation):
    adapter, updates = federation(*BOTH, weights=(1.0, 2.0, 5.0))
    mean, side = weighted_mean(adapter, updates).factors(), ExactResidual()(adapter, updates).side
    for path, layer in mean.items():
        covariance = sum(
            u.weight
            / 8
            * (u.tensors[Slot(path, LORA_B)] - layer.lora_B)
            @ (u.tensors[Slot(path, LORA_A)] - layer.lora_A)
            for u in updates
        )
        assert torch.dist(dense(side[path]), covariance) < 1e-12 < covariance.norm()
        assert len(side[path].lora_A) == 2 * 3  # (C - 1) R: what goes down
        assert side[path].lora_B.shape[1] == 2 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_coarse_dtype_it_is_exact_to_rounding(federation, dtype):
    adapter, updates = federation(*BOTH, dtype=dtype)
    after = ExactResidual()(adapter, updates)
    for path, layer in after.factors().items():
        assert {layer.lora_A.dtype, after.side[path].lora_A.dtype, after.side[path].lora_B.dtype} == {dtype}
        expected = ideal(adapter, updates, path)
        error = torch.dist(dense(layer) + dense(after.side[path]), expected)
        assert error < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("trained", [(LORA_A,), (LORA_B,), (HEAD,)], ids="+".join)
def test_the_side_is_left_alone_where_the_mean_is_exact(federation, trained):
    adapter, updates = federation(*trained)
    adapter = with_side(adapter)
    assert ExactResidual()(adapter, updates).side is adapter.side


def test_the_side_is_left_alone_with_one_client_and_with_one_factor_for_all(federation):
    adapter, updates = federation(*BOTH)
    assert not ExactResidual()(adapter, updates[:1]).side
    for shared in BOTH:
        same = {slot: tensor for slot, tensor in updates[0].tensors.items() if slot.role == shared}
        alike = [replace(update, tensors={**update.tensors, **same}) for update in updates]
        assert not ExactResidual()(adapter, alike).side


def test_a_layer_that_trains_one_factor_is_left_alone_beside_one_that_trains_both(federation):
    adapter, updates = federation(*BOTH)
    only = {Slot("layer.1", LORA_A)}
    updates = [replace(u, tensors={s: t for s, t in u.tensors.items() if s not in only}) for u in updates]
    assert is_exact(ExactResidual(), adapter, updates)
    assert ExactResidual()(adapter, updates).side.keys() == {"layer.0"}


@pytest.mark.parametrize("max_rank", [1, 4, 8])
def test_a_side_above_max_rank_is_the_best_approximation_of_that_rank(federation, max_rank):
    adapter, updates = federation(*BOTH)
    exact, cut = ExactResidual()(adapter, updates).side, ExactResidual(max_rank=max_rank)(adapter, updates).side
    for path, layer in exact.items():
        assert len(cut[path].lora_A) == min(max_rank, len(layer.lora_A))
        tail = torch.linalg.svdvals(dense(layer))[max_rank:].norm()
        assert float(torch.dist(dense(cut[path]), dense(layer))) == pytest.approx(float(tail), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("max_rank", [0, -3])
def test_a_rank_that_is_none_is_refused(max_rank):
    with pytest.raises(InputError, match=f"Expected max_rank to be at least 1, or null .*, got {max_rank}"):
        ExactResidual(max_rank=max_rank)


def test_the_order_and_the_scale_of_the_weights_do_not_matter(federation):  # (18)
    adapter, updates = federation(*BOTH)
    after = ExactResidual()(adapter, updates)
    for changed in (updates[::-1], [replace(update, weight=update.weight * 1024) for update in updates]):
        other = ExactResidual()(adapter, iter(changed))
        assert all(torch.dist(dense(other.side[path]), dense(side)) < 1e-12 for path, side in after.side.items())


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5)])
def test_weights_that_are_no_weights_are_refused(federation, weights):
    adapter, updates = federation(*BOTH, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        ExactResidual()(adapter, updates)


# Mistakes of public code, and ours. Each must fail the property that the real rule passes above.


def an_unweighted_mean(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    return ExactResidual()(adapter, [replace(update, weight=1.0) for update in updates])


def a_transposed_residual(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    """GPT-2's Conv1D keeps W^T; nn.Linear does not."""
    after = ExactResidual()(adapter, updates)
    side = {path: LoraFactors(layer.lora_B.T, layer.lora_A.T) for path, layer in after.side.items()}
    return replace(after, side=side)


def only_the_last_round(adapter: AdapterState, updates: list[ClientUpdate]) -> AdapterState:
    return ExactResidual()(replace(adapter, side={}), updates)


def from_source(*change: str) -> Rule:
    return lambda adapter, updates: mutant(shipped, tuple(change)).ExactResidual()(adapter, updates)


@pytest.mark.parametrize(
    "mistake",
    [
        an_unweighted_mean,
        a_transposed_residual,
        only_the_last_round,
        weighted_mean,
        from_source("weight=-1.0", "weight=1.0"),
        from_source("total.add(product)", "total.add(product, weight=0.5)"),
    ],
    ids=["unweighted", "transposed", "last round only", "no residual", "mean added", "half the sum"],
)
def test_a_mistake_is_not_exact(federation, mistake):
    adapter, updates = federation(*BOTH)
    assert not is_exact(mistake, with_side(adapter), updates)
    adapter, updates = square_federation()
    assert is_exact(ExactResidual(), with_side(adapter), updates)
    assert not is_exact(mistake, with_side(adapter), updates)


def test_a_rank_too_few_is_seen(federation):
    adapter, updates = federation(*BOTH, weights=(1.0, 2.0, 5.0))  # two of rank 3: below the full rank of layer.0
    assert is_exact(ExactResidual(), adapter, updates)
    assert not is_exact(from_source("(num_clients - 1) * len(mean.lora_A)", "5"), adapter, updates)


def test_a_head_averaged_without_weights_is_seen(federation):
    slot = Slot("head.weight", HEAD)
    adapter, updates = federation(*BOTH, HEAD)
    expected = sum(update.weight / 16 * update.tensors[slot] for update in updates)
    assert torch.dist(ExactResidual()(adapter, updates).tensors[slot], expected) < 1e-12
    assert torch.dist(an_unweighted_mean(adapter, updates).tensors[slot], expected) > 0.1


def test_the_method_of_the_file_is_exact_round_after_round(federation):
    method = method_of("fedex_lora")
    adapter, _ = federation(*BOTH)
    for round_index in range(3):
        generator = torch.Generator().manual_seed(round_index)
        trained = adapter.select(method.block_schedule(round_index, adapter))
        updates = [
            ClientUpdate(
                client, {s: t + torch.randn(t.shape, generator=generator) for s, t in trained.items()}, 1.0, round_index
            )
            for client in range(3)
        ]
        assert is_exact(lambda a, u: method.finalise(method.aggregate(a, u)), adapter, updates)
        adapter = method.aggregate(adapter, updates)
    assert method.folds and not method.mixed_ranks and method.name == "fedex_lora"
