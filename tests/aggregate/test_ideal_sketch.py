"""The ideal of large layers and large cohorts: exact while the factors fit, then estimated within what it says.

Mutants this file kills: a layer that claims to be exact while it is estimated, clients that wait and are forgotten,
unweighted clients in the sketch, a deviation of zero, one sketch for what is made and what measures it.
Seeds are fixed; with others a statistical test would fail in fewer than 1 of 1,000 runs.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fedlr.methods.measure.ideal as shipped
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.methods.aggregate.fair import LoraFair, LoraFairRidge
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.measure.diagnostics import aggregation_error, aggregation_error_sd
from tests.training.small_models import mutant

OUT, INTO, RANK = 140, 180, 2
PATH = "layer"
A, B = Slot(PATH, LORA_A), Slot(PATH, LORA_B)
FEW, MANY = 20, 200  # 40 columns, and 400: more than the layer has rank
HELD_BYTES = 8 * (OUT + INTO) * 60  # 30 clients


def federation(num_clients: int, *, groups: int = 1, spread: float = 0.5) -> tuple[AdapterState, list[ClientUpdate]]:
    """Clients around `groups` solutions, far from the broadcast, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = {A: normal(RANK, INTO) / INTO**0.5, B: normal(OUT, RANK)}
    centres = [{slot: t + t.std() * normal(*t.shape) for slot, t in start.items()} for _ in range(groups)]
    updates = []
    for client in range(num_clients):
        centre = centres[client % groups]
        new = {slot: t + spread * t.std() * normal(*t.shape) for slot, t in centre.items()}
        updates.append(ClientUpdate(client, new, 1.0 + client % 3, base_round=0))
    return AdapterState(start, scale=1.0), updates


def dense(updates: Sequence[ClientUpdate]) -> Tensor:
    total = sum(update.weight for update in updates)
    return torch.stack([update.weight / total * update.tensors[B] @ update.tensors[A] for update in updates]).sum(dim=0)


def product(layer: LoraFactors) -> Tensor:
    return layer.lora_B @ layer.lora_A


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "HELD_BYTES", HELD_BYTES)


def test_the_ideal_is_exact_while_the_factors_fit() -> None:
    for num_clients, exact in ((FEW, True), (30, True), (31, False)):
        adapter, updates = federation(num_clients)
        ideal, layer = shipped.Ideal.of(adapter, updates), adapter.factors()[PATH]
        assert ideal.is_exact(PATH) == exact
        assert (ideal.sd(PATH) == 0.0) == (ideal.sd(PATH, layer) == 0.0) == exact
        rel = 1e-12 if exact else 0.01
        assert ideal.norm(PATH) == pytest.approx(float(dense(updates).norm()), rel=rel)
        assert ideal.distance(PATH, layer) == pytest.approx(float(torch.dist(dense(updates), product(layer))), rel=rel)


def test_one_trained_factor_is_exact_whatever_the_cohort() -> None:
    adapter, updates = federation(MANY)
    for slot in (A, B):
        some = [replace(update, tensors={slot: update.tensors[slot]}) for update in updates]
        ideal = shipped.Ideal.of(adapter, some)
        expected = dense([replace(update, tensors={**adapter.tensors, **update.tensors}) for update in some])
        assert ideal.is_exact(PATH) and ideal.norm(PATH) == pytest.approx(float(expected.norm()), rel=1e-12)


def is_as_good_as_it_says(module: ModuleType) -> None:
    """Norms and errors lie within five of their standard deviations, and these are small."""
    for groups in (1, 7):
        adapter, updates = federation(MANY, groups=groups)
        after, expected = weighted_mean(adapter, updates), dense(updates)
        true = float(torch.dist(expected, product(after.factors()[PATH])) / expected.norm())
        for seed in range(20):
            ideal = module.Ideal(adapter, seed=seed)
            assert list(ideal.watch(updates)) == updates
            (error,), (sd,) = aggregation_error(ideal, after).values(), aggregation_error_sd(ideal, after).values()
            assert not ideal.is_exact(PATH)
            assert abs(error - true) < 5 * sd < 0.12 * true
            assert abs(ideal.norm(PATH) - float(expected.norm())) < 5 * ideal.sd(PATH) < 0.05 * expected.norm()
            assert ideal.norm(PATH) == ideal.norm(PATH)  # reading changes nothing


def test_an_estimate_is_as_good_as_it_says() -> None:
    is_as_good_as_it_says(shipped)


