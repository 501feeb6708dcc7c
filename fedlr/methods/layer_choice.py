"""Blocks of single slots: which factor a layer trains (AS-LoRA), and which layers train at all.

Both are functions of the adapter and of scores made of released updates, so they cost no privacy, and the mean of a
round stays exact layer by layer. For AS-LoRA `ScoredMean` keeps the scores in the adapter's memory, and `BetterFactor`
reads them; `StrongestLayers` reads the adapter alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.factors import product_norm
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, Block, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import RunningMean

# Names in the adapter's memory: the last mean step of a factor, its square, its score, and the rounds since.
STEP, SQUARE, SCORE, WAIT = "choice_step", "choice_square", "choice_score", "choice_wait"


@dataclass(frozen=True)
class BetterFactor:
    """Train lora_A or lora_B of each layer, whichever has the higher score; a block of single slots.

    Source: Kim et al. 2026 (AS-LoRA), https://arxiv.org/abs/2605.05769: the choice by layer and round, from a
    second-order score smoothed over rounds. Of the paper we know the abstract and notes; the rule below is ours.
    lora_B trains while it is zero (lora_A then has no gradient), and each factor once before scores are compared.
    A factor that no round of the last `max_wait` trained is next, because its score says nothing of today.

    Exact with a mean: each layer trains one factor.

    Args:
        max_wait: rounds after which a factor trains whatever its score; 1 alternates.
    """

    max_wait: int = 5

    def __post_init__(self) -> None:
        if self.max_wait < 1:
            raise InputError(f"Expected max_wait to be at least 1, got {self.max_wait}")

    @property
    def roles(self) -> Iterable[str]:
        """Both factors: any of them may train in some layer."""
        return (LORA_A, LORA_B)

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return one slot a layer."""
        layers = adapter.factors().items()
        return frozenset(Slot(path, self._choice(path, layer, adapter.memory)) for path, layer in layers)

    def _choice(self, path: str, layer: LoraFactors, memory: Mapping[str, Mapping[Slot, Tensor]]) -> str:
        scores, waits = memory.get(SCORE, {}), memory.get(WAIT, {})
        slots = [Slot(path, role) for role in (LORA_B, LORA_A)]
        if not layer.lora_B.any():
            return LORA_B
        for slot in slots:
            if slot not in scores:
                return slot.role
        longest = max(slots, key=lambda slot: float(waits[slot]))
        if float(waits[longest]) >= self.max_wait:
            return longest.role
        return max(slots, key=lambda slot: float(scores[slot])).role  # lora_B if they are equal


