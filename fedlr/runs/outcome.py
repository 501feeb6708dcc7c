"""What came of a run: whether any update counted, whether anything moved, and what to change where nothing did."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, Slot, side_tensors

SMALLER_STEPS = "lower trainer.optimizer.lr, or raise trainer.divisor"
LARGER_STEPS = "raise trainer.optimizer.lr or trainer.sample_rate, or lower trainer.divisor"
MORE_BUDGET = "raise privacy.epsilon, or lower privacy.max_participations or trainer.num_steps"
# By the reason that is given most often.
ADVICE: Mapping[str, str] = {
    "not_finite": SMALLER_STEPS,
    "too_large": SMALLER_STEPS,
    "budget_exhausted": MORE_BUDGET,
    "no_answer": "see why clients give no answer",
}


def counted(reasons: Mapping[str, int]) -> str:
    """Write reasons with their counts, the most frequent first.

    >>> counted({"too_large": 1, "not_finite": 3})
    '3 not_finite, 1 too_large'
    """
    return ", ".join(f"{number} {reason}" for reason, number in _by_count(reasons))


def problem_of(
    start: AdapterState,
    end: AdapterState,
    rows: Sequence[Mapping[str, Any]],
    *,
    keeps: bool = False,
    released: Mapping[str, Any] | None = None,
) -> str | None:
    """Return why the whole run was for nothing, with what to change; None where it was not.

    Args:
        start: the adapter before the first round.
        end: the adapter that is released.
        rows: the lines of metrics.jsonl.
        keeps: whether clients train tensors that they keep, which no adapter of the server shows.
        released: the line of `end`; None: the last.
    """
    rounds = rows[1:]
    if rounds and all(row["num_trained"] == 0 for row in rounds):  # None: it is told to nobody
        reasons: Counter[str] = Counter()
        for row in rounds:
            reasons.update(row.get("reasons", {}))
        advice = next((ADVICE[reason] for reason, _ in _by_count(reasons) if reason in ADVICE), SMALLER_STEPS)
        return (
            f"Expected at least one update that can be used, got none in {len(rounds)} rounds ({counted(reasons)}): "
            f"the model is the one it started from; {advice}"
        )
    if (released or rows[-1])["loss"] is None:
        return f"Expected a model whose outputs are finite, got a loss that is not; {SMALLER_STEPS}"
    if rounds and not keeps and not has_moved(start, end):
        return (
            f"Expected updates that change the model, got {sum(row['num_trained'] or 0 for row in rounds)} that leave "
            f"it as it was; {LARGER_STEPS}"
        )
    return None


def has_moved(before: AdapterState, after: AdapterState) -> bool:
    """Return whether the model computes with other numbers: a layer whose product is zero twice has not moved.

    >>> zero = AdapterState({Slot("x", "lora_A"): torch.ones(1, 2), Slot("x", "lora_B"): torch.zeros(2, 1)}, scale=1.0)
    >>> has_moved(zero, zero.with_tensors({Slot("x", "lora_A"): torch.zeros(1, 2)}))
    False
    """
    one, other = ({**state.tensors, **side_tensors(state.side)} for state in (before, after))
    idle = {path for path in before.factors() if _is_zero(one, path) and _is_zero(other, path)}
    return any(
        slot not in one or slot not in other or not torch.equal(one[slot], other[slot])
        for slot in one.keys() | other.keys()
        if not (slot.role in (LORA_A, LORA_B) and slot.path in idle)
    )


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None where it is not finite."""
    return value if math.isfinite(value) else None


def _is_zero(tensors: Mapping[Slot, Tensor], path: str) -> bool:
    return not (tensors[Slot(path, LORA_A)].any() and tensors[Slot(path, LORA_B)].any())


def _by_count(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
