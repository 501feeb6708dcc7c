"""Several rules as one: the trainer's, then the method's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlr.adapters.state import Block, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint


@dataclass(frozen=True)
class Chain(ClientRule):
    """Apply rules one after the other, each to what the one before it returned.

    A rule that remembers comes last, so that what it accounts for is what the optimizer gets: SCAFFOLD's c_k is then
    the mean of what the rules before it made of the noised gradients.

    Guarantees: a tensor that rests in a step gets a gradient of zero, whatever the rules add to it.

    Raises: InputError for rules that cannot be combined: one that remembers before another, or beside an alternation,
        under which its tensors take fewer steps than it counts.
    """

    rules: Sequence[ClientRule]
    remembers: bool = field(init=False, default=False)
    alternates: bool = field(init=False, default=False)
    needs_both_factors: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        rules = tuple(self.rules)
        names = " and ".join(type(rule).__name__ for rule in rules)
        if any(rule.remembers for rule in rules[:-1]):
            raise InputError(f"Expected only the method's rule to remember something, got {names}; drop the trainer's")
        remembers, alternates = any(r.remembers for r in rules), any(r.alternates for r in rules)
        if remembers and alternates:
            raise InputError(f"Expected rules that count the same steps, got {names}; drop the one that alternates")
        found = {"rules": rules, "remembers": remembers, "alternates": alternates}
        for name, value in (found | {"needs_both_factors": any(r.needs_both_factors for r in rules)}).items():
            object.__setattr__(self, name, value)

    def active(self, step: int, block: Block) -> Block:
        """Return what every rule lets train."""
        for rule in self.rules:
            block = rule.active(step, block)
        return block

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return what the rules make of the gradient in turn, (C, ...) a slot."""
        changed = gradient
        for rule in self.rules:
            changed = rule(changed, point)
        if not self.alternates:
            return changed
        active = self.active(point.step, frozenset(point.values))
        return {slot: v if in_block(slot, active) else torch.zeros_like(v) for slot, v in changed.items()}

    def remember(self, point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return what the last rule keeps."""
        return self.rules[-1].remember(point) if self.rules else {}
