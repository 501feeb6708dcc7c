"""What a client does with a step's gradient after the noise: proximal terms, control variates, preconditioners.

The gradient is noised, and everything else a rule reads was released or is configuration, so a rule is post-processing:
it spends no privacy and is never seen by clipping. One rule serves many clients at once.
Legend: C clients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedlr.adapters.state import Block, Slot

CONTROL = "control"  # what of the server's memory clients are sent


@dataclass(frozen=True)
class LocalPoint:
    """Where the clients of a group stand. (C, ...) has one entry a client, (...) is the same for all."""

    step: int  # of this round, from 0
    num_steps: int
    values: Mapping[Slot, Tensor]  # (C, ...), the trained tensors before the step
    start: Mapping[Slot, Tensor]  # (C, ...), the same at the start of the round
    frozen: Mapping[Slot, Tensor]  # (...), every other tensor of the adapter
    control: Mapping[Slot, Tensor]  # (...), what the server sent as "control"; empty where it sends none
    memory: Mapping[Slot, Tensor] = field(default_factory=dict)  # (C, ...), kept from earlier rounds; zero at first
    ranks: Tensor | None = None  # (C,), beyond which a client's factors are zero; None: all have the adapter's


def factor(point: LocalPoint, slot: Slot) -> Tensor:
    """Return a LoRA factor: (C, ...) where it trains, (...) where it is frozen."""
    return point.values[slot] if slot in point.values else point.frozen[slot]


@dataclass(frozen=True)
class RuleInputs:
    """What a rule reads beside the trained tensors; `memory` (C, ...) is replaced at the end of a round."""

    frozen: Mapping[Slot, Tensor] = field(default_factory=dict)
    control: Mapping[Slot, Tensor] = field(default_factory=dict)
    memory: dict[Slot, Tensor] = field(default_factory=dict)
    ranks: Tensor | None = None

    def at(
        self, step: int, num_steps: int, *, values: Mapping[Slot, Tensor], start: Mapping[Slot, Tensor]
    ) -> LocalPoint:
        """Return where the clients stand before a step."""
        return LocalPoint(step, num_steps, values, start, self.frozen, self.control, self.memory, self.ranks)


class ClientRule:
    """Leaves the gradient alone: the rule of a method that has none, and the base of the others.

    `remembers` says whether `remember` gives something that the client keeps, on its own disk, for its next round;
    `alternates`, whether `active` leaves anything out; `needs_both_factors`, whether it is no more than another
    learning rate where one factor alone trains.
    """

    remembers: bool = False
    alternates: bool = False
    needs_both_factors: bool = False

    @property
    def changes(self) -> bool:
        """Whether there is anything to do after the noise."""
        return type(self) is not ClientRule

    def active(self, step: int, block: Block) -> Block:
        """Return the part of the block that a step trains; the rest keeps its values, unclipped and unnoised."""
        return block

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return what the optimizer gets for a noised gradient, (C, ...) a slot. Neither argument is changed."""
        return gradient

    def remember(self, point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return what the clients keep, (C, ...) a slot, at the end of a round (`point.step` is `num_steps`)."""
        return {}
