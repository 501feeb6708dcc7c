"""Sums of low-rank products, sum_k w_k B_k A_k of one layer, gathered one by one and never as a D x K matrix.

`LowRankSum` keeps factors, and says how much it had to drop: what a rule redistributes, stacks or merges.
`SketchedSum` keeps the sum's products with a few vectors: enough to estimate its norm, and its distance from an
adapter, however high its rank. Both read released tensors only, so they are post-processing.
Legend: D out_features, K in_features, R rank of one product, M columns held, Q tracked directions, P sketch columns.
"""

import math

import torch
from torch import Tensor

from fedlr.adapters.factors import row_signs
from fedlr.adapters.state import LoraFactors
from fedlr.errors import InputError


class LowRankSum:
    """sum_k w_k B_k A_k of one layer as factors, in float64, in memory that does not grow with the summands.

    Exact to rounding while at most 2 max_rank columns were added. Then, and whenever so many are held again, what is
    held is cut to its best approximation of rank max_rank: a QR of both stacks and an SVD of the small core (FlexLoRA,
    Bai et al. 2024, https://arxiv.org/abs/2402.11505, made incremental). A cut that drops something costs accuracy for
    good: later summands cannot bring it back, so the order of the summands then matters, within `dropped`.

    Guarantees: at most 2 max_rank + R columns are held, 8 (D + K) bytes each; max_rank >= min(D, K) never drops more
    than rounding; a summand costs O((D + K) max_rank R) on average.

    >>> total = LowRankSum(max_rank=2)
    >>> total.add(LoraFactors(lora_A=torch.tensor([[3.0, 4.0]]), lora_B=torch.ones(1, 1)), weight=2.0)
    >>> round(total.truncated(1).lora_B.item(), 4), total.dropped
    (10.0, 0.0)
    """

    def __init__(self, *, max_rank: int) -> None:
        """Start at nothing.

        Raises: InputError if max_rank is below 1.
        """
        if max_rank < 1:
            raise InputError(f"Expected max_rank to be at least 1, got {max_rank}")
        self._max_rank = max_rank
        self._stack: list[LoraFactors] = []
        self._num_columns = 0
        self._dropped = 0.0

    @property
    def dropped(self) -> float:
        """An upper bound of the Frobenius distance of what is held from the sum: the norms of all cuts, added."""
        return self._dropped

    def add(self, factors: LoraFactors, weight: float = 1.0) -> None:
        """Add weight * lora_B @ lora_A; the weight, of any sign, goes on lora_B only.

        Raises: ValueError for a number that is not finite, or for factors that do not fit each other or the sum.
        """
        rank, in_features = factors.lora_A.shape
        out_features, columns = factors.lora_B.shape
        shape = (out_features, in_features)
        held = self._stack[0] if self._stack else factors
        expected = (len(held.lora_B), held.lora_A.shape[1])
        if columns != rank or shape != expected:
            raise ValueError(f"Expected factors of one rank and of a {expected} layer, got {columns}, {rank}, {shape}")
        if not math.isfinite(weight):
            raise ValueError(f"Expected a finite weight, got {weight}")
        for name, factor in (("lora_A", factors.lora_A), ("lora_B", factors.lora_B)):
            if not torch.isfinite(factor).all():
                raise ValueError(f"Expected finite numbers in {name}, got at least one NaN or infinity")
        # A copy also where the dtype is the same: the sum must not change with the caller's tensors.
        lora_A = factors.lora_A.to(torch.float64, copy=True)
        self._stack.append(LoraFactors(lora_A, factors.lora_B.double() * weight))
        self._num_columns += rank
        if self._num_columns > 2 * self._max_rank:
            self._cut()

    def factors(self) -> LoraFactors:
        """Return the sum as (M, K) and (D, M) factors in float64, M at most max_rank.

        The factors of the summands, one after the other, while they are no more; else what is held is cut first, and
        the cut counts in `dropped`.

        Raises: ValueError before anything was added.
        """
        if self._num_columns > self._max_rank:
            self._cut()
        return self._stacked()

    def truncated(self, rank: int, *, like: Tensor | None = None) -> LoraFactors:
        """Return the best approximation of this rank of what is held: V^T as lora_A, U S as lora_B, in float64.

        Rows of lora_A are orthonormal, columns of lora_B orthogonal and descending, signs those of `svd_refactor`.
        Where the sum has a smaller rank, columns of lora_B are zero and lora_A is completed to orthonormal rows,
        because a zero row beside a zero column would never train: by the rows of `like`, another lora_A of any rank, as
        far as they leave the span, then by unit vectors. No random number is drawn. Neither what is held nor `dropped`
        changes.

        Raises: ValueError before anything was added, or if `like` is of another layer; InputError if the rank is below
            1 or above the layer's in_features.
        """
        stacked = self._stacked()
        in_features = stacked.lora_A.shape[1]
        if not 1 <= rank <= in_features:
            raise InputError(f"Expected a rank from 1 to the layer's {in_features} in_features, got {rank}")
        if like is not None and like.shape[1] != in_features:
            raise ValueError(f"Expected `like` to have {in_features} in_features, got {like.shape[1]}")
        best = _svd(stacked)
        found = min(rank, len(best.lora_A))
        lora_A = completed_rows(best.lora_A[:found], rank, like=like)
        lora_B = stacked.lora_B.new_zeros(len(stacked.lora_B), rank)
        lora_B[:, :found] = best.lora_B[:, :found]
        signs_R1 = row_signs(lora_A)
        return LoraFactors(lora_A * signs_R1, lora_B * signs_R1.T)

    def _cut(self) -> None:
        best = _svd(self._stacked())
        self._dropped += float(best.lora_B[:, self._max_rank :].norm())
        kept = LoraFactors(best.lora_A[: self._max_rank].clone(), best.lora_B[:, : self._max_rank].clone())
        self._stack, self._num_columns = [kept], len(kept.lora_A)

    def _stacked(self) -> LoraFactors:
        if not self._stack:
            raise ValueError("Expected at least one summand, got none")
        if len(self._stack) > 1:
            lora_A = torch.cat([one.lora_A for one in self._stack])
            self._stack = [LoraFactors(lora_A, torch.cat([one.lora_B for one in self._stack], dim=1))]
        return self._stack[0]


