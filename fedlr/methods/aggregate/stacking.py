"""FLoRA: stack what the clients trained, fold the stack into the side product, and begin the next round anew.

`RunningProducts`, which gathers the stack, and `folded`, which adds a product to a side product, serve other rules too.
Legend: D out_features, K in_features, R rank, C clients.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.streams import Purpose, stream


def stack_and_fold(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """Fold sum_k p_k B_k A_k into the side product; then lora_B <- 0, lora_A <- new random numbers; average the head.

    Source: Wang et al. 2024 (FLoRA), https://arxiv.org/abs/2409.05976. The stack [p_1 B_1, ..., p_C B_C]
    (D, C R) times [A_1; ...; A_C] (C R, K) is the sum of the products, for any ranks: p_k stands on one factor only,
    since on both it would be squared. Exact.

    lora_A is drawn as PEFT draws it by default, uniform on +-1 / sqrt(K), whatever `adapter.init_lora_weights` says for
    round 0. The key of the draw is the SHA-256 of the lora_A that was broadcast: the first comes from the run's seed,
    each later one from the one before, so that a run repeats and resumes without a second seed, also where `seed` is
    null and one was drawn.

    What is noised under DP: both factors, on the client, where the block trains both. The stack is post-processing, and
    the noise that is folded stays in the base for good. Both factors restart every round: in a client's first step
    lora_A has no gradient, because lora_B is 0.

    Guarantees: side + lora_B @ lora_A becomes the former side plus the stack, to rounding, and a layer in which nothing
    trained is left alone. The side product keeps the stacks of all rounds side by side while they have at most
    min(D, K) columns, and is then compressed to min(D, K), which drops no more than rounding. Memory grows
    with the cohort, whose columns are what is stacked, up to 2 min(D, K) + R columns a layer, and no further.

    Raises: ValueError without updates, or if the updates do not all hold the same tensors.
    """
    running = RunningProducts(adapter)
    for update in updates:
        running.add(update)
    products = running.products()
    return with_folded(running.mean().with_factors(_restarted(adapter, products)), products)


class RunningProducts:
    """sum_k p_k B_k A_k of every layer, and the weighted mean of every tensor, over the updates added so far.

    Where a block trains one factor, or none, the adapter's own is the other: the sum then needs no more than rank R.
    """

    def __init__(self, adapter: AdapterState, *, max_rank: int | None = None) -> None:
        """Start at nothing; `adapter` is what was broadcast.

        Args:
            max_rank: columns that a layer's sum is cut to when it has twice as many, which drops the weakest; None:
                min(D, K), which drops nothing.
        """
        self._adapter, self._max_rank = adapter, max_rank
        self._mean = RunningMean()
        self._stacks: dict[str, LowRankSum] = {}
        self._total = 0.0
        self.num_updates = 0

    def add(self, update: ClientUpdate) -> None:
        """Take in one update.

        Raises: ValueError for a weight that is negative or not finite, or for other tensors than the first had.
        """
        self._mean.add(update)
        self._total += update.weight
        self.num_updates += 1
        for path, layer in self._adapter.factors().items():
            lora_A, lora_B = update.tensors.get(Slot(path, LORA_A)), update.tensors.get(Slot(path, LORA_B))
            if lora_A is not None and lora_B is not None:
                if path not in self._stacks:
                    full = _full_rank(layer)
                    self._stacks[path] = LowRankSum(max_rank=min(self._max_rank or full, full))
                self._stacks[path].add(_without_zeros(LoraFactors(lora_A, lora_B)), update.weight)

    def mean(self) -> AdapterState:
        """Return the adapter with the weighted mean of every trained tensor: FedIT's."""
        return self._adapter.with_rounded(self._mean.values())

    @property
    def both(self) -> frozenset[str]:
        """The layers whose two factors trained, so that the product of the means is not the mean of the products."""
        return frozenset(self._stacks)

    def products(self) -> dict[str, LoraFactors]:
        """Return the sum of every layer that trained, as (M, K) and (D, M) factors in float64.

        M is at most min(D, K), or R where one factor trained.

        Raises: ValueError if the weights have no positive, finite sum.
        """
        means, found = self._mean.values(), {}
        for path, layer in self._adapter.factors().items():
            slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
            if path in self._stacks:
                stack = self._stacks[path].factors()
                found[path] = LoraFactors(stack.lora_A, stack.lora_B / self._total)
            elif slot_A in means or slot_B in means:
                lora_A, lora_B = means.get(slot_A, layer.lora_A), means.get(slot_B, layer.lora_B)
                found[path] = LoraFactors(lora_A.double(), lora_B.double())
        return found


def with_folded(
    adapter: AdapterState, products: Mapping[str, LoraFactors], *, max_rank: int | None = None
) -> AdapterState:
    """Return the adapter with a product more in the side of the given layers; the side's mapping is new if it changed.

    Args:
        max_rank: as for `folded`.
    """
    layers, side = adapter.factors(), dict(adapter.side)
    for path, product in products.items():
        layer = folded(side.get(path), product, like=layers[path], max_rank=max_rank)
        if layer is not None:
            side[path] = layer
    changed = any(layer is not adapter.side.get(path) for path, layer in side.items())
    return replace(adapter, side=side) if changed else adapter


def folded(
    side: LoraFactors | None, product: LoraFactors, *, like: LoraFactors, max_rank: int | None = None
) -> LoraFactors | None:
    """Return a side product plus another product, in the dtype of `like`; None where both are nothing.

    The factors stand side by side, without any SVD, while they have at most `max_rank` columns; then the sum is cut to
    its best approximation of that rank. None, and whatever is larger, means min(D, K): that cut drops only rounding.

    Guarantees: the side product itself comes back, untouched, where nothing is added; no argument is changed.
    """
    added = _without_zeros(product)
    if not len(added.lora_A):
        return side
    total = LowRankSum(max_rank=_full_rank(like) if max_rank is None else min(max_rank, _full_rank(like)))
    if side is not None:
        total.add(side)
    total.add(added)
    sum_ = total.factors()
    return LoraFactors(sum_.lora_A.to(like.lora_A.dtype), sum_.lora_B.to(like.lora_B.dtype))


def _full_rank(layer: LoraFactors) -> int:
    return min(len(layer.lora_B), layer.lora_A.shape[1])


def _without_zeros(factors: LoraFactors) -> LoraFactors:
    """Leave out what adds nothing: the padding of a client of smaller rank, factors that are still zero."""
    used_R = factors.lora_A.any(dim=1) & factors.lora_B.any(dim=0)
    return LoraFactors(factors.lora_A[used_R], factors.lora_B[:, used_R])


def _restarted(adapter: AdapterState, paths: Iterable[str]) -> dict[str, LoraFactors]:
    """Return factors for a new start of some layers: lora_A at random, keyed by all present ones, and lora_B zero."""
    layers = adapter.factors()
    public = AdapterState({Slot(path, LORA_A): layer.lora_A for path, layer in layers.items()}, adapter.scale)
    generator = stream(int(public.fingerprint()[:8], 16), Purpose.REINIT)
    new = {}
    for path in sorted(paths):
        lora_A, lora_B = layers[path].lora_A, layers[path].lora_B
        bound = lora_A.shape[1] ** -0.5
        drawn_RK = torch.from_numpy(generator.uniform(-bound, bound, tuple(lora_A.shape)))
        new[path] = LoraFactors(drawn_RK.to(lora_A.dtype), torch.zeros_like(lora_B))
    return new
