"""Renewal: give lora_A new rows while only lora_B trains, and change no function by it. Ours, no paper's; merging and
starting anew is ReLoRA's idea (Lialin et al. 2023, https://arxiv.org/abs/2307.05695), there for all factors at once.

Under B-only training lora_A stays in the row space it started with, whatever is re-factorised (FedSVD,
docs/methods.md): with R rows of K, the federation sees R directions of what enters a layer, for ever. Here, every few
rounds, weak rows make room for rows that look elsewhere:

    U S V^T = SVD(B A)                  keep the k strongest: A_k = V_k^T, B_k = U_k S_k
    side    <- side + U_w S_w V_w^T     what the weak ones have learnt stays in the function, frozen
    A       <- [A_k; Q],  B <- [B_k, 0]     Q: fresh orthonormal rows, orthogonal to A_k and to the side's rows

No row is aimed at the data: Q is drawn, k is read off the noised aggregate, so all of it is post-processing. An
optimizer starts anew in every round, so none carries a momentum of rows that are gone.
Legend: D out_features, K in_features, R rank, M rank of the side, k rows that stay, N = R - k fresh rows, J directions
to avoid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlr.adapters.factors import orthonormal_rows, svd_refactor
from fedlr.adapters.state import AdapterState, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.streams import Purpose, stream

CLOCK = Slot("", "clock")  # of the memory "renewal": aggregated rounds so far, and the key of the rows to come
_ROUNDING = 1e-5  # singular values of a set of unit rows below this are rounding, not a direction


@dataclass(frozen=True)
class Renewal:
    """Every `period` rounds, fold the weak directions of B A into the side and put fresh rows in their place.

    Args:
        period: aggregated rounds between two renewals; a round without a usable update does not count.
        keep: share of ||B A||_F^2 that goes on training, in its strongest directions; 0 renews all rows. At least one
            row is always renewed.

    Exact: B A + side is the same before and after, to the rounding of one SVD, and so are the scale and the head.

    Guarantees: lora_A has orthonormal rows from round 0 on; the row space moves at every renewal of a layer that has
    learnt anything (if R < K), and rows of lora_A and of the side together are orthonormal, so the rank that all
    rounds together can reach grows by R - k at each, until all K directions had their turn; then only kept rows are
    avoided. Kept rows come first, strongest first. The drawn rows follow from the adapter
    before round 0, so every run of a seed repeats them and any state can be resumed.

    Under DP only lora_B is noised, as for FFA-LoRA. Noise already in a folded direction stays there; a new direction
    starts without any. The side goes down as well: M (D + K) numbers a layer, M growing by R - k a renewal.
    """

    period: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.period < 1:
            raise InputError(f"Expected period >= 1, got {self.period}")
        if not 0 <= self.keep <= 1:
            raise InputError(f"Expected keep in [0, 1], got {self.keep}")

    def __call__(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter with orthonormal rows before round 0, renewed every `period` rounds after."""
        if "renewal" not in adapter.memory:
            # The drawn lora_A, before any arithmetic of this machine: the same bits wherever the run is repeated.
            clock = torch.tensor([0, int(adapter.fingerprint()[:8], 16)])
            started = {path: orthonormal_rows(layer) for path, layer in adapter.factors().items()}
            return adapter.with_factors(started).remembering("renewal", {CLOCK: clock})
        num_rounds, key = (int(number) for number in adapter.memory["renewal"][CLOCK])
        num_rounds += 1
        adapter = adapter.remembering("renewal", {CLOCK: torch.tensor([num_rounds, key])})
        return self._renewed(adapter, num_rounds, key) if num_rounds % self.period == 0 else adapter

    def _renewed(self, adapter: AdapterState, num_rounds: int, key: int) -> AdapterState:
        factors: dict[str, LoraFactors] = {}
        side = dict(adapter.side)
        for index, (path, layer) in enumerate(adapter.factors().items()):
            strong, weak = split_by_strength(svd_refactor(layer), keep=self.keep)
            if not len(weak.lora_A):
                continue
            side[path] = stacked(side[path], weak) if path in side else weak
            drawn = stream(key, Purpose.REINIT, client=index, round_index=num_rounds)
            draws_RK = torch.from_numpy(drawn.standard_normal(weak.lora_A.shape))
            fresh = LoraFactors(
                fresh_rows(draws_RK, strong.lora_A, side[path].lora_A).to(weak.lora_A.dtype),
                torch.zeros_like(weak.lora_B),
            )
            factors[path] = stacked(strong, fresh)
        return replace(adapter.with_factors(factors), side=side)