@dataclass(frozen=True)
class ScoredMean:
    """Average what the clients trained, as `weighted_mean`, and remember a score for every factor.

    The score is our reading of AS-LoRA (Kim et al. 2026, https://arxiv.org/abs/2605.05769), whose formula we have not
    seen. Where clients take plain steps along the gradient, the mean step d of a factor is -eta g, with one eta for
    both factors, and the change of d since the factor last trained is a secant of its curvature: H d_last =
    (d_last - d) / eta. The loss that another step d would save is, to second order,

        -<g, d> - <d, H d> / 2 = |d|^2 (1 + c) / 2 eta,    c = <d_last, d> / |d_last|^2 in [-1, 1],

    if H along d is as along d_last: all of |d|^2 where steps repeat, nothing where they turn back. A first step has no
    last: c = 1. Scores are smoothed: score <- decay score + (1 - decay) new. The other factor moved in between, and
    adaptive local optimisers rescale their steps, so this is a heuristic.

    Noise: |d|^2 is estimated by the products of different clients' steps alone,
    (|d|^2 - sum_k p_k^2 |d_k|^2) / (1 - sum_k p_k^2), floored at 0, because independent noise is no part of it; by
    |d|^2 itself the factor with more entries would win by its noise. With one client |d|^2 is all there is.

    Exact in a layer of which one factor trains. Guarantees: reads each update once; memory holds one step a factor.

    Args:
        decay: of the smoothed score, in [0, 1); 0 is the last round alone.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)

    decay: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"Expected decay in [0, 1), got {self.decay}")

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the weighted mean, with scores of all factors that trained in its memory."""
        running, weights, squares = RunningMean(), [0.0, 0.0], dict[Slot, float]()
        for update in updates:
            running.add(update)
            weights = [weights[0] + update.weight, weights[1] + update.weight**2]
            for slot, tensor in update.tensors.items():
                step = tensor.double() - adapter.tensors[slot].double()
                squares[slot] = squares.get(slot, 0.0) + update.weight**2 * float(step.square().sum())
        mean = running.values()
        paths = adapter.factors().keys()
        factors = [Slot(path, role) for path in paths for role in (LORA_A, LORA_B)]
        steps = {slot: mean[slot] - adapter.tensors[slot].double() for slot in factors if slot in mean}
        alone = weights[1] / weights[0] ** 2  # sum_k p_k^2
        shared = {slot: _shared_square(step, squares[slot] / weights[0] ** 2, alone) for slot, step in steps.items()}
        after = adapter.with_rounded(mean)
        new_scores = {slot: self._score(slot, steps[slot], shared[slot], adapter.memory) for slot in steps}
        waited = adapter.memory.get(WAIT, {})
        waits = {s: torch.tensor(0.0) if s in steps else waited.get(s, torch.tensor(0.0)) + 1 for s in factors}
        for name, values in ((STEP, steps), (SQUARE, shared), (SCORE, new_scores), (WAIT, waits)):
            after = after.remembering(name, {**adapter.memory.get(name, {}), **values})
        return after

    def _score(self, slot: Slot, step: Tensor, square: Tensor, memory: Mapping[str, Mapping[Slot, Tensor]]) -> Tensor:
        agreement = torch.tensor(1.0, dtype=torch.float64)
        if slot in memory.get(STEP, {}) and memory[SQUARE][slot] > 0:
            agreement = ((memory[STEP][slot] * step).sum() / memory[SQUARE][slot]).clamp(-1, 1)
        score = square * (1 + agreement) / 2
        if slot in memory.get(SCORE, {}):
            score = self.decay * memory[SCORE][slot] + (1 - self.decay) * score
        return score


def _shared_square(step: Tensor, own_squares: float, alone: float) -> Tensor:
    """Return |d|^2 from the products of different clients alone; from |d|^2 where there is one client."""
    square = step.square().sum()
    if 1 - alone < 1e-12:
        return square
    return ((square - own_squares) / (1 - alone)).clamp(min=0)


@dataclass(frozen=True)
class StrongestLayers:
    """Train lora_B of the layers that have learnt most, and of all layers every few rounds.

    The score of a layer is ||B A||_F^2 / (D R): with orthonormal rows of lora_A, as FedSVD's, the mean square of the
    numbers in lora_B, to which independent noise adds the same in layers of any size. All layers train in rounds 0,
    `explore_every`, 2 `explore_every`, ..., and while all scores are zero. What does not train stays in the function,
    neither noised nor sent up.

    Carries Selective LoRA's switches and DiffoRA's choice of modules, with another score: they learn indicators by
    gradients of private data, here the noised aggregate is read. Neither paper's algorithm is this one.

    Args:
        share: of the layers that train between two explorations, in (0, 1]; at least one does.
        explore_every: rounds from one exploration to the next; 1 trains all layers always.
    """

    share: float = 0.5
    explore_every: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"Expected share in (0, 1], got {self.share}")
        if self.explore_every < 1:
            raise InputError(f"Expected explore_every >= 1, got {self.explore_every}")

    @property
    def roles(self) -> Iterable[str]:
        """lora_B alone."""
        return (LORA_B,)

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return lora_B of the strongest layers, by path where they are equal, or of all."""
        layers = adapter.factors()
        scores = {path: product_norm(layer) ** 2 / layer.lora_B.numel() for path, layer in layers.items()}
        if round_index % self.explore_every == 0 or not any(scores.values()):
            return frozenset({LORA_B})
        strongest = sorted(layers, key=lambda path: (-scores[path], path))[: max(1, round(self.share * len(layers)))]
        return frozenset(Slot(path, LORA_B) for path in strongest)
