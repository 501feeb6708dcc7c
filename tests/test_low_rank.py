"""Sums of low-rank products: exact while they fit, honest about what was dropped, and estimated within what is stated.

Mutants this file kills: a weight on both factors, no weight, a cut that keeps wrong rows, a bound that forgets all
cuts but the last, zero rows for a sum of small rank, one pass of Gram-Schmidt, a sum that shares the caller's tensors;
a sketch that is not divided by its columns, one that counts tracked directions twice, half the variance.
Statistical tests draw from fixed seeds; with other seeds one would fail in fewer than 1 of 1,000 runs.
"""

from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean, pstdev
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fedlr.adapters.low_rank as shipped
from fedlr.adapters.factors import svd_refactor
from fedlr.adapters.low_rank import LowRankSum, completed_rows
from fedlr.adapters.state import LoraFactors
from fedlr.errors import InputError
from tests.training.small_models import mutant

OUT, INTO = 30, 22
WEIGHTS = (1.0, 0.25, -3.0, 7.0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(rank: int, seed: int, *, out: int = OUT, into: int = INTO) -> LoraFactors:
    return LoraFactors(normal(rank, into, seed=2 * seed), normal(out, rank, seed=2 * seed + 1))


def product(layer: LoraFactors) -> Tensor:
    return layer.lora_B.double() @ layer.lora_A.double()


def best(dense: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(dense)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def gathered(module: ModuleType, parts: list[tuple[LoraFactors, float]], *, max_rank: int) -> LowRankSum:
    total = module.LowRankSum(max_rank=max_rank)
    for layer, weight in parts:
        total.add(layer, weight)
    return total


def dense_sum(parts: list[tuple[LoraFactors, float]]) -> Tensor:
    return torch.stack([weight * product(layer) for layer, weight in parts]).sum(dim=0)


def is_exact_while_it_fits(module: ModuleType) -> None:
    parts = [
        (factors(rank, seed), weight) for seed, (rank, weight) in enumerate(zip((3, 1, 5, 2), WEIGHTS, strict=True))
    ]
    expected = dense_sum(parts)
    total = gathered(module, parts, max_rank=11)
    found = total.factors()
    assert found.lora_A.shape == (11, INTO) and found.lora_B.shape == (OUT, 11)
    assert torch.dist(product(found), expected) < 1e-12 * expected.norm() and total.dropped == 0.0
    assert torch.dist(product(total.truncated(11)), expected) < 1e-12 * expected.norm()


def test_a_sum_of_different_ranks_is_exact_while_it_fits() -> None:
    is_exact_while_it_fits(shipped)


@pytest.mark.parametrize(
    "change",
    [
        ("factors.lora_A.to(torch.float64, copy=True)", "factors.lora_A.double() * weight"),
        ("factors.lora_B.double() * weight", "factors.lora_B.double()"),
    ],
    ids=["weight on both factors", "no weight"],
)
def test_sums_of_wrong_weights_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        is_exact_while_it_fits(mutant(shipped, change))


@pytest.mark.parametrize(("out", "into"), [(OUT, INTO), (9, 40), (40, 9)])
def test_a_sum_that_may_have_full_rank_drops_only_rounding(out: int, into: int) -> None:
    parts = [(factors(4, seed, out=out, into=into), 1.0 + seed % 3) for seed in range(60)]
    total, expected = gathered(shipped, parts, max_rank=min(out, into)), dense_sum(parts)
    assert torch.dist(product(total.factors()), expected) < 1e-12 * expected.norm()
    assert total.dropped == 0.0
    assert len(total.factors().lora_A) == min(out, into)


@pytest.mark.parametrize("rank", [1, 4, 12, INTO])
def test_truncation_is_the_best_approximation_of_that_rank(rank: int) -> None:
    parts = [(factors(3, seed), weight) for seed, weight in enumerate(WEIGHTS)]
    found, expected = gathered(shipped, parts, max_rank=12).truncated(rank), dense_sum(parts)
    assert torch.dist(product(found), best(expected, rank)) < 1e-12 * expected.norm()
    norms = found.lora_B.norm(dim=0)
    assert torch.allclose(norms[:12], torch.linalg.svdvals(expected)[:rank][:12]) and (norms.diff() <= 0).all()
    assert not norms[12:].any()
    gram = found.lora_B.T @ found.lora_B
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-10)
    assert torch.allclose(found.lora_A @ found.lora_A.T, torch.eye(rank, dtype=torch.float64), atol=1e-13)
    assert (found.lora_A.gather(1, found.lora_A.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_redistributing_over_clients_of_one_lora_A_is_fedsvds_step() -> None:  # methods.md (19)
    shared = normal(4, INTO, seed=1)
    layers = [LoraFactors(shared, normal(OUT, 4, seed=10 + k)) for k in range(6)]
    mean_B = torch.stack([layer.lora_B * (k + 1) / 21 for k, layer in enumerate(layers)]).sum(dim=0)
    expected = svd_refactor(LoraFactors(shared, mean_B))
    for max_rank in (4, 100):  # compressed on the way, which drops nothing, or not
        total = gathered(shipped, [(layer, (k + 1) / 21) for k, layer in enumerate(layers)], max_rank=max_rank)
        found = total.truncated(4, like=shared)
        assert torch.allclose(found.lora_A, expected.lora_A, atol=1e-12)
        assert torch.allclose(found.lora_B, expected.lora_B, atol=1e-11) and total.dropped < 1e-12


def test_a_rank_deficient_mean_keeps_the_row_space_of_the_shared_lora_A() -> None:
    shared, narrow = normal(4, INTO, seed=1), normal(OUT, 4, seed=2)
    narrow[:, 2:] = narrow[:, :2]
    total = gathered(shipped, [(LoraFactors(shared, narrow), 1.0)], max_rank=4)
    new = total.truncated(4, like=shared).lora_A
    assert torch.allclose(shared @ new.T @ new, shared, atol=1e-12)
    assert not torch.allclose(shared @ (other := total.truncated(4).lora_A).T @ other, shared, atol=0.1)


def says_what_it_dropped(module: ModuleType) -> None:
    """The bound holds, is reached by less than the number of cuts, and the best directions survive the cuts."""
    for seed in range(5):
        signal = factors(2, 1000 + seed)
        parts = [
            (LoraFactors(signal.lora_A + noise.lora_A / 5, signal.lora_B + noise.lora_B / 5), 1.0)
            for noise in (factors(2, 100 * seed + k) for k in range(40))
        ]
        total, expected = gathered(module, parts, max_rank=6), dense_sum(parts)
        error = torch.dist(product(total.factors()), expected)
        assert 0 < error <= total.dropped * (1 + 1e-12)
        assert total.dropped < 20 * error  # 12 cuts
        optimal = torch.dist(best(expected, 6), expected)
        assert error < 1.5 * optimal
        assert torch.dist(product(total.truncated(2)), best(expected, 2)) < 0.05 * expected.norm()
        assert len(total.factors().lora_A) <= 6


def test_a_compressed_sum_says_what_it_dropped() -> None:
    says_what_it_dropped(shipped)


@pytest.mark.parametrize(
    "change",
    [
        ("self._dropped += ", "self._dropped = "),
        ("LoraFactors(best.lora_A[: self._max_rank]", "LoraFactors(best.lora_A[-self._max_rank :]"),
    ],
    ids=["only the last cut", "wrong rows"],
)
def test_sums_that_drop_in_silence_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        says_what_it_dropped(mutant(shipped, change))


def test_the_order_of_clients_matters_only_within_what_was_dropped() -> None:
    parts = [(factors(2, k), 1.0 + k % 4) for k in range(30)]
    shuffled = [parts[k] for k in torch.randperm(30, generator=torch.Generator().manual_seed(3)).tolist()]
    one, other = (gathered(shipped, some, max_rank=60).factors() for some in (parts, shuffled))
    assert torch.dist(product(one), product(other)) < 1e-12 * product(one).norm()
    cut, other_cut = (gathered(shipped, some, max_rank=5) for some in (parts, shuffled))
    distance = torch.dist(product(cut.factors()), product(other_cut.factors()))
    assert 1e-3 < distance <= cut.dropped + other_cut.dropped


def completes(module: ModuleType) -> None:
    rows = torch.linalg.qr(normal(INTO, 3, seed=4)).Q.T
    like = normal(5, INTO, seed=5)
    like[0], like[1] = rows[0] + rows[1], rows[2] + 1e-5 * like[1]  # nothing new, and next to nothing
    new = module.completed_rows(rows, 7, like=like)
    assert torch.equal(new[:3], rows)
    assert (new @ new.T - torch.eye(7, dtype=torch.float64)).abs().max() < 1e-14
    assert torch.allclose(like @ new.T @ new, like, atol=1e-12)  # 3 rows and 4 new directions
    assert torch.equal(module.completed_rows(rows, 7, like=like), new)
    whole = module.completed_rows(rows, INTO, like=like[:2])  # unit vectors, and all of them if need be
    assert torch.allclose(whole @ whole.T, torch.eye(INTO, dtype=torch.float64), atol=1e-14)


def test_missing_rows_are_completed_to_orthonormal_ones() -> None:
    completes(shipped)


@pytest.mark.parametrize(
    "change",
    [("for _ in range(2):", "for _ in range(1):"), ("if size > smallest:", "if size > 0:"), ("like.double()]", "[]]")],
    ids=["one pass", "rounding taken for a direction", "ignores like"],
)
def test_rows_that_are_badly_completed_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        completes(mutant(shipped, change))


@pytest.mark.parametrize("like", [None, normal(3, INTO, seed=8).float()], ids=["alone", "like"])
def test_a_sum_of_zero_has_rows_that_can_train(like: Tensor | None) -> None:
    one = factors(2, 0)
    cancelling = [(one, 1.0), (one, -1.0)]
    empty = LoraFactors(torch.zeros(0, INTO), torch.zeros(OUT, 0))
    zero = LoraFactors(torch.zeros(2, INTO), torch.zeros(OUT, 2))
    for parts in (cancelling, [(empty, 1.0)], [(zero, 1.0)], [(zero, 1.0)] * 9):
        total = gathered(shipped, parts, max_rank=3)
        found = total.truncated(3, like=like)
        assert not found.lora_B.any() and found.lora_B.shape == (OUT, 3)
        assert torch.allclose(found.lora_A @ found.lora_A.T, torch.eye(3, dtype=torch.float64), atol=1e-13)
        if like is not None:
            assert torch.allclose(like.double() @ found.lora_A.T @ found.lora_A, like.double(), atol=1e-12)
        assert product(total.factors()).norm() < 1e-14


def test_reading_changes_nothing_and_the_callers_tensors_are_not_kept() -> None:
    one = factors(2, 0)
    total, expected = gathered(shipped, [(one, 2.0)], max_rank=4), 2 * product(one)
    one.lora_A.zero_(), one.lora_B.zero_()
    for _ in range(2):
        assert torch.dist(product(total.truncated(1)), best(expected, 1)) < 1e-12
        assert torch.dist(product(total.factors()), expected) < 1e-12 and total.dropped == 0.0


def held(total: LowRankSum) -> Iterator[Tensor]:
    for layer in total._stack:
        yield from (layer.lora_A, layer.lora_B)


def test_memory_does_not_grow_with_the_summands() -> None:
    total, most = LowRankSum(max_rank=4), 0
    for k in range(300):
        total.add(factors(2, k % 7))
        most = max(most, sum(t.untyped_storage().nbytes() for t in held(total)))
    assert most <= 8 * (2 * 4 + 2) * (OUT + INTO)


def test_sums_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="max_rank to be at least 1, got 0"):
        LowRankSum(max_rank=0)
    total = LowRankSum(max_rank=3)
    with pytest.raises(ValueError, match="at least one summand"):
        total.factors()
    total.add(factors(2, 0))
    for rank in (0, INTO + 1):
        with pytest.raises(InputError, match=f"from 1 to the layer's {INTO} in_features, got {rank}"):
            total.truncated(rank)
    with pytest.raises(ValueError, match="`like` to have"):
        total.truncated(2, like=torch.zeros(2, INTO + 1))
    one = factors(2, 1)
    for wrong in (factors(2, 1, out=OUT + 1), LoraFactors(one.lora_A[:1], one.lora_B)):
        with pytest.raises(ValueError, match="of one rank and of a"):
            total.add(wrong)
    with pytest.raises(ValueError, match="finite weight"):
        total.add(one, weight=float("nan"))
    for name in ("lora_A", "lora_B"):
        with pytest.raises(ValueError, match=f"finite numbers in {name}"):
            total.add(LoraFactors(**{**vars(one), name: getattr(one, name) / 0}))


# A matrix of one direction beside the tracked ones, which a sketch sees worst, and one of many.
COLUMNS, DRAWS = 32, 400


def estimates(module: ModuleType, dense: Tensor, tracked: Tensor, less: LoraFactors) -> list[tuple[float, float]]:
    out, into = dense.shape
    found = []
    for seed in range(DRAWS):
        total = module.SketchedSum(tracked, normal(into, COLUMNS, seed=5000 + seed), out)
        total.add(LoraFactors(2 * torch.eye(into, dtype=torch.float64)[: into // 2], dense[:, : into // 2]))
        total.add(LoraFactors(torch.eye(into, dtype=torch.float64)[into // 2 :], 2 * dense[:, into // 2 :]))
        found.append(total.norm(total=2.0, less=less))
    return found


def is_as_good_as_it_says(module: ModuleType, rank: int) -> None:
    tracked = torch.linalg.qr(normal(INTO, 3, seed=1)).Q
    dense = normal(OUT, rank, seed=2) @ normal(rank, INTO, seed=3) + 2 * normal(OUT, 3, seed=4) @ tracked.T
    less = factors(1, 6) if rank > 1 else LoraFactors(tracked.T[:1], normal(OUT, 1, seed=7))
    true = float(torch.dist(dense, product(less)))
    found = estimates(module, dense, tracked, less)
    norms, stated = [norm for norm, _ in found], fmean(sd for _, sd in found)
    assert fmean(norm**2 for norm in norms) == pytest.approx(true**2, abs=5 * 2 * true * stated / DRAWS**0.5)
    assert pstdev(norms) == pytest.approx(stated, rel=5 * (2 * DRAWS) ** -0.5)
    assert all(abs(norm - true) < 5 * stated for norm in norms)


@pytest.mark.parametrize("rank", [1, 15])
def test_a_sketched_norm_is_as_good_as_it_says(rank: int) -> None:
    is_as_good_as_it_says(shipped, rank)


@pytest.mark.parametrize(
    "change",
    [
        ("float(gram_PP.trace()) / num_columns", "float(gram_PP.trace()) / (num_columns - 2)"),
        ("        sketched_DP.addmm_(exact_DQ, self._overlap_QP, alpha=-1)\n", ""),
        ("variance = 2 / num_columns", "variance = 1 / num_columns"),
        ("products = float(gram_PP.square().sum() - gram_PP.diagonal().square().sum())", "products = 0.0"),
    ],
    ids=["columns", "tracked twice", "half the variance", "no deviation"],
)
def test_sketches_that_are_worse_than_they_say_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        is_as_good_as_it_says(mutant(shipped, change), 1)


def test_a_sketch_is_exact_within_the_tracked_directions() -> None:
    tracked = torch.linalg.qr(normal(INTO, 4, seed=1)).Q
    total = shipped.SketchedSum(tracked, normal(INTO, COLUMNS, seed=2), OUT)
    inside, mixed = LoraFactors(normal(3, 4, seed=3) @ tracked.T, normal(OUT, 3, seed=4)), factors(2, 9)
    total.add(inside)
    norm, sd = total.norm(total=4.0)
    assert norm == pytest.approx(float(product(inside).norm()) / 4, rel=1e-12) and sd < 1e-12
    elsewhere, right = factors(2, 11), normal(INTO, 2, seed=5)
    total.add(mixed)
    projector = tracked @ tracked.T
    dense = (product(inside) + product(mixed)) / 4
    expected = dense @ projector @ right + product(elsewhere) @ (right - projector @ right)
    assert torch.allclose(total.times(right, total=4.0, elsewhere=elsewhere), expected, atol=1e-12)


def test_completed_rows_of_nothing_are_unit_vectors() -> None:
    rows = completed_rows(torch.zeros(0, 5, dtype=torch.float64), 3)
    assert torch.equal(rows, torch.eye(5, dtype=torch.float64)[:3])
    assert all(a.argmax() < b.argmax() for a, b in pairwise(rows))
