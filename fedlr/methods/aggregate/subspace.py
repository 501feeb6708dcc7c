"""Server rules that work with the spaces the clients' products span: FedGSA projects on one, FedASK sketches one.

Both read released updates, and random numbers that are public: post-processing, no privacy is spent.
Legend: D out_features, K in_features, R rank, M columns of a stack, S columns of a sketch, N used singular values.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.factors import row_signs
from fedlr.adapters.low_rank import LowRankSum, completed_rows
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.streams import Purpose, stream


def projected_mean(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """Average lora_B and project it on the R directions that the clients' column spaces share most:
    lora_B <- U U^T sum_k p_k B_k, U the R leading eigenvectors of sum_k p_k U_k U_k^T, U_k a basis of B_k's columns.

    Source: FedGSA 2026, https://arxiv.org/abs/2608.03267, which we know from secondary notes only; its thin SVD is the
    finaliser `methods.method.SvdRefactor`. U_k spans the columns of B_k that are not zero to the rounding of its dtype:
    one client with lora_B = 0, or of smaller rank, adds nothing, or less, where a QR would invent directions.

    Biased: what the mean holds outside U is lost, (I - U U^T) B A, and nothing is added. Exact where the columns of
    all B_k span R directions at most: one client, or clients that agree. lora_A does not change here, and after the
    re-factorisation its rows still span what they spanned at the start. Every client's space counts by its weight
    alone, however little of B_k lies in it. Expect little where noise is weak: the mean spans R directions as well.

    Guarantees: sum_k p_k U_k U_k^T is exact to rounding, held as its (D, M) factor, M = C R for C clients, or as one
    D x D matrix once M would pass D; memory does not grow beyond that. Where eigenvalues R and R + 1 are equal, U is
    one choice among many. A head that trains is averaged.

    Raises: InputError if lora_A was trained; ValueError as `weighted_mean`.
    """
    running, projectors = RunningMean(), {path: _Projectors() for path in adapter.factors()}
    for update in updates:
        if any(slot.role == LORA_A for slot in update.tensors):
            raise InputError("Expected method.block_schedule to train lora_B and not lora_A for FedGSA, got lora_A")
        running.add(update)
        for path, projector in projectors.items():
            if (slot := Slot(path, LORA_B)) in update.tensors:
                projector.add(update.tensors[slot], update.weight)
    mean = running.values()
    for path, layer in adapter.factors().items():
        if (slot := Slot(path, LORA_B)) in mean:
            basis_DR = projectors[path].leading(rank=layer.lora_B.shape[1], like=mean[slot])
            mean[slot] = basis_DR @ (basis_DR.T @ mean[slot])
    return adapter.with_rounded(mean)


@dataclass(frozen=True)
class FedAsk:
    """Factorise X = sum_k p_k B_k A_k from two sketches: Q = qr(X Omega), U S V^T = SVD(Q^T X), lora_B <- Q U S^1/2,
    lora_A <- S^1/2 V^T, with Omega (K, S) Gaussian and S = R + oversampling, cut to R singular values.

    Source: Wen et al. 2025 (FedASK), https://arxiv.org/abs/2507.09990. There, clients answer twice, with B_k A_k Omega
    and (B_k A_k)^T Q; here they send their factors, once, and the server forms both sketches: the same numbers, as
    both are linear. Omega is drawn anew for every round and layer from `seed`, which is public (the authors'
    code draws it once).

    Exact if S and R are at least the rank of X: always where one factor trains, as under the paper's DP mode, and
    then the row space of lora_A never changes. Where both do, X has rank C R for C clients, and the result is its best
    approximation of rank R if S >= C R, and near it otherwise. Under DP noise is on what trained; training both
    multiplies it.

    Splitting S evenly scales the gradient of a direction by the root of its singular value, so weak directions train
    slowly. One of singular value zero would never train again: it gets a zero column of lora_B, as it must, and a unit
    row of lora_A, out of the old row space as far as it can. An X of zero leaves the mean as it is.

    Guarantees: memory of a layer is bounded whatever the cohort: one mean where one factor trains, and else a sum of
    at most 2 min(D, K) + R columns, exact to rounding. The signs are those of `svd_refactor`.

    Args:
        oversampling: columns of Omega beyond the rank (the authors' code: 0).
        seed: of Omega; public.
    """

    oversampling: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.oversampling < 0:
            raise InputError(f"Expected oversampling to be at least 0, got {self.oversampling}")
        stream(self.seed, Purpose.SKETCH)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter with the sketched factors of every layer, and the mean of a head."""
        layers, running, total, round_index = adapter.factors(), RunningMean(), 0.0, 0
        sums = {path: LowRankSum(max_rank=min(len(f.lora_B), f.lora_A.shape[1])) for path, f in layers.items()}
        both: set[str] = set()
        for update in updates:
            running.add(update)
            total, round_index = total + update.weight, update.base_round
            for path in layers:
                lora_A, lora_B = (update.tensors.get(Slot(path, role)) for role in (LORA_A, LORA_B))
                if lora_A is not None and lora_B is not None:
                    sums[path].add(LoraFactors(lora_A, lora_B), update.weight)
                    both.add(path)
        mean = adapter.with_rounded(running.values())
        new: dict[str, LoraFactors] = {}
        for number, (path, layer) in enumerate(layers.items()):
            if path in both:
                summed = sums[path].factors()
                product = LoraFactors(summed.lora_A, summed.lora_B / total)
            else:
                exact = {**adapter.tensors, **running.values()}
                product = LoraFactors(exact[Slot(path, LORA_A)].double(), exact[Slot(path, LORA_B)].double())
            omega_KS = self._omega(layer, round_index=round_index, number=number)
            new[path] = _sketched(product, omega_KS, like=layer) or mean.factors()[path]
        return mean.with_factors(new)

    def _omega(self, layer: LoraFactors, *, round_index: int, number: int) -> Tensor:
        rank, in_features = layer.lora_A.shape
        columns = min(rank + self.oversampling, in_features, max(rank, len(layer.lora_B)))
        generator = stream(self.seed, Purpose.SKETCH, round_index=round_index, step=number)
        return torch.from_numpy(generator.standard_normal((in_features, columns)))


def _sketched(product: LoraFactors, omega_KS: Tensor, *, like: LoraFactors) -> LoraFactors | None:
    """Return both factors from the two sketches of a float64 product, or None where it is zero."""
    sketch_DS = product.lora_B @ (product.lora_A @ omega_KS)
    if not sketch_DS.any():
        return None
    basis_DS = torch.linalg.qr(sketch_DS).Q
    U, S, Vh = torch.linalg.svd((basis_DS.T @ product.lora_B) @ product.lora_A, full_matrices=False)
    rank, in_features = like.lora_A.shape
    used = min(rank, int((S > S[0] * max(in_features, len(basis_DS)) * torch.finfo(S.dtype).eps).sum()))
    root_N1 = S[:used, None].sqrt()
    lora_A = completed_rows(Vh[:used], rank, like=like.lora_A)
    lora_A[:used] *= root_N1
    lora_B = torch.zeros_like(like.lora_B, dtype=torch.float64)
    lora_B[:, :used] = (basis_DS @ U[:, :used]) * root_N1.T
    signs_R1 = row_signs(lora_A)
    lora_A, lora_B = lora_A * signs_R1, lora_B * signs_R1.T
    return LoraFactors(lora_A.to(like.lora_A.dtype), lora_B.to(like.lora_B.dtype))


class _Projectors:
    """sum_k w_k U_k U_k^T of one layer: a stack of sqrt(w_k) U_k, folded into one D x D sum when it is wider."""

    def __init__(self) -> None:
        self._stack: list[Tensor] = []
        self._num_columns = 0
        self._folded_DD: Tensor | None = None

    def add(self, lora_B: Tensor, weight: float) -> None:
        U, S, _ = torch.linalg.svd(lora_B.double(), full_matrices=False)
        rounding = torch.finfo(lora_B.dtype).eps * max(lora_B.shape)
        columns_DM = weight**0.5 * U[:, S[0] * rounding < S]
        self._stack.append(columns_DM)
        self._num_columns += columns_DM.shape[1]
        if self._num_columns > len(columns_DM):
            self._fold()

    def leading(self, *, rank: int, like: Tensor) -> Tensor:
        """Return the leading eigenvectors, (D, R), or fewer where the sum has a smaller rank."""
        if self._folded_DD is not None:
            self._fold()
            values, vectors = torch.linalg.eigh(self._folded_DD)
            values, vectors = values.flip(0), vectors.flip(1)
        elif self._num_columns:
            vectors, roots, _ = torch.linalg.svd(torch.cat(self._stack, dim=1), full_matrices=False)
            values = roots.square()
        else:
            return like.new_zeros(len(like), 0)
        found = int((values > values[0] * len(vectors) * torch.finfo(values.dtype).eps).sum())
        basis: Tensor = vectors[:, : min(rank, found)]
        return basis

    def _fold(self) -> None:
        if self._stack:
            stacked_DM = torch.cat(self._stack, dim=1)
            if self._folded_DD is None:
                self._folded_DD = stacked_DM.new_zeros(len(stacked_DM), len(stacked_DM))
            self._folded_DD.addmm_(stacked_DM, stacked_DM.T)
            self._stack, self._num_columns = [], 0
