"""Server momentum: v <- b v + (aggregate - adapter), adapter <- adapter + v, on top of any rule that makes a mean.

The aggregate is made of released updates, so this is post-processing: no privacy is spent. Noise of several rounds is
averaged in the direction of the step, and added up in its length: a steady step grows to 1 / (1 - b) of itself. What it
makes of the noise is in `fedlr.training.rates`.

v belongs to the coordinates of the factors. Where a finaliser turns those of lora_B (A' = Q A, B' = B Q^-1), v turns
with them, so that v A, the direction in delta_W, stays the same (`turned`).
Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_B, AdapterState, LoraFactors, Slot

VELOCITY = "server_momentum"  # in the server's memory, float64


def with_momentum(
    before: AdapterState,
    aggregated: AdapterState,
    *,
    momentum: float,
    moves: Callable[[Slot], bool],
    rate: float = 1.0,
) -> AdapterState:
    """Return the aggregate with v in place of the round's own step, in the slots that `moves` says, and v remembered.

    Args:
        before: the adapter that was broadcast.
        aggregated: what the method made of the updates.
        momentum: b in [0, 1). In the first round, and at 0, the step is the aggregate's own.
        moves: whether a tensor has momentum: what trained, in coordinates that last.
        rate: what v is multiplied with in this round's step; v itself remembers the whole.

    >>> slot = Slot("layer", LORA_B)
    >>> states = [AdapterState({slot: torch.full((1, 1), x)}, scale=1.0) for x in (0.0, 1.0)]
    >>> one = with_momentum(*states, momentum=0.5, moves=lambda slot: True)
    >>> with_momentum(one, one, momentum=0.5, moves=lambda slot: True).tensors[slot].item()
    1.5
    """
    old = before.memory.get(VELOCITY, {})
    velocity: dict[Slot, Tensor] = {}
    for slot in sorted(filter(moves, aggregated.tensors)):
        step = aggregated.tensors[slot].double() - before.tensors[slot].double()
        velocity[slot] = momentum * old[slot] + step if slot in old else step
    moved = {slot: before.tensors[slot].double() + rate * step for slot, step in velocity.items()}
    return aggregated.with_rounded(moved).remembering(VELOCITY, {**old, **velocity})


def turned(before: AdapterState, after: AdapterState) -> AdapterState:
    """Return `after` with the velocity of lora_B in its coordinates; the rows of both lora_A span the same space.

    v' = v A A'^T (A' A'^T)^-1, in float64: then v' A' = v A, as A = A A'^T (A' A'^T)^-1 A' for rows of one space.
    """
    velocity = dict(before.memory.get(VELOCITY, {}))
    old, new = before.factors(), after.factors()
    for slot, v_DR in velocity.items():
        if slot.role == LORA_B and not torch.equal(old[slot.path].lora_A, new[slot.path].lora_A):
            velocity[slot] = v_DR.clone() @ _change_of_rows(old[slot.path], new[slot.path])
    return after.remembering(VELOCITY, velocity) if velocity else after


def _change_of_rows(old: LoraFactors, new: LoraFactors) -> Tensor:
    """Return X (R, R) with X A' = A.

    By the normal equations, which are well conditioned as A' has orthonormal rows. `torch.linalg.lstsq` gives other
    last bits once in a hundred calls on the same numbers (measured): a run that goes on would be another one.
    """
    old_RK, new_RK = old.lora_A.double(), new.lora_A.double()
    found: Tensor = torch.linalg.solve(new_RK @ new_RK.T, new_RK @ old_RK.T).T
    return found.contiguous()


def velocity_of(adapter: AdapterState) -> Mapping[Slot, Tensor]:
    """Return v by slot; empty before the first round, and without momentum."""
    return adapter.memory.get(VELOCITY, {})