def split_by_strength(factors: LoraFactors, *, keep: float) -> tuple[LoraFactors, LoraFactors]:
    """Split the factors of an SVD, strongest first, into those that hold a share of the energy and the weak rest.

    The rest has one direction at least; of a zero product it has none, as there is nothing to rank.

    >>> svd = LoraFactors(torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, 0.5])))
    >>> [len(part.lora_A) for part in split_by_strength(svd, keep=0.8)]
    [1, 2]
    """
    energy_R = factors.lora_B.double().square().sum(dim=0)
    rank, total = len(energy_R), energy_R.sum()
    if total == 0:
        return factors, LoraFactors(factors.lora_A[rank:], factors.lora_B[:, rank:])
    before_R = energy_R.cumsum(0) - energy_R  # what all stronger directions hold
    num_kept = min(int((before_R < keep * total).sum()), rank - 1)
    A, B = factors.lora_A, factors.lora_B
    return LoraFactors(A[:num_kept], B[:, :num_kept]), LoraFactors(A[num_kept:], B[:, num_kept:])


def stacked(first: LoraFactors, second: LoraFactors) -> LoraFactors:
    """Return factors of the sum of two products; of rank K at most, so that a side cannot outgrow its layer.

    >>> one = LoraFactors(torch.ones(1, 2), torch.ones(3, 1))
    >>> double = stacked(one, one)
    >>> double.lora_A.shape, (double.lora_B @ double.lora_A).unique().tolist()
    (torch.Size([2, 2]), [2.0])
    """
    lora_A, lora_B = torch.cat([first.lora_A, second.lora_A]), torch.cat([first.lora_B, second.lora_B], dim=1)
    in_features = lora_A.shape[1]
    if len(lora_A) <= in_features:
        return LoraFactors(lora_A, lora_B)
    dense_DK = (lora_B.double() @ lora_A.double()).to(lora_B.dtype)
    return LoraFactors(torch.eye(in_features, dtype=lora_A.dtype), dense_DK)


def fresh_rows(draws: Tensor, kept: Tensor, side: Tensor) -> Tensor:
    """Turn Gaussian draws into orthonormal rows, orthogonal to `kept` and, while there is room, to `side`.

    Args:
        draws: (N, K) float64, N <= K - k.
        kept: (k, K), rows that stay.
        side: (M, K), rows that were folded.

    Returns:
        (N, K) float64. Uniform over what is left, as the draws are.

    >>> fresh_rows(torch.ones(1, 2).double(), torch.tensor([[1.0, 0.0]]), torch.zeros(0, 2)).abs().tolist()
    [[0.0, 1.0]]
    """
    avoided_KJ = _row_space(torch.cat([kept, side]))
    if avoided_KJ.shape[1] + len(draws) > draws.shape[1]:  # all directions had their turn
        avoided_KJ = _row_space(kept)
    left_NK = draws
    for _ in range(2):  # once leaves rounding of the size of what was taken out
        left_NK = left_NK - left_NK @ avoided_KJ @ avoided_KJ.T
    basis_KN, mixing_NN = torch.linalg.qr(left_NK.T)
    signs_N = torch.where(mixing_NN.diagonal() < 0, -1.0, 1.0).double()
    rows_NK: Tensor = (basis_KN * signs_N).T
    return rows_NK


def _row_space(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows' span, (K, rank) float64."""
    U, S, _ = torch.linalg.svd(rows.double().T, full_matrices=False)
    basis_KJ: Tensor = U[:, S > _ROUNDING]
    return basis_KJ
