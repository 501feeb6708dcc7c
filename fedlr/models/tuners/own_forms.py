"""The mean of clients' layers as a layer of the same system: DoRA, DeLoRA and RoAd.

Exact where the system can hold the mean; else the nearest of its rank R, in the Frobenius norm of the layer itself, and
the error says how far it is. Each is the layer of PEFT 0.21.2. Float64 throughout.
Legend: W the weights (D, K); D out_features, K in_features, R rank.
"""

import math

import torch
from torch import Tensor

from fedlr.adapters.factors import product_norm, svd_refactor
from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LoraFactors
from fedlr.errors import InputError
from fedlr.models.peft_state import ADAPTER_NAME
from fedlr.models.tuners.layer_means import Layer, Values, Written

LEAST_NORM = 1e-4  # DeLoRA takes no vector for shorter
LEAST_GAIN = 1e-6  # of DoRA's largest: a row of which clients' gains cancel cannot be written as a gain


class DoraMean:
    """W_k = diag(g_k) (W + s B_k A_k) with g_k = m_k / ||W + s B_k A_k||_row (Liu et al. 2024, arXiv:2402.09353).

    The mean is diag(g) W + N with g = sum_k p_k g_k and N = s sum_k p_k diag(g_k) B_k A_k, which is DoRA again with
    s B A = diag(1 / g) N and m = g ||W + s B A||_row. N, cut to its best approximation of rank R, goes into B and A;
    g is kept exactly, whatever is cut. Exact where all clients have one A. Row norms come from W A^T and a Gram matrix.
    """

    def __init__(self, layer: Layer, start: Values) -> None:
        self._layer, self._start, self._total = layer, start, 0.0
        self._scale = float(layer.module.scaling[ADAPTER_NAME])
        self._gains_D, self._sum = torch.zeros_like(start["magnitude"]), _sum_of(layer)
        self._mean_A = torch.zeros_like(start["lora_A"])

    def add(self, values: Values, weight: float) -> None:
        """See `RunningLayer.add`."""
        gains_D, product = self._read(values)
        self._sum.add(product, weight)
        self._gains_D += weight * gains_D
        self._mean_A += weight * values["lora_A"]
        self._total += weight

    def written(self) -> Written:
        """See `RunningLayer.written`."""
        gains_D, mean_A = self._gains_D / self._total, self._mean_A / self._total
        mean = _divided(self._sum.factors(), self._total)
        best = _divided(self._sum.truncated(len(mean_A), like=mean_A), self._total)
        if not best.lora_B.any():  # as it starts: nothing says which rows lora_A should have
            best = LoraFactors(mean_A, best.lora_B)
        start_D, start = self._read(self._start)
        moved_D = row_norms(self._layer.weight_DK, _less(mean, start), gains_D=gains_D - start_D)
        smallest = max(LEAST_GAIN * float(gains_D.abs().max()), torch.finfo(gains_D.dtype).tiny)
        gains_D = torch.where(gains_D.abs() < smallest, smallest, gains_D)
        inner = LoraFactors(best.lora_A, best.lora_B / gains_D[:, None])
        values = {
            "lora_A": inner.lora_A,
            "lora_B": inner.lora_B / self._scale,
            "magnitude": gains_D * row_norms(self._layer.weight_DK, inner),
        }
        return Written(values, error=_ratio(product_norm(_less(mean, best)), float(moved_D.norm())))

    def _read(self, values: Values) -> tuple[Tensor, LoraFactors]:
        """Return g (D,) and the factors of s diag(g) B A."""
        inner = LoraFactors(values["lora_A"], self._scale * values["lora_B"])
        norms_D = row_norms(self._layer.weight_DK, inner).clamp(min=torch.finfo(torch.float32).tiny)
        gains_D = values["magnitude"] / norms_D
        return gains_D, LoraFactors(inner.lora_A, gains_D[:, None] * inner.lora_B)


class DeloraMean:
    """delta_k = lambda_k / R sum_i b_i a_i^T / (|b_i| |a_i|) diag(w), w the norms of W's columns (Bini et al. 2025,
    arXiv:2503.18225).

    The mean, cut to its best approximation of rank R, is X diag(w) with X = U S V^T. An orthogonal H for which
    H^T S H has one number on its diagonal (Schur and Horn) gives b_i = (U S^1/2 H)_i and a_i^T = (H^T S^1/2 V^T)_i,
    whose products of norms are all tr(S) / R: so lambda = tr(S). Exact where all clients have one A. The vectors are
    as long as the clients' are on average, of which the layer does not depend.
    """

    def __init__(self, layer: Layer, start: Values) -> None:
        self._layer, self._start, self._total = layer, start, 0.0
        self._norms_K = layer.module.delora_w_norm[ADAPTER_NAME].double()
        self._sum, self._means = _sum_of(layer), {block: torch.zeros_like(value) for block, value in start.items()}
        self._lengths = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Values, weight: float) -> None:
        """See `RunningLayer.add`."""
        self._sum.add(self._read(values), weight)
        lengths_A, lengths_B = values["A"].norm(dim=1), values["B"].norm(dim=0)
        self._lengths += weight * torch.stack([lengths_A.mean(), lengths_B.mean()])
        for block, value in values.items():
            self._means[block] += weight * value
        self._total += weight

    def written(self) -> Written:
        """See `RunningLayer.written`."""
        rank, mean = len(self._start["A"]), _divided(self._sum.factors(), self._total)
        best = _divided(self._sum.truncated(rank), self._total)
        if not best.lora_B.any():  # as it starts, with B zero: lambda = 0 would never train again
            return Written({block: total / self._total for block, total in self._means.items()})
        used_K = self._norms_K > 0
        inner = LoraFactors(torch.where(used_K, best.lora_A / self._norms_K.clamp(min=1e-30), 0.0), best.lora_B)
        US_V = svd_refactor(inner)
        S_R = US_V.lora_B.norm(dim=0)
        root_R, H_RR = S_R.sqrt(), equal_diagonal(S_R)
        length_A, length_B = (self._lengths / self._total).clamp(min=2 * LEAST_NORM) / float(S_R.mean().sqrt())
        values = {
            "A": length_A * H_RR.T @ (root_R[:, None] * US_V.lora_A),
            "B": length_B * torch.where(root_R > 0, US_V.lora_B / root_R.clamp(min=1e-150), 0.0) @ H_RR,
            "lambda": S_R.sum().reshape(1),
        }
        moved = product_norm(_less(mean, self._read(self._start)))
        return Written(values, error=_ratio(product_norm(_less(mean, best)), moved))

    def _read(self, values: Values) -> LoraFactors:
        A_RK, B_DR = values["A"], values["B"]
        norms_R = A_RK.norm(dim=1).clamp(min=LEAST_NORM) * B_DR.norm(dim=0).clamp(min=LEAST_NORM)
        return LoraFactors(A_RK * self._norms_K, B_DR * (values["lambda"] / len(A_RK) / norms_R))


