"""How far an update may move beside the others of its round: a bound that no single client sets.

One client of ten that sends finite values of 1e6, or (k lora_B, lora_A / k), multiplies an average of factors by orders
of magnitude; so does (-lora_B, -lora_A) where lora_A hardly trains, although its product is an honest one. What all
three have in common is a role that moves many times as far as it does at other clients.

An update's *move* in one role is the root mean square of (sent - broadcast) over all values of that role, which does
not grow with a client's rank. The median of the first `NUM_REFERENCES` clients, in ascending order, is the measure:
bounded memory, no schedule of the pool matters, and a minority of them cannot shift it beyond honest moves (Yin et al.
2018, Byzantine-robust distributed learning, sec. 4, use the median for this). It sees released tensors only, so it
costs no epsilon. It stops crude harm and no more: an attack within the bound passes, and in a round of one or two
updates there is no majority to ask.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice

from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.errors.ranges import MAX_UPDATE_RATIO as MAX_UPDATE_RATIO

NUM_REFERENCES = 16  # updates that a round holds at once to know what is usual
LEAST_REFERENCES = 3  # of two, neither is the majority

Moves = Mapping[str, float]  # by role


def moves(tensors: Mapping[Slot, Tensor], sent_down: Mapping[Slot, Tensor]) -> Moves:
    """Return how far an update moved in each role: root mean square, in float64.

    >>> import torch
    >>> from fedlr.adapters.state import LORA_B
    >>> slot = Slot("layer", LORA_B)
    >>> moves({slot: torch.full((4, 2), 3.0)}, {slot: torch.ones(4, 2)})
    {'lora_B': 2.0}
    """
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for slot, tensor in tensors.items():
        difference = tensor.double() - sent_down[slot].double()
        squares[slot.role] = squares.get(slot.role, 0.0) + float(difference.square().sum())
        counts[slot.role] = counts.get(slot.role, 0) + tensor.numel()
    return {role: math.sqrt(squares[role] / counts[role]) if counts[role] else 0.0 for role in squares}


def is_too_far(own: Moves, usual: Moves, *, max_ratio: float) -> bool:
    """Return whether a role moved more than `max_ratio` times as far as is usual; where nothing is usual, none did."""
    return any(move > max_ratio * usual[role] for role, move in own.items() if usual.get(role, 0.0) > 0.0)


def near_the_others(
    updates: Iterable[tuple[ClientUpdate, Moves]],
    *,
    max_ratio: float | None,
    reject: Callable[[ClientUpdate], None],
) -> Iterator[ClientUpdate]:
    """Yield the updates that moved about as far as the first ones did, in their order; hand the others to `reject`.

    Args:
        updates: with their moves, in ascending order of their clients.
        max_ratio: times the median move; None lets everything pass, and holds nothing.
        reject: is told of each update that is left out.
    """
    rest = iter(updates)
    first = [] if max_ratio is None else list(islice(rest, NUM_REFERENCES))
    usual = _median([own for _, own in first])
    first.reverse()  # taken off its end, so that none is held longer than its turn
    for update, own in chain(_taken_off(first), rest):
        if max_ratio is not None and is_too_far(own, usual, max_ratio=max_ratio):
            reject(update)
        else:
            yield update


def _taken_off(held: list[tuple[ClientUpdate, Moves]]) -> Iterator[tuple[ClientUpdate, Moves]]:
    while held:
        yield held.pop()


def _median(references: list[Moves]) -> Moves:
    """Return the median move in each role; nothing where too few moved to tell."""
    if len(references) < LEAST_REFERENCES:
        return {}
    return {role: statistics.median(own[role] for own in references) for role in references[0]}
