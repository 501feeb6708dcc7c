"""A random part of each layer's directions trains in a round; the others rest in the side product, and in the function.

DropLoRA masks rank directions at random and DyLoRA trains a random prefix of them, both within a step and with what is
masked left out of the function. Here the draw is the server's, for a round, and what rests still counts: it goes down
as the side, clients merge it into their base and neither train nor noise it, and the server takes it back into the
product before it re-factorises and draws again. Which directions train depends on no data, so it costs no privacy.
Legend: D out_features, K in_features, R rank.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlr.adapters.factors import orthonormal_rows, svd_refactor
from fedlr.adapters.state import AdapterState, LoraFactors
from fedlr.errors import InputError
from fedlr.methods.finalise.rank_policy import CLOCK, RANKS
from fedlr.streams import Purpose, stream


@dataclass(frozen=True)
class RandomDirections:
    """Draw in every round which directions of the SVD of B A train; only lora_B does.

    Carries DropLoRA's mask, and with `nested` DyLoRA's prefix (Valipour et al. 2022, https://arxiv.org/abs/2210.07558),
    by the round and with what rests left in the function, which neither paper does; so a prefix of the result is no
    model of its own, as DyLoRA's is.

    Args:
        share: of a layer's directions that train in a round, in (0, 1]; at least one does.
        nested: train the strongest b directions, b / R drawn uniformly in every round, one for all layers; `share` is
            then not read.

    Exact: B A with the side is the same before and after, up to the rounding of one SVD. The whole product keeps rank
    R, and its row space is that of the first lora_A: nothing is given up for good.

    Guarantees: draws follow from the adapter before round 0 and the number of aggregated rounds. A rule that folds for
    good is not for it: its side would train too.

    Raises: InputError for an argument out of range.
    """

    share: float = 0.5
    nested: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"Expected share in (0, 1], got {self.share}")

    def __call__(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter with the directions of the next round as its factors, all others as its side."""
        if RANKS not in adapter.memory:
            clock = torch.tensor([0, int(adapter.fingerprint()[:8], 16)])
            whole = {path: orthonormal_rows(layer) for path, layer in adapter.factors().items()}
        else:
            clock = adapter.memory[RANKS][CLOCK] + torch.tensor([1, 0])
            whole = {path: svd_refactor(product) for path, product in adapter.products().items()}
        num_rounds, key = (int(number) for number in clock)
        part = stream(key, Purpose.REINIT, round_index=num_rounds).uniform()
        trains: dict[str, LoraFactors] = {}
        side: dict[str, LoraFactors] = {}
        for index, (path, layer) in enumerate(whole.items()):
            drawn = stream(key, Purpose.REINIT, client=index, round_index=num_rounds, step=1)
            chosen_R = self._chosen(len(layer.lora_A), part, drawn)
            trains[path] = _directions(layer, chosen_R)
            if not all(chosen_R):
                side[path] = _directions(layer, ~chosen_R)
        return replace(adapter.with_factors(trains).remembering(RANKS, {CLOCK: clock}), side=side)

    def _chosen(self, rank: int, part: float, drawn: np.random.Generator) -> torch.Tensor:
        chosen_R = torch.zeros(rank, dtype=torch.bool)
        if self.nested:
            chosen_R[: max(1, math.ceil(part * rank))] = True
        else:
            chosen_R[drawn.permutation(rank)[: max(1, round(self.share * rank))]] = True
        return chosen_R


def _directions(layer: LoraFactors, chosen_R: torch.Tensor) -> LoraFactors:
    return LoraFactors(layer.lora_A[chosen_R].contiguous(), layer.lora_B[:, chosen_R].contiguous())