class RoadMean:
    """y -> alpha (cos(theta) y_i - sin(theta) y_j, sin(theta) y_i + cos(theta) y_j) on pairs of outputs (Liao and Monz
    2024, arXiv:2409.00119).

    The map, of the bias too, is linear in z = alpha exp(i theta), so the mean of all z is that of the layers: exact.
    """

    def __init__(self, layer: Layer, start: Values) -> None:
        if (variant := layer.module.variant[ADAPTER_NAME]) not in ("road_1", "road_2"):
            raise InputError(f"Expected adapter.sizes.variant=road_1 or road_2 to average layers, got {variant}")
        self._sum, self._total = torch.zeros_like(start["alpha"], dtype=torch.complex128), 0.0

    def add(self, values: Values, weight: float) -> None:
        """See `RunningLayer.add`."""
        self._sum += weight * values["alpha"] * torch.exp(1j * values["theta"])
        self._total += weight

    def written(self) -> Written:
        """See `RunningLayer.written`."""
        return Written({"alpha": self._sum.abs() / self._total, "theta": self._sum.angle()})


def row_norms(weight_DK: Tensor, factors: LoraFactors, *, gains_D: Tensor | None = None) -> Tensor:
    """Return the norms of the rows of diag(gains) W + lora_B @ lora_A, (D,), without that matrix.

    >>> row_norms(torch.tensor([[3.0, 0.0]]), LoraFactors(torch.tensor([[0.0, 4.0]]), torch.ones(1, 1)))
    tensor([5.])
    """
    lora_A, lora_B = factors.lora_A, factors.lora_B
    gains_D = weight_DK.new_ones(len(weight_DK)) if gains_D is None else gains_D
    own_D = (gains_D * weight_DK.norm(dim=1)).square()
    cross_D = gains_D * ((weight_DK @ lora_A.T) * lora_B).sum(dim=1)
    product_D = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(dim=1)
    squares_D: Tensor = own_D + 2 * cross_D + product_D
    return squares_D.clamp(min=0.0).sqrt()


def equal_diagonal(values_R: Tensor) -> Tensor:
    """Return an orthogonal H (R, R) with the mean of the values all along the diagonal of H^T diag(values) H.

    It exists by Schur and Horn; here by R - 1 rotations, each of which sets one entry (Bendel and Mickey 1978).

    >>> H = equal_diagonal(torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64))
    >>> (H.T @ torch.diag(torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)) @ H).diagonal().round(decimals=9)
    tensor([2., 2., 2.], dtype=torch.float64)
    """
    mean, matrix_RR = float(values_R.mean()), torch.diag(values_R)
    H_RR, left = torch.eye(len(values_R), dtype=values_R.dtype), list(range(len(values_R)))
    while len(left) > 1:
        diagonal = matrix_RR.diagonal()[left]
        i, j = left[int(diagonal.argmax())], left[int(diagonal.argmin())]
        above, below = float(matrix_RR[i, i]) - mean, mean - float(matrix_RR[j, j])
        if above <= 0 or below <= 0:  # what is left is the mean, to rounding
            break
        cross = float(matrix_RR[i, j])
        root = math.hypot(cross, math.sqrt(above * below))
        tangent = (cross + root) / below if cross >= 0 else above / (root - cross)
        cosine = 1 / math.hypot(1, tangent)
        turn_RR = torch.eye(len(values_R), dtype=values_R.dtype)
        turn_RR[i, i] = turn_RR[j, j] = cosine
        turn_RR[j, i], turn_RR[i, j] = tangent * cosine, -tangent * cosine
        matrix_RR, H_RR = turn_RR.T @ matrix_RR @ turn_RR, H_RR @ turn_RR
        left.remove(i)
    return H_RR


def _sum_of(layer: Layer) -> LowRankSum:
    return LowRankSum(max_rank=min(layer.module.out_features, layer.module.in_features))


def _divided(factors: LoraFactors, total: float) -> LoraFactors:
    return LoraFactors(factors.lora_A, factors.lora_B / total)


def _less(one: LoraFactors, other: LoraFactors) -> LoraFactors:
    return LoraFactors(torch.cat([one.lora_A, other.lora_A]), torch.cat([one.lora_B, -other.lora_B], dim=1))


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm > 0 else 0.0
