"""All updates of a round at once, for the rules that compare them: checked before a rule looks at any of them.

Memory grows with the cohort. A robust rule promises something for so many updates and for weights that it knows, so
whatever breaks the promise is refused here, and nothing is aggregated.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.errors import InputError


class TooFewUpdates(InputError):
    """A round had fewer usable updates than the rule needs: it is no aggregate, and the round keeps its adapter."""


def held_updates(
    updates: Iterable[ClientUpdate], *, rule: str, least: int = 1, takes_weights: bool = False
) -> list[ClientUpdate]:
    """Return the updates in ascending client order.

    Args:
        updates: of one round, validated.
        rule: its name, for the errors.
        least: updates that the rule needs.
        takes_weights: whether the weights may differ; else a client's influence would not be what the rule bounds.

    Raises:
        InputError: for weights that differ where they may not.
        TooFewUpdates: which is one, too.
        ValueError: without updates, or if they do not all hold the same tensors.
    """
    held = sorted(updates, key=lambda update: update.client_id)
    if not held:
        raise ValueError("Expected at least one update, got none")
    weights = sorted({update.weight for update in held})
    if len(weights) > 1 and not takes_weights:
        raise InputError(
            f"Expected weighting=uniform for method.aggregate={rule}, got weights from {weights[0]:g} to "
            f"{weights[-1]:g}: it bounds the influence of a client, not of a row"
        )
    if len(held) < least:
        raise TooFewUpdates(
            f"Expected at least {least} usable updates in a round for method.aggregate={rule}, got {len(held)}; set a "
            "larger cohort_size or a smaller method.aggregate.num_malicious"
        )
    if any(update.tensors.keys() != held[0].tensors.keys() for update in held):
        raise ValueError("Expected the same tensors in every update, got others from one of them")
    return held


def stacked(held: Sequence[ClientUpdate], slot: Slot) -> Tensor:
    """Return one tensor of every update, (C, ...), in float64."""
    return torch.stack([update.tensors[slot].double() for update in held])
