"""Strategies for a Flower user's own ServerApp: `FedSVD()` where `FedAvg()` stood.

What they take and how a round goes: `fedlr.flower.lora_strategy`. What a ClientApp does: docs/strategies.md.
"""

from collections.abc import Sequence
from typing import Any

from fedlr.flower.lora_strategy import LoraStrategy, method_named


class FedSVD(LoraStrategy):
    """Train lora_B, average it exactly, re-factorise by SVD (Lee et al. 2025, https://arxiv.org/abs/2505.12805)."""

    method_name = "fedsvd"


class FfaLora(LoraStrategy):
    """Freeze lora_A, train and average lora_B: exact (Sun et al. 2024, https://arxiv.org/abs/2403.12313)."""

    method_name = "ffa_lora"


class LoraFair(LoraStrategy):
    """Average both factors, then correct lora_B (Bian et al. 2025, https://arxiv.org/abs/2411.14961)."""

    method_name = "lora_fair"


class FedIT(LoraStrategy):
    """Average both factors, each on its own: the biased baseline (Zhang et al. 2024, https://arxiv.org/abs/2305.05644)."""

    method_name = "fedit"


def strategy(name: str, overrides: Sequence[str] = (), **options: Any) -> LoraStrategy:
    """Return the strategy of a method of configs/method.

    Args:
        name: of the method, such as "rolora".
        overrides: of its YAML file, such as "aggregate.lr=0.1".
        options: of `LoraStrategy`.

    Raises:
        InputError: for a name or override that there is not, and for a method whose clients would have to do more than
            train a block, with the reason.
    """
    return LoraStrategy(method_named(name, overrides), **options)