@pytest.mark.parametrize(
    "change",
    [
        ("return self._sketched is None", "return True"),
        ("        if self._folded_DK is not None or self._sketched is not None:\n            self._fold()\n", ""),
        ("lora_B.double() * weight for", "lora_B.double() * 1.8 for"),
        ("self._sketched.norm(total=total, less=layer)", "(self._sketched.norm(total=total, less=layer)[0], 0.0)"),
    ],
    ids=["claims to be exact", "forgets who waits", "no weights", "no deviation"],
)
def test_estimates_that_are_worse_than_they_say_are_seen(change: tuple[str, str]) -> None:
    changed = mutant(shipped, change, ("HELD_BYTES = 2**26", f"HELD_BYTES = {HELD_BYTES}"))
    with pytest.raises(AssertionError):
        is_as_good_as_it_says(changed)


def never_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ideals hold every factor."""
    monkeypatch.setattr(shipped, "min", lambda *numbers: 10**6, raising=False)


@pytest.mark.parametrize(("groups", "tolerance"), [(1, 0.2), (3, 0.1)])
def test_what_lora_fair_neglects_is_small_and_bounded(
    groups: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, updates = federation(MANY, groups=groups)
    mean = weighted_mean(adapter, updates).factors()[PATH]
    covariance, right = dense(updates) - product(mean), mean.lora_A.T
    close = shipped.Ideal.of(adapter, updates).times(PATH, right, elsewhere=mean) - product(mean) @ right
    never_sketched(monkeypatch)
    exact = shipped.Ideal.of(adapter, updates).times(PATH, right, elsewhere=mean) - product(mean) @ right
    assert torch.allclose(exact, covariance @ right, atol=1e-12)
    assert 0 < torch.dist(close, exact) < tolerance * exact.norm()
    known = [adapter.tensors[A], weighted_mean(adapter, updates[:31]).tensors[A]]
    basis = torch.linalg.qr(torch.cat(known).T).Q
    outside = right - basis @ (basis.T @ right)
    assert torch.dist(close, exact) <= covariance.norm() * torch.linalg.matrix_norm(outside, ord=2)


@pytest.mark.parametrize("rule", [LoraFairRidge(), LoraFair(penalty=0.001, num_steps=99, lr=0.1)], ids=["ridge", "sgd"])
def test_lora_fair_over_a_large_cohort_is_close_to_the_exact_one(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, updates = federation(MANY, groups=3)
    mean = weighted_mean(adapter, updates).tensors[B]
    close = rule(adapter, iter(updates)).tensors[B]
    never_sketched(monkeypatch)
    exact = rule(adapter, iter(updates)).tensors[B]
    assert 0 < torch.dist(close, exact) < 0.1 * torch.dist(exact, mean)


def test_lora_fair_has_a_sketch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round's estimate would be off for an aggregate that was made from the same random numbers."""
    adapter, updates = federation(MANY)
    seeds, gaussian = [], shipped._gaussian
    monkeypatch.setattr(shipped, "_gaussian", lambda seed, size: seeds.append(seed) or gaussian(seed, size))
    LoraFairRidge()(adapter, shipped.Ideal(adapter).watch(updates))
    assert len(seeds) == len(set(seeds)) == 2


class Largest(TorchDispatchMode):
    """The most numbers that any operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("rule", [weighted_mean, LoraFairRidge(), LoraFair(num_steps=5)], ids=["mean", "ridge", "sgd"])
def test_no_matrix_of_the_size_of_a_product_is_ever_made(rule: Any) -> None:
    adapter, updates = federation(MANY)
    with Largest() as largest:
        ideal = shipped.Ideal(adapter)
        after = rule(adapter, ideal.watch(updates))
        aggregation_error(ideal, after)
        aggregation_error_sd(ideal, after)
    assert 10 * (OUT + INTO) < largest.numbers < OUT * INTO
    with Largest() as dense_one:
        product(after.factors()[PATH])
    assert dense_one.numbers >= OUT * INTO


def test_what_a_side_gained_counts_as_part_of_the_aggregate() -> None:
    """An exact residual beside the means leaves no error, over whatever side there was."""
    adapter, updates = federation(FEW)
    old = LoraFactors(adapter.tensors[A].flip(1), adapter.tensors[B].flip(0))
    adapter = replace(adapter, side={PATH: old})
    ideal, mean = shipped.Ideal.of(adapter, updates), weighted_mean(adapter, updates)
    U, S, Vh = torch.linalg.svd(dense(updates) - product(mean.factors()[PATH]), full_matrices=False)
    new = LoraFactors(torch.cat([old.lora_A, Vh]), torch.cat([old.lora_B, U * S], dim=1))
    (without,) = aggregation_error(ideal, mean).values()
    (whole,) = aggregation_error(ideal, replace(mean, side={PATH: new})).values()
    assert whole < 1e-12 < 0.01 < without
    (gone,) = aggregation_error(ideal, replace(mean, side={})).values()
    expected = torch.dist(dense(updates), product(mean.factors()[PATH]) - product(old)) / dense(updates).norm()
    assert gone == pytest.approx(float(expected), rel=1e-12)