class SketchedSum:
    """sum_k w_k B_k A_k of one layer, seen through Q tracked directions and a Gaussian sketch of everything else.

    The right side is split by the projector T T^T on the tracked directions: X T (D, Q) is exact, and of X (I - T T^T)
    the product with a random matrix S (K, P) is kept. ||X T||^2 + ||X (I - T T^T) S||^2 / P is an unbiased estimate of
    ||X||_F^2 (Hutchinson 1990; the split: Meyer et al. 2021, Hutch++, https://arxiv.org/abs/2010.09649) for every X
    that does not depend on S. Its variance is 2 / P times ||Y Y^T||_F^2, Y = X (I - T T^T): a norm is off by at most
    1 / sqrt(2 P) of itself (one sd, where Y has rank 1), and by 1 / sqrt(2 P n) where n directions matter alike.

    Guarantees: memory is 8 D (Q + P) + 8 K Q bytes besides the sketch, which layers may share, however many summands.
    """

    def __init__(self, tracked_KQ: Tensor, sketch_KP: Tensor, out_features: int) -> None:
        """Start at nothing.

        Args:
            tracked_KQ: orthonormal columns, float64; they must not depend on the sketch.
            sketch_KP: standard normal numbers, float64, P at least 2.
        """
        self._tracked_KQ, self._sketch_KP = tracked_KQ, sketch_KP
        self._overlap_QP = tracked_KQ.T @ sketch_KP
        self._exact_DQ = tracked_KQ.new_zeros(out_features, tracked_KQ.shape[1])
        self._sketched_DP = tracked_KQ.new_zeros(out_features, sketch_KP.shape[1])

    def add(self, factors: LoraFactors) -> None:
        """Add lora_B @ lora_A, float64, of any rank; a weight belongs on one factor."""
        self._exact_DQ.addmm_(factors.lora_B, factors.lora_A @ self._tracked_KQ)
        self._sketched_DP.addmm_(factors.lora_B, factors.lora_A @ self._sketch_KP)

    def norm(self, *, total: float, less: LoraFactors | None = None) -> tuple[float, float]:
        """Estimate ||sum / total - less||_F; return it and its standard deviation, itself estimated.

        The square is unbiased, so the norm is low by about sd^2 / (2 norm). The standard deviation is 0.0 where nothing
        lies outside the tracked directions.
        """
        exact_DQ, sketched_DP = self._exact_DQ / total, self._sketched_DP / total
        if less is not None:
            lora_A, lora_B = less.lora_A.double(), less.lora_B.double()
            exact_DQ.addmm_(lora_B, lora_A @ self._tracked_KQ, alpha=-1)
            sketched_DP.addmm_(lora_B, lora_A @ self._sketch_KP, alpha=-1)
        sketched_DP.addmm_(exact_DQ, self._overlap_QP, alpha=-1)
        num_columns = sketched_DP.shape[1]
        gram_PP = sketched_DP.T @ sketched_DP
        square = float(exact_DQ.square().sum()) + float(gram_PP.trace()) / num_columns
        # Off the diagonal of the Gram matrix, E[(s_i^T Y^T Y s_j)^2] = ||Y Y^T||_F^2.
        products = float(gram_PP.square().sum() - gram_PP.diagonal().square().sum())
        variance = 2 / num_columns * products / (num_columns * (num_columns - 1))
        norm = math.sqrt(square)
        return norm, math.sqrt(max(variance, 0.0)) / (2 * norm) if norm > 0 else 0.0

    def times(self, right_KR: Tensor, *, total: float, elsewhere: LoraFactors) -> Tensor:
        """Return X' right, (D, R), where X' is sum / total along the tracked directions and `elsewhere`, a product of
        float64 factors, along all others."""
        inside_QR = self._tracked_KQ.T @ right_KR
        outside_KR = right_KR - self._tracked_KQ @ inside_QR
        return self._exact_DQ @ inside_QR / total + elsewhere.lora_B @ (elsewhere.lora_A @ outside_KR)


