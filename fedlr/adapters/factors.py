"""Other factors of the same product: SVD re-factorisation and orthonormal rows, in factored form.

Everything goes through a thin QR, so no D x K matrix is ever made and a step costs O((D + K) R^2). A full SVD
of the product is not only slower: for a rank-deficient lora_B it replaces the unused rows of lora_A by
arbitrary directions. Computed in float64, returned in the dtype of the input.
Legend: D out_features, K in_features, R rank.
"""

import torch
from torch import Tensor

from fedlr.adapters.state import LoraFactors
from fedlr.errors import InputError


def svd_refactor(factors: LoraFactors) -> LoraFactors:
    """Return the factors V^T (new lora_A) and U S (new lora_B) of the product's singular value decomposition.

    Source: Lee et al. 2025 (FedSVD), sec. 3, https://arxiv.org/abs/2505.12805; the factored form and the sign
    rule (the largest entry of every row of lora_A is positive) are ours. No privacy is spent: it is
    post-processing.

    Guarantees: the product is kept to rounding; the new rows span the old row space, also where lora_B is
    rank-deficient; a zero product (round 0: lora_B = 0) is returned untouched, as the same tensors.

    Raises: ValueError if a factor is not finite; InputError if the rank is above the layer's in_features.

    >>> new = svd_refactor(LoraFactors(torch.tensor([[3.0, 4.0]]), lora_B=torch.tensor([[-2.0], [1.0]])))
    >>> [round(x, 4) for x in new.lora_A[0].tolist()], [round(x, 4) for x in new.lora_B[:, 0].tolist()]
    ([0.6, 0.8], [-10.0, 5.0])
    """
    basis_KR, mixing_RR = _row_basis(factors)
    core_DR = factors.lora_B.double() @ mixing_RR.T
    if not core_DR.any():
        return factors
    out_features, rank = core_DR.shape
    # full_matrices only where D < R: Vh must then be completed to R x R, and lora_B has R - D zero columns.
    U, S, Vh_RR = torch.linalg.svd(core_DR, full_matrices=out_features < rank)
    lora_A, lora_B = Vh_RR @ basis_KR.T, torch.zeros_like(core_DR)
    lora_B[:, : len(S)] = U * S
    signs_R1 = row_signs(lora_A)
    return _like(factors, lora_A * signs_R1, lora_B * signs_R1.T)


def orthonormal_rows(factors: LoraFactors) -> LoraFactors:
    """Return factors of the same product whose lora_A has orthonormal rows (QR; the rest goes into lora_B).

    Guarantees: an exact no-op, the same tensors bit for bit, where the rows already are orthonormal within
    tolerance (1e-5, or 4 units of a coarser dtype): clients that hold lora_A need not be told again.

    Raises: ValueError if a factor is not finite; InputError if the rank is above the layer's in_features.

    >>> new = orthonormal_rows(LoraFactors(lora_A=torch.tensor([[3.0, 4.0]]), lora_B=torch.ones(2, 1)))
    >>> [round(x, 4) for x in new.lora_A[0].tolist()], [round(x, 4) for x in new.lora_B[:, 0].tolist()]
    ([0.6, 0.8], [5.0, 5.0])
    """
    basis_KR, mixing_RR = _row_basis(factors)
    gram_RR = factors.lora_A.double() @ factors.lora_A.double().T
    identity_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
    if (gram_RR - identity_RR).abs().max() <= max(1e-5, 4 * torch.finfo(factors.lora_A.dtype).eps):
        return factors
    # A positive diagonal makes the QR unique, so that two linear algebra libraries agree up to rounding.
    signs_R = torch.where(mixing_RR.diagonal() < 0, -1.0, 1.0).double()
    return _like(factors, (basis_KR * signs_R).T, factors.lora_B.double() @ mixing_RR.T * signs_R)


def row_signs(rows: Tensor) -> Tensor:
    """Return the sign of the largest entry of each row, (R, 1): times it, singular vectors are free of their sign.

    >>> row_signs(torch.tensor([[1.0, -3.0], [2.0, 0.5]])).tolist()
    [[-1.0], [1.0]]
    """
    return rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()


def product_singular_values(factors: LoraFactors) -> Tensor:
    """Return the R largest singular values of lora_B @ lora_A, (R,) float64, descending.

    >>> product_singular_values(LoraFactors(torch.eye(2, 3), torch.tensor([[1.0, 0.0], [0.0, 2.0]])))
    tensor([2., 1.], dtype=torch.float64)
    """
    values: Tensor = torch.linalg.svdvals(_core(factors))
    padded_R = values.new_zeros(factors.lora_A.shape[0])
    padded_R[: len(values)] = values
    return padded_R


def product_norm(factors: LoraFactors) -> float:
    """Return the Frobenius norm of lora_B @ lora_A, accurate also where large terms cancel in the product.

    >>> product_norm(LoraFactors(lora_A=torch.eye(2, 3), lora_B=torch.tensor([[3.0, 4.0]])))
    5.0
    """
    return float(_core(factors).norm())


def _row_basis(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """Return the QR of lora_A^T in float64: an orthonormal basis (K, R) and its mixing matrix (R, R)."""
    rank, in_features = factors.lora_A.shape
    if rank > in_features:
        raise InputError(f"Expected a rank of at most the layer's {in_features} in_features, got rank {rank}")
    for name, factor in (("lora_A", factors.lora_A), ("lora_B", factors.lora_B)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"Expected finite numbers in {name}, got at least one NaN or infinity")
    basis_KR, mixing_RR = torch.linalg.qr(factors.lora_A.double().T)
    return basis_KR, mixing_RR


def _core(factors: LoraFactors) -> Tensor:
    """Return a matrix with the singular values of the product, (D, min(R, K))."""
    core: Tensor = factors.lora_B.double() @ torch.linalg.qr(factors.lora_A.double().T, mode="r").R.T
    return core


def _like(factors: LoraFactors, lora_A: Tensor, lora_B: Tensor) -> LoraFactors:
    lora_A, lora_B = lora_A.to(factors.lora_A.dtype), lora_B.to(factors.lora_B.dtype)
    return LoraFactors(lora_A.contiguous(), lora_B.contiguous())
