"""How far an update may move beside the others of its round: a bound that no single client sets.

One client of ten that sends finite values of 1e6, or (k lora_B, lora_A / k), multiplies an average of factors by orders
of magnitude; so does (-lora_B, -lora_A) where lora_A hardly trains, although its product is an honest one. What all
three have in common is a role that moves many times as far as it does at other clients.

An update's *move* in one role is the root mean square of (sent - broadcast) over all values of that role, which does
not grow with a client's rank. Its move in delta_W is the norm of what it adds to the products of all layers: factors
that each move a little too far multiply there, and a direction in which the other factor is large counts as what it is.
Neither bound is the other: (-lora_B, -lora_A) adds what an honest update adds, or nothing.

The median of the first `NUM_REFERENCES` clients, in ascending order, is the measure: bounded memory, no schedule of the
pool matters, and a minority of them cannot shift it beyond honest moves (Yin et al. 2018, Byzantine-robust distributed
learning, sec. 4, use the median for this). It sees released tensors only, so it costs no epsilon. It stops crude harm,
and no more: an attack within the bound passes, and in a round of one or two updates there is no majority to ask.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice

import torch
from torch import Tensor

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.errors.ranges import MAX_UPDATE_RATIO as MAX_UPDATE_RATIO

NUM_REFERENCES = 16  # updates that a round holds at once to know what is usual
LEAST_REFERENCES = 3  # of two, neither is the majority

PRODUCT = "delta_W"  # beside the roles

Moves = Mapping[str, float]  # by role, and of the product


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


def product_moves(
    tensors: Mapping[Slot, Tensor], adapter: AdapterState, *, rank: int | None = None
) -> dict[str, float]:
    """Return how far an update moved in delta_W: the norm of all layers' changes of product, in float64, unscaled.

    B_k A_k - B A is [B_k - B, B] times [A_k; A_k - A], whose norm needs two matrices of 2 R x 2 R; of a factor that did
    not train the broadcast one stands in. The result is the same for (B_k G, G^-1 A_k).

    Args:
        tensors: of the update, as it was sent.
        adapter: what was broadcast, of full rank.
        rank: of the client; None: the adapter's.

    Returns:
        `PRODUCT` and the norm; nothing where no layer of LoRA trained.

    >>> import torch
    >>> a, b = Slot("layer", LORA_A), Slot("layer", LORA_B)
    >>> adapter = AdapterState({a: torch.tensor([[3.0, 4.0]]), b: torch.zeros(1, 1)}, scale=1.0)
    >>> product_moves({b: torch.full((1, 1), 2.0)}, adapter)
    {'delta_W': 10.0}
    """
    paths = sorted({slot.path for slot in tensors if slot.role in (LORA_A, LORA_B)})
    square, is_any = 0.0, False
    for path in paths:
        slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
        own = narrowed({slot: adapter.tensors[slot] for slot in (slot_A, slot_B) if slot in adapter.tensors}, rank)
        if len(own) == 2 and all(factor.ndim == 2 for factor in own.values()):
            sent_A, sent_B = tensors.get(slot_A), tensors.get(slot_B)
            square += _product_square(own[slot_A], own[slot_B], sent_A, sent_B)
            is_any = True
    return {PRODUCT: math.sqrt(max(square, 0.0))} if is_any else {}


def _product_square(lora_A: Tensor, lora_B: Tensor, sent_A: Tensor | None, sent_B: Tensor | None) -> float:
    left, right = [], []
    new_A = lora_A.double() if sent_A is None else sent_A.double()
    if sent_B is not None:
        left.append(sent_B.double() - lora_B.double())
        right.append(new_A)
    if sent_A is not None:
        left.append(lora_B.double())
        right.append(new_A - lora_A.double())
    columns, rows = torch.cat(left, dim=1), torch.cat(right)
    return float(((columns.T @ columns) * (rows @ rows.T)).sum())


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
