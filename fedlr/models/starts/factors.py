"""Starting factors of one layer, each a closed formula of its weight, of what enters it, or of its gradient.

Where the product B A is not zero the base gives it up: a layer computes W + scale * (side + B A) with side = -B A, so
its function is the base's and no base tensor changes (`models.starts.starts`). Computed in float64; the largest entry
of each row of a V^T is positive, so that no library's signs matter. Legend: D out_features, K in_features, R rank, W
(D, K) a weight, C (K, K) a second moment, G (D, K) a gradient.
"""

import torch
from torch import Tensor

from fedlr.adapters.factors import row_signs
from fedlr.adapters.state import LoraFactors
from fedlr.errors import InputError
from fedlr.models.starts.from_base import leading_rows

DAMPING, LARGEST_INVERSE_ERROR = 0.01, 0.05  # of CorDA's moment, as PEFT has them
GAMMA = 16.0  # of LoRA-GA's stable scale, as its code and PEFT have it


def pissa_factors(weight: Tensor, rank: int, *, scale: float) -> LoraFactors:
    """Return the R strongest singular directions of a weight, half of each strength on either factor.

    scale * B A is the best approximation of W of rank R. Source: PiSSA (Meng et al. 2024, eq. 2 and 3,
    https://arxiv.org/abs/2404.02948).

    >>> factors = pissa_factors(torch.diag(torch.tensor([4.0, 1.0])), 1, scale=1.0)
    >>> factors.lora_A.tolist(), factors.lora_B.tolist()
    ([[2.0, 0.0]], [[2.0], [0.0]])
    """
    U, S, Vh = signed_svd(weight)
    root_R = (S[:rank] / scale).sqrt()
    return LoraFactors(root_R[:, None] * Vh[:rank], U[:, :rank] * root_R)


def olora_factors(weight: Tensor, rank: int) -> LoraFactors:
    """Return the first R columns of Q and rows of R of a weight's QR decomposition, the diagonal of R not negative.

    Source: OLoRA (Buyukakyuz 2024, algorithm 1, https://arxiv.org/abs/2406.01775).

    >>> factors = olora_factors(torch.tensor([[0.0, -2.0], [3.0, 1.0]]), 1)
    >>> factors.lora_A.tolist(), factors.lora_B.tolist()
    ([[3.0, 1.0]], [[0.0], [1.0]])
    """
    Q, upper = torch.linalg.qr(weight.double())
    signs_R = torch.where(upper.diagonal()[:rank] < 0, -1.0, 1.0).double()
    return LoraFactors(upper[:rank] * signs_R[:, None] + 0.0, Q[:, :rank] * signs_R + 0.0)


def eva_factors(moment: Tensor, rank: int, *, out_features: int) -> LoraFactors:
    """Return the R leading principal directions of what enters a layer as lora_A, and lora_B zero.

    Args:
        moment: (K, K), centred. (EVA also shares the ranks out among layers by explained variance: with rho = 1, as
            here, each layer keeps its own.)

    Source: EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170).
    """
    lora_A = leading_rows(moment)[:rank]
    return LoraFactors(lora_A, lora_A.new_zeros(out_features, rank))


def corda_factors(weight: Tensor, moment: Tensor, rank: int, *, scale: float, strongest: bool) -> LoraFactors:
    """Return R directions of W C, mapped back by C^-1: U S^(1/2) and S^(1/2) V^T C^-1 of W C = U S V^T.

    Args:
        weight: (D, K).
        moment: (K, K), of a layer's inputs; a hundredth of its mean diagonal is added, more where C has no inverse.
        strongest: the R strongest adapt to the public texts' task (IPM); else the R weakest train, which keeps what
            the base knows of such texts (KPM).

    Source: CorDA (Yang et al. 2024, sec. 3, https://arxiv.org/abs/2406.05223), with the damping of PEFT.
    """
    moment_KK, inverse_KK = _damped(moment.double())
    U, S, Vh = signed_svd(weight.double() @ moment_KK)
    chosen = slice(0, rank) if strongest else slice(len(S) - rank, len(S))
    root_R = (S[chosen] / scale).sqrt()
    return LoraFactors(root_R[:, None] * (Vh[chosen] @ inverse_KK), U[:, chosen] * root_R)


def lora_ga_factors(gradient: Tensor, rank: int) -> LoraFactors:
    """Return A = c V_[1:R]^T and B = c U_[R+1:2R] of G = U S V^T, with c = D^(1/4) / sqrt(gamma).

    The first step of training then moves B A as far along G as a rank of 2 R can. Source: LoRA-GA (Wang et al. 2024,
    theorem 3.1 and eq. 11, https://arxiv.org/abs/2407.05000). PEFT 0.21 scales otherwise: it multiplies B by its
    singular values and leaves A at length one; the directions are the same.

    Raises:
        InputError: a layer has fewer than 2 R singular directions.
    """
    if 2 * rank > min(gradient.shape):
        raise InputError(
            f"Expected adapter.rank <= {min(gradient.shape) // 2} for adapter.init_lora_weights=lora_ga, which needs "
            f"two directions a rank, got {rank}"
        )
    U, _, Vh = signed_svd(gradient)
    factor = len(gradient) ** 0.25 / GAMMA**0.5
    return LoraFactors(factor * Vh[:rank], factor * U[:, rank : 2 * rank])


def lora_sb_bases(gradient: Tensor, rank: int, *, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (D, R), sigma (R,) and V^T (R, K) of the first step of full fine-tuning, -learning_rate * sign(G).

    The step is Adam's first. U diag(sigma) V^T is its best approximation of rank R. Source: LoRA-SB (Ponkshe et al.
    2024, algorithm 1, https://arxiv.org/abs/2411.19557), from which Fed-SB starts
    (https://arxiv.org/abs/2502.15436).
    """
    U, S, Vh = signed_svd(-learning_rate * gradient.double().sign())
    return U[:, :rank], S[:rank], Vh[:rank]


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T in float64, signs fixed by the rows of V^T.

    >>> U, S, Vh = signed_svd(torch.tensor([[0.0, -2.0], [1.0, 0.0]]))
    >>> U.tolist(), S.tolist(), Vh.tolist()
    ([[-1.0, 0.0], [0.0, 1.0]], [2.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = row_signs(Vh)
    return U * signs.T + 0.0, S, Vh * signs + 0.0  # no -0.0


def _damped(moment_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return a moment that can be inverted, and its inverse."""
    identity = torch.eye(len(moment_KK), dtype=moment_KK.dtype)
    damping = DAMPING
    while True:
        damped_KK = moment_KK + damping * moment_KK.diagonal().mean() * identity
        inverse_KK = torch.linalg.inv(damped_KK)
        if torch.dist(damped_KK @ inverse_KK, identity) < LARGEST_INVERSE_ERROR:
            return damped_KK, inverse_KK
        damping *= 2
