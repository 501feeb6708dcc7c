"""Ranks that the server chooses, layer by layer, from the aggregate of what the clients released.

What AdaLoRA, ElaLoRA, IncreLoRA, SoRA and their kin score with gradients of private data is read here off the noised
aggregate alone, so a choice is post-processing and costs no privacy. Only lora_B trains; in every round the server
re-factorises B A by its SVD (FedSVD, Lee et al. 2025, https://arxiv.org/abs/2505.12805), and every `period` rounds it
changes ranks, without changing the function:

    side <- side + U_w S_w V_w^T     the directions that are given up stay in the function, frozen
    A <- [V_k^T; Q],  B <- [U_k S_k, 0]     those that stay, and what a layer gains: fresh orthonormal rows Q

A client trains, noises and sends a layer's R_l directions and no more: fewer bytes, and under DP a smaller tensor in
the joint clip norm. All layers keep the scale of adapter.rank, whatever their own rank.
Legend: D out_features, K in_features, R rank of adapter.rank, the most of a layer, R_l rank of layer l at the moment.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.factors import orthonormal_rows, svd_refactor
from fedlr.adapters.state import AdapterState, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.stacking import with_folded
from fedlr.methods.finalise.renewal import fresh_rows, stacked
from fedlr.streams import Purpose, stream

RANKS, CLOCK, MOST = "ranks", Slot("", "clock"), "most"  # of the memory "ranks": rounds and key; a layer's most

Spectra = Mapping[str, Sequence[float]]  # by layer: the singular values of B A, descending, per sqrt(D)


@dataclass(frozen=True)
class RankPolicy(ABC):
    """The frame of the policies below: orthonormal rows and the first ranks before round 0, then a choice every
    `period` rounds.

    Args:
        period: aggregated rounds between two choices, the time that a fresh direction has to show what it is worth.
        min_rank: least rank of a layer.

    Exact: side + B A, the scale and the head are the same before and after, up to the rounding of one SVD.

    Guarantees: a function of the adapter and of its memory (a counter, a key made of the adapter before round 0, and
    the rank each layer began with), so a run repeats and resumes. Where B A is zero in all layers ranks stay. Rows of
    lora_A are orthonormal, fresh ones orthogonal to the kept ones and, while there is room, to the folded ones.

    Raises: InputError for an argument out of range.
    """

    period: int = 2
    min_rank: int = 1

    def __post_init__(self) -> None:
        for name, number in (("period", self.period), ("min_rank", self.min_rank)):
            if number < 1:
                raise InputError(f"Expected {name} >= 1, got {number}")

    @abstractmethod
    def started(self, most: Mapping[str, int]) -> dict[str, int]:
        """Return the ranks before round 0, when nothing is known of any layer."""

    @abstractmethod
    def chosen(self, spectra: Spectra, most: Mapping[str, int], num_rounds: int) -> dict[str, int]:
        """Return the ranks after so many aggregated rounds, each in [1, most]."""

    def __call__(self, adapter: AdapterState) -> AdapterState:
        """Return the re-factorised adapter, every `period` rounds with other ranks."""
        if RANKS not in adapter.memory:
            # The drawn lora_A, before any arithmetic of this machine: the same bits wherever the run is repeated.
            clock = {CLOCK: torch.tensor([0, int(adapter.fingerprint()[:8], 16)])}
            most = adapter.ranks()
            known = {Slot(path, MOST): torch.tensor(rank) for path, rank in most.items()}
            started = adapter.with_factors({p: orthonormal_rows(layer) for p, layer in adapter.factors().items()})
            return resized(started.remembering(RANKS, {**clock, **known}), self.started(most))
        memory = adapter.memory[RANKS]
        clock = {CLOCK: memory[CLOCK] + torch.tensor([1, 0])}
        adapter = adapter.with_factors({p: svd_refactor(layer) for p, layer in adapter.factors().items()})
        adapter = adapter.remembering(RANKS, {**memory, **clock})
        num_rounds = int(clock[CLOCK][0])
        found = spectra(adapter)
        if num_rounds % self.period or not any(map(any, found.values())):
            return adapter
        most = {slot.path: int(rank) for slot, rank in memory.items() if slot.role == MOST}
        return self.resized(adapter, self.chosen(found, most, num_rounds))

    def resized(self, adapter: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
        """Return the adapter with these ranks and the same function."""
        return resized(adapter, ranks)


@dataclass(frozen=True)
class RankBudget(RankPolicy):
    """Share a budget of directions out over all layers, to where the noised aggregate is strongest.

    The budget is a share of all the directions that adapter.rank gives the layers together. It goes to the largest
    singular values of all layers, per sqrt(D), as independent noise has singular values near sqrt(D) times its own
    standard deviation in a layer of any size. A layer's untried directions stand in line with an estimate: s R_l / r
    for number r > R_l, s being its weakest value, so a layer whose weakest direction is strong grows, at the cost of
    those whose weakest are weak. A fresh direction that did not grow within a period is given up again.

    Carries, with scores of its own: the pruning under a budget of AdaLoRA (Zhang et al. 2023,
    https://arxiv.org/abs/2303.10512), the pruning and expansion of ElaLoRA, the redistribution of EVA, there by
    explained variance of the activations; and with `start_share` < `share` and `prunes` false the growth of IncreLoRA
    (Zhang et al. 2023, https://arxiv.org/abs/2308.12043). Those papers score with private gradients or activations;
    none of their algorithms is this one. ARD-LoRA's learned scales of ranks are not here.

    Args:
        share: of all directions, in (0, 1], from round `ramp_rounds` on.
        start_share: before round 0, shared out equally; it goes to `share` in equal steps.
        ramp_rounds: aggregated rounds that takes.
        prunes: whether a layer may lose directions.
    """

    share: float = 0.5
    start_share: float = 0.5
    ramp_rounds: int = 1
    prunes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("share", self.share), ("start_share", self.start_share)):
            if not 0 < share <= 1:
                raise InputError(f"Expected {name} in (0, 1], got {share}")
        if self.ramp_rounds < 1:
            raise InputError(f"Expected ramp_rounds >= 1, got {self.ramp_rounds}")

    def started(self, most: Mapping[str, int]) -> dict[str, int]:
        """Return the first budget shared out equally, what is left over to the first layers."""
        return self._given_out({path: [] for path in most}, most, self.budget(most, 0))

    def chosen(self, spectra: Spectra, most: Mapping[str, int], num_rounds: int) -> dict[str, int]:
        """Return the ranks that the budget's strongest directions give."""
        return self._given_out(spectra, most, self.budget(most, num_rounds))

    def budget(self, most: Mapping[str, int], num_rounds: int) -> int:
        """Return how many directions all layers have together after so many rounds."""
        done = min(1.0, num_rounds / self.ramp_rounds)
        share = self.start_share + (self.share - self.start_share) * done
        least = sum(min(self.min_rank, rank) for rank in most.values())
        return max(least, round(share * sum(most.values())))

    def _given_out(self, spectra: Spectra, most: Mapping[str, int], budget: int) -> dict[str, int]:
        floors = {path: len(spectra[path]) if not self.prunes else self.min_rank for path in most}
        ranks = {path: max(1, min(max(floors[path], self.min_rank), most[path])) for path in most}
        in_line = sorted(
            (-value, number, path)
            for path in most
            for number, value in enumerate(expected_values(spectra[path], most[path]), start=1)
            if number > ranks[path]
        )
        for _, _, path in in_line[: max(0, budget - sum(ranks.values()))]:
            ranks[path] += 1
        return ranks


@dataclass(frozen=True)
class RankEnergy(RankPolicy):
    """Keep of each layer the fewest directions that hold a share of ||B A||_F^2; ranks only fall.

    Carries, with a score of its own: the pruning of SoRA (Ding et al. 2023, https://arxiv.org/abs/2311.11696), there by
    gates under an L1 penalty, of dynamic-rank DoRA (not weight-decomposed DoRA) and of Dynamic Rank-Selective LoRA;
    those learn importance weights from private gradients, and none of their algorithms is this one. Noise alone fills
    all directions alike: the larger its share, the fewer are given up.

    Args:
        keep: share of the energy of what trains, in (0, 1], at every choice anew; 1 gives up zero directions alone.
        folds: whether what is given up goes into the side. Otherwise it is lost: biased, by at most sqrt(1 - keep) of
            ||B A||_F a choice and layer.
    """

    keep: float = 0.9
    folds: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise InputError(f"Expected keep in (0, 1], got {self.keep}")

    def started(self, most: Mapping[str, int]) -> dict[str, int]:
        """Return the ranks as they are."""
        return dict(most)

    def chosen(self, spectra: Spectra, most: Mapping[str, int], num_rounds: int) -> dict[str, int]:
        """Return how many directions of each layer hold the share; where there is no energy, its rank."""
        return {path: self._kept(torch.tensor(values, dtype=torch.float64)) for path, values in spectra.items()}

    def _kept(self, values_R: Tensor) -> int:
        energy_R = values_R.square()
        before_R = energy_R.cumsum(0) - energy_R  # what all stronger directions hold
        needed = int((before_R < self.keep * energy_R.sum()).sum()) if energy_R.any() else len(values_R)
        return min(max(needed, self.min_rank), len(values_R))

    def resized(self, adapter: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
        """Return the adapter with these ranks; without `folds` what is given up is lost."""
        return resized(adapter, ranks, folds=self.folds)


def expected_values(values: Sequence[float], most: int) -> list[float]:
    """Return a layer's singular values and, for directions that it has not tried, estimates that fall as 1 / number.

    >>> expected_values([3.0, 2.0], 4), expected_values([], 2)
    ([3.0, 2.0, 1.3333333333333333, 1.0], [0.0, 0.0])
    """
    rank = len(values)
    weakest = values[-1] if values else 0.0
    return [*values, *(weakest * rank / number for number in range(rank + 1, most + 1))]


def spectra(adapter: AdapterState) -> dict[str, list[float]]:
    """Return the singular values per sqrt(D) of every layer of a re-factorised adapter, descending: the norms of the
    columns of lora_B, as the rows of lora_A are orthonormal."""
    return {
        path: (layer.lora_B.double().norm(dim=0) / math.sqrt(len(layer.lora_B))).tolist()
        for path, layer in adapter.factors().items()
    }


def resized(adapter: AdapterState, ranks: Mapping[str, int], *, folds: bool = True) -> AdapterState:
    """Return the adapter with other ranks: the weakest directions, which come last, leave; fresh ones come.

    Args:
        adapter: with orthonormal rows in lora_A, strongest first, and the clock of a policy in its memory.
        ranks: by layer, in [1, K].
        folds: whether what leaves goes into the side, so that the function stays.
    """
    num_rounds, key = (int(number) for number in adapter.memory[RANKS][CLOCK])
    layers = adapter.factors()
    leaving = {
        path: LoraFactors(layer.lora_A[ranks[path] :], layer.lora_B[:, ranks[path] :])
        for path, layer in layers.items()
        if ranks[path] < len(layer.lora_A)
    }
    adapter = with_folded(adapter, leaving) if folds else adapter
    new: dict[str, LoraFactors] = {}
    for index, (path, layer) in enumerate(layers.items()):
        kept = LoraFactors(layer.lora_A[: ranks[path]], layer.lora_B[:, : ranks[path]])
        if (missing := ranks[path] - len(layer.lora_A)) > 0:
            drawn = stream(key, Purpose.REINIT, client=index, round_index=num_rounds)
            side_MK = adapter.side[path].lora_A if path in adapter.side else layer.lora_A[:0]
            draws_NK = torch.from_numpy(drawn.standard_normal((missing, layer.lora_A.shape[1])))
            rows_NK = fresh_rows(draws_NK, layer.lora_A, side_MK).to(layer.lora_A.dtype)
            columns_DN = layer.lora_B.new_zeros(len(layer.lora_B), missing)
            kept = stacked(layer, LoraFactors(rows_NK, columns_DN))
        new[path] = LoraFactors(kept.lora_A.contiguous(), kept.lora_B.contiguous())
    return adapter.with_factors(new)
