"""Clients of different ranks: FlexLoRA's redistributed SVD, and HetLoRA's mean of zero-padded factors.

Here every update has the adapter's rank R already: rows of lora_A and columns of lora_B beyond the client's own rank
r_k are zero. On the way down a client keeps the first r_k rows and columns. All share one scale s.
Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedlr.adapters.factors import product_norm
from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.methods.aggregate.stacking import RunningProducts

HELD_BYTES = 6 * 10**7  # of all layers' sums together


def svd_redistribution(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """Return U S as lora_B and V^T as lora_A of the SVD of sum_k p_k B_k A_k, cut to rank R; average the head.

    Source: Bai et al. 2024 (FlexLoRA), https://arxiv.org/abs/2402.11505, in factored form: no D x K matrix is
    made. S is on lora_B and descends, so a client that keeps the first r_k rows and columns has the best approximation
    of rank r_k. Biased by what lies beyond rank R (and, for a client, beyond r_k); exact where the sum has rank R, as
    with one lora_A for all: then this is FedSVD's step. The paper's clients have an alpha / r of their own, which its
    sum must contain; here all have one scale, so there is nothing to rescale.

    Where the sum has a lower rank, lora_A is completed to orthonormal rows, first by directions of the mean lora_A,
    because a zero row beside a zero column never trains. A sum that is zero leaves the mean lora_A, and lora_B zero.

    What is noised under DP: whatever the block trains, on the client; the SVD is post-processing.

    Guarantees: memory is bounded, however large the cohort. Where all layers' sums together would take more than
    HELD_BYTES, each is cut to its strongest directions on the way (38 at 48 layers of 1024 x 1024): the result is then
    near the best of rank R, and no longer exactly it. Where the sum is not zero, rows of lora_A are orthonormal, with
    the signs of `fedlr.adapters.factors.svd_refactor`. A layer in which nothing trained is left alone.

    Raises: ValueError without updates, or if the updates do not all hold the same tensors; InputError if the rank is
    above a layer's in_features.
    """
    running = RunningProducts(adapter, max_rank=held_rank(adapter))
    for update in updates:
        running.add(update)
    mean = running.mean()
    layers = mean.factors()
    return mean.with_factors(
        {path: best_of_rank(product, layers[path]) for path, product in running.products().items()}
    )


def norm_weighted_mean(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """Average the factors of every layer with weights p_k proportional to ||B_k A_k||_F, the head with the server's.

    Source: Cho et al. 2024 (HetLoRA), https://arxiv.org/abs/2401.06432, whose weights, written for one matrix,
    are taken a layer at a time. A client of small rank or of a small product counts less. Where all norms are zero the
    server's weights serve; otherwise they have a say in the head only, and a weight of zero leaves a client out.
    Biased: as FedIT's, the product of the means is not the mean of the products; and rows that few clients have are
    diluted by the zeros of the others.

    HetLoRA's pruning of ranks is `fedlr.methods.aggregate.pruning.SelfPruning`, which averages with this.

    What is noised under DP: whatever the block trains, on the client. Norms are those of the noised factors, so they
    reveal nothing new; with much noise they measure the noise. A client that scales its update up scales its own weight
    with it: clip what clients may send where they are not trusted.

    Guarantees: each update is read once and let go; memory does not grow with the cohort; with one client, or where all
    clients return the same, it is theirs.

    Raises: ValueError without updates, or if the updates do not all hold the same tensors.
    """
    plain, layers = RunningMean(), {path: RunningMean() for path in adapter.factors()}
    grew: set[str] = set()
    for update in updates:
        plain.add(update)
        trained = adapter.with_tensors(update.tensors).factors()
        for path, mean in layers.items():
            weight = product_norm(trained[path]) if update.weight > 0 else 0.0
            tensors = {slot: tensor for slot, tensor in update.tensors.items() if slot.path == path}
            mean.add(replace(update, tensors=tensors, weight=weight))
            if weight > 0:
                grew.add(path)
    values = plain.values()
    for path in grew:
        values |= layers[path].values()
    return adapter.with_rounded(values)


def held_rank(adapter: AdapterState) -> int:
    """Return how many directions of every layer's sum are kept: twice as many columns are held, in float64."""
    layers = adapter.factors().values()
    bytes_a_rank = sum(2 * 8 * (len(layer.lora_B) + layer.lora_A.shape[1]) for layer in layers)
    return max(HELD_BYTES // max(1, bytes_a_rank), *(4 * len(layer.lora_A) for layer in layers), 1)


def best_of_rank(product: LoraFactors, mean: LoraFactors) -> LoraFactors:
    """Return the best approximation of a product of the mean's rank, in its dtype."""
    rank, in_features = mean.lora_A.shape
    total = LowRankSum(max_rank=min(in_features, len(mean.lora_B)))
    total.add(product)
    best = total.truncated(rank, like=mean.lora_A)
    if not best.lora_B.any():
        return LoraFactors(mean.lora_A, torch.zeros_like(mean.lora_B))
    return LoraFactors(best.lora_A.to(mean.lora_A.dtype), best.lora_B.to(mean.lora_B.dtype))
