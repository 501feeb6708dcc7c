"""HetLoRA's self-pruning: a client whose last ranks faded in a round has fewer of them from then on.

Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from fedlr.adapters.client_ranks import CLIENT_RANKS
from fedlr.adapters.state import AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.rank import norm_weighted_mean


@dataclass(frozen=True)
class SelfPruning:
    """Average as `norm_weighted_mean`, and lower the rank of each client whose tail shrank while it trained.

    The tail of a client of rank r_k is what lies beyond its first floor(keep * r_k) ranks; its size is the sum over
    layers of ||B_k[:, tail]||_F ||A_k[tail]||_F. Where that is smaller in what the client returns than in what it was
    sent, the client has floor(keep * r_k) ranks from its next round on, and never fewer than `min_rank`.

    Source: Cho et al. 2024 (HetLoRA), sec. 3, https://arxiv.org/abs/2401.06432, where clients prune themselves. The
    server sees what they would: so it judges here, remembers their ranks, and a client needs no memory. The penalty
    that makes tails shrink is `fedlr.methods.client_rules.tail.TailPenalty`.

    What is noised under DP: all that the block trains, so a rank is a function of what was released. Noise makes
    tails grow: little is pruned where it is large against the penalty.

    Guarantees: with keep = 1 no tail, and nothing is pruned; a rank never rises; the mean is that of all updates, those
    of clients that are pruned in this round included; each update is read once and let go.

    Args:
        keep: share of a client's ranks that are not its tail, in (0, 1].
        min_rank: at least 1.

    Raises: InputError for another share or rank; as `norm_weighted_mean`.
    """

    keep: float
    min_rank: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"Expected keep in (0, 1], got {self.keep}")
        if self.min_rank < 1:
            raise InputError(f"Expected min_rank to be at least 1, got {self.min_rank}")

    @property
    def prunes(self) -> bool:
        """Whether clients' ranks may change."""
        return self.keep < 1

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the mean, with the ranks of all clients that were ever pruned in its memory."""
        ranks = dict(adapter.memory.get(CLIENT_RANKS, {}))
        mean = norm_weighted_mean(adapter, self._judged(adapter, updates, ranks))
        return mean.remembering(CLIENT_RANKS, ranks) if ranks else mean

    def _judged(
        self, adapter: AdapterState, updates: Iterable[ClientUpdate], ranks: dict[Slot, Tensor]
    ) -> Iterator[ClientUpdate]:
        sent = adapter.factors()
        most = max(len(layer.lora_A) for layer in sent.values())
        for update in updates:
            rank = most if update.rank is None else update.rank
            first = floor(self.keep * rank)
            returned = adapter.with_tensors(update.tensors).factors()
            if first < rank and tail_size(returned, first, rank) < tail_size(sent, first, rank):
                ranks[Slot(str(update.client_id), CLIENT_RANKS)] = torch.tensor([max(first, min(rank, self.min_rank))])
            yield update


def tail_size(layers: Mapping[str, LoraFactors], first: int, rank: int) -> float:
    """Return the sum over layers of ||B[:, first:rank]||_F ||A[first:rank]||_F.

    >>> layer = LoraFactors(lora_A=torch.eye(3), lora_B=torch.tensor([[5.0, 2.0, 7.0]]))
    >>> tail_size({"layer": layer}, first=1, rank=2)
    2.0
    """
    tails = ((layer.lora_B[:, first:rank].double(), layer.lora_A[first:rank].double()) for layer in layers.values())
    return sum(float(tail_B.norm() * tail_A.norm()) for tail_B, tail_A in tails)
