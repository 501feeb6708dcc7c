"""Where a few clients stand, at random: two layers and a head, some tensors trained and the others frozen."""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint

C, R = 3, 2
SHAPES = {
    Slot("layer.0", LORA_A): (R, 9),
    Slot("layer.0", LORA_B): (7, R),
    Slot("layer.1", LORA_A): (R, 6),
    Slot("layer.1", LORA_B): (8, R),
    Slot("head.weight", HEAD): (2, 8),
}
ROLES = (LORA_A, LORA_B, HEAD)


def draw(*roles: str, num_clients: int | None = C, seed: int = 0) -> dict[Slot, Tensor]:
    """Return (C, ...) a slot of these roles; (...) without a number of clients."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if num_clients is None else (num_clients,)
    shapes = {slot: (*lead, *shape) for slot, shape in SHAPES.items() if slot.role in roles}
    return {slot: torch.randn(shape, generator=generator, dtype=torch.float64) for slot, shape in shapes.items()}


def point_of(*trained: str, control: bool = False, step: int = 1, num_steps: int = 4, seed: int = 1) -> LocalPoint:
    """Return a point at which these roles train and the others are frozen."""
    frozen = [role for role in ROLES if role not in trained]
    return LocalPoint(
        step=step,
        num_steps=num_steps,
        values=draw(*trained, seed=seed),
        start=draw(*trained, seed=seed + 1),
        frozen=draw(*frozen, num_clients=None, seed=seed + 2),
        control=draw(*trained, num_clients=None, seed=seed + 3) if control else {},
        memory=draw(*trained, seed=seed + 4) if control else {},
    )


def of_client(stack: Mapping[Slot, Tensor], client: int) -> dict[Slot, Tensor]:
    return {slot: tensor[client] for slot, tensor in stack.items()}


def alone(point: LocalPoint, client: int) -> LocalPoint:
    """One client of a point, as a group of its own."""
    stacks = {name: {s: t[client : client + 1] for s, t in getattr(point, name).items()} for name in STACKED}
    return replace(point, **stacks)


STACKED = ("values", "start", "memory")


def copies(stack: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    return {slot: tensor.clone() for slot, tensor in stack.items()}


def same(left: Mapping[Slot, Tensor], right: Mapping[Slot, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[slot], right[slot]) for slot in left)


def close(left: Mapping[Slot, Tensor], right: Mapping[Slot, Tensor], atol: float = 1e-12) -> bool:
    return left.keys() == right.keys() and all(
        left[slot].shape == right[slot].shape and torch.allclose(left[slot], right[slot], rtol=0, atol=atol)
        for slot in left
    )


def changes_nothing_it_is_given(rule: ClientRule, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> bool:
    """Call a rule and look whether its arguments hold what they held."""
    names = [field.name for field in fields(point) if isinstance(getattr(point, field.name), Mapping)]
    before = {name: copies(getattr(point, name)) for name in names}
    gradient_before = copies(gradient)
    returned = rule(gradient, point)
    rule.remember(point)
    assert returned.keys() == gradient.keys()
    return same(gradient, gradient_before) and all(same(getattr(point, name), before[name]) for name in names)


def serves_clients_apart(rule: ClientRule, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> bool:
    """Whether each client of a group gets what it would get alone: no client's numbers reach another's."""
    together, kept = rule(gradient, point), rule.remember(point)
    for client in range(C):
        own = alone(point, client)
        single = rule({slot: tensor[client : client + 1] for slot, tensor in gradient.items()}, own)
        if not close(of_client(together, client), of_client(single, 0)):
            return False
        if not close(of_client(kept, client), of_client(rule.remember(own), 0)):
            return False
    return True
