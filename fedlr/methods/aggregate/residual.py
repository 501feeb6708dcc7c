"""FedEx-LoRA: average both factors, and fold what the average misses into the side product.

Legend: D out_features, K in_features, R rank, C clients.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedlr.errors import InputError
from fedlr.methods.aggregate.stacking import RunningProducts, with_folded


@dataclass(frozen=True)
class ExactResidual:
    """Average every trained tensor (FedIT), and add sum_k p_k B_k A_k - B_mean A_mean to the side product.

    Source: Singhal et al. 2025 (FedEx-LoRA), https://arxiv.org/abs/2410.09432. Exact: side + lora_B @ lora_A is
    sum_k p_k B_k A_k beside what the side held before. The residual is the weighted covariance
    sum_k p_k (B_k - B_mean)(A_k - A_mean), of rank (C - 1) R at most: it goes down as (D, M) and (M, K) factors, never
    as a D x K matrix. The mean is taken as rounded to the adapter's dtype.

    Where sources differ: the authors' code takes the plain mean of factors, heads and products, here all three have the
    weights p_k; and it adds the transpose of the residual to nn.Linear weights, which square layers hide.

    What is noised under DP: both factors, on the client. The residual is post-processing, but holds products of two
    noised factors, C of them: the noise enters the base every round, and stays. Where one factor trains the mean is
    exact and the side is left alone.

    Guarantees: layers that train one factor or none keep their side as it is; every client gets the same side product,
    whether or not it trained in the rounds that made it. Memory grows with the cohort, whose products are stacked, up
    to 2 min(D, K) + R columns a layer, and no further.

    Args:
        max_rank: most columns of a layer's side product. Above it, the side is cut to its best approximation of that
            rank (Eckart and Young 1936), which is no longer exact. None: min(D, K), where nothing but rounding is lost.
    """

    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise InputError(f"Expected max_rank to be at least 1, or null for exact residuals, got {self.max_rank}")

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the weighted mean, its residual folded into the side.

        Raises: ValueError without updates, or if the updates do not all hold the same tensors.
        """
        running = RunningProducts(adapter)
        for update in updates:
            running.add(update)
        mean = running.mean()
        layers = mean.factors()
        residuals = {
            path: _residual(product, layers[path], num_clients=running.num_updates)
            for path, product in running.products().items()
            if path in running.both
        }
        return with_folded(mean, residuals, max_rank=self.max_rank)


def _residual(product: LoraFactors, mean: LoraFactors, *, num_clients: int) -> LoraFactors:
    """Return product - mean.lora_B @ mean.lora_A as factors of rank (C - 1) R at most."""
    in_features, out_features = product.lora_A.shape[1], len(product.lora_B)
    rank = min((num_clients - 1) * len(mean.lora_A), in_features, out_features)
    if rank == 0:  # one client is its own mean
        return LoraFactors(product.lora_A[:0], product.lora_B[:, :0])
    total = LowRankSum(max_rank=min(in_features, out_features))
    total.add(product)
    total.add(mean, weight=-1.0)
    return total.truncated(rank)