def completed_rows(rows_NK: Tensor, rank: int, *, like: Tensor | None = None) -> Tensor:
    """Return orthonormal rows, (rank, K): the given ones first, then what the rows of `like` add to their span, in
    order, then what unit vectors do.

    Args:
        rows_NK: at most `rank` orthonormal rows, float64.
        rank: at most K.

    >>> completed_rows(torch.tensor([[0.6, 0.8]], dtype=torch.float64), 2, like=torch.tensor([[1.0, 0.0]]))[1].round(
    ...     decimals=4
    ... ).tolist()
    [0.8, -0.6]
    """
    count, in_features = rows_NK.shape
    rows_RK = rows_NK.new_zeros(rank, in_features)
    rows_RK[:count] = rows_NK
    # A unit vector has a residual of at least K^-1/2 while fewer than K rows are there, for one of them at least.
    least = (2 * in_features) ** -0.5
    near = [] if like is None else [(row, 1e-6 * float(row.norm())) for row in like.double()]
    for number in range(len(near) + in_features):
        if count == rank:
            break
        if number < len(near):
            row_K, smallest = near[number]
        else:
            row_K, smallest = rows_RK.new_zeros(in_features), least
            row_K[number - len(near)] = 1.0
        for _ in range(2):  # once leaves a rounding error that grows as the residual shrinks
            row_K = row_K - (rows_RK[:count] @ row_K) @ rows_RK[:count]
        size = float(row_K.norm())
        if size > smallest:
            rows_RK[count] = row_K / size
            count += 1
    return rows_RK


def _svd(factors: LoraFactors) -> LoraFactors:
    """Return V^T (N, K) and U S (D, N) of the product of float64 factors, descending, N its rank but for rounding."""
    basis_A, mixing_A = torch.linalg.qr(factors.lora_A.T)
    basis_B, mixing_B = torch.linalg.qr(factors.lora_B)
    U, S, Vh = torch.linalg.svd(mixing_B @ mixing_A.T, full_matrices=False)
    # What the terms, which may cancel, can leave behind by rounding alone.
    terms = float((factors.lora_B.norm(dim=0) * factors.lora_A.norm(dim=1)).sum())
    floor = torch.finfo(S.dtype).eps * math.sqrt(max(basis_A.shape[0], basis_B.shape[0])) * terms
    rank = int((floor < S).sum())
    return LoraFactors(Vh[:rank] @ basis_A.T, basis_B @ (U[:, :rank] * S[:rank]))
