"""How far updates lie apart as functions: inner products of what they would add to delta_W, and means of them.

lora_B G and G^-1 lora_A are one function for every invertible G (the gauge freedom of a product), so a distance of
factors says little where both train: it is as large as their sender likes. Here everything is measured on the products,
from R x R matrices, and never as a D x K matrix. What a client adds to a layer is the product of
[lora_B_k - lora_B, lora_B] and [lora_A_k; lora_A_k - lora_A], whose terms are as small as its move.

Where one factor trains, and the other is what was broadcast, it is the trained one up to a metric: ||dB A||^2 is
tr(dB (A A^T) dB^T), so a QR of A^T makes plain distances of it, as it does for lora_A in the metric B^T B.
Legend: D out_features, K in_features, R rank, C clients.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.methods.aggregate.held import stacked
from fedlr.methods.aggregate.rank import best_of_rank, held_rank
from fedlr.methods.aggregate.stacking import RunningProducts


def gram(adapter: AdapterState, held: Sequence[ClientUpdate]) -> Tensor:
    """Return <x_j, x_k> of all pairs of updates, (C, C) float64: x_k is what client k adds to every layer's
    product, without the scale (a Flower strategy does not know it), and to the head, as one vector.

    Guarantees: the same, to rounding, whatever gauge each client chose for factors that it trained both; and for
    every gauge of what was broadcast. The side product is no part of it.

    >>> from fedlr.adapters.state import LORA_A, LORA_B, Slot
    >>> a, b = Slot("layer", LORA_A), Slot("layer", LORA_B)
    >>> adapter = AdapterState({a: torch.tensor([[3.0, 4.0]]), b: torch.zeros(1, 1)}, scale=1.0)
    >>> gram(adapter, [ClientUpdate(k, {b: torch.full((1, 1), float(k))}, 1.0, 0) for k in (1, 2)]).round().tolist()
    [[25.0, 50.0], [50.0, 100.0]]
    """
    trained = held[0].tensors.keys()
    total_CC = torch.zeros(len(held), len(held), dtype=torch.float64)
    of_layers: set[Slot] = set()
    for path, layer in adapter.factors().items():
        slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
        of_layers |= {slot_A, slot_B}
        if slot_A in trained and slot_B in trained:
            products_CC = _of_products(layer, stacked(held, slot_A), stacked(held, slot_B))
        elif slot_B in trained:
            moves = stacked(held, slot_B) - layer.lora_B.double()
            products_CC = _of_vectors(moves @ _root(layer.lora_A.T).T)
        elif slot_A in trained:
            moves = stacked(held, slot_A) - layer.lora_A.double()
            products_CC = _of_vectors(_root(layer.lora_B) @ moves)
        else:
            continue
        total_CC += products_CC
    for slot in sorted(trained - of_layers):
        total_CC += _of_vectors(stacked(held, slot) - adapter.tensors[slot].double())
    return total_CC


def squared_distances(gram_CC: Tensor) -> Tensor:
    """Return ||x_j - x_k||^2 of all pairs, (C, C)."""
    own_C = gram_CC.diagonal()
    return (own_C[:, None] + own_C[None, :] - 2 * gram_CC).clamp_min(0.0).fill_diagonal_(0.0)


def distances_from(gram_CC: Tensor, coefficients_C: Tensor) -> Tensor:
    """Return ||x_k - sum_j c_j x_j|| of every client, (C,)."""
    towards_C = gram_CC @ coefficients_C
    squares_C = gram_CC.diagonal() - 2 * towards_C + coefficients_C @ towards_C
    return squares_C.clamp_min(0.0).sqrt()


def combined(
    adapter: AdapterState, held: Sequence[ClientUpdate], coefficients: Sequence[float], *, stay: float = 0.0
) -> AdapterState:
    """Return the adapter of `sum_k c_k (what client k sent) + stay (what was broadcast)`, divided by the sum of all.

    A layer of which one factor trained, and the head, have the mean of tensors, which is exact. A layer of which both
    trained has the mean of products at its best rank R (as FlexLoRA, `fedlr.methods.aggregate.rank`), so that no
    client's gauge has a say: neither (-lora_B, -lora_A) nor (k lora_B, lora_A / k) differs from an honest update.

    Args:
        adapter: what was broadcast.
        held: updates of one round.
        coefficients: of the clients, not negative.
        stay: of what was broadcast.
    """
    running = RunningProducts(adapter, max_rank=held_rank(adapter))
    for update, coefficient in zip(held, coefficients, strict=True):
        if coefficient > 0:
            running.add(replace(update, weight=coefficient))
    if stay > 0:
        own = {slot: adapter.tensors[slot] for slot in held[0].tensors}
        running.add(ClientUpdate(-1, own, stay, held[0].base_round))
    mean = running.mean()
    if not running.both:
        return mean
    layers, products = mean.factors(), running.products()
    return mean.with_factors({path: best_of_rank(products[path], layers[path]) for path in sorted(running.both)})


def _root(factor: Tensor) -> Tensor:
    """Return the triangle X of a QR with X^T X = factor^T factor, in float64."""
    root: Tensor = torch.linalg.qr(factor.double(), mode="r").R
    return root


def _of_vectors(moves: Tensor) -> Tensor:
    flat = moves.flatten(start_dim=1)
    return flat @ flat.T


def _of_products(layer: LoraFactors, lora_A_CRK: Tensor, lora_B_CDR: Tensor) -> Tensor:
    """Return <P_j, P_k> of P_k = B_k A_k - B A: tr((L_j^T L_k)(R_k R_j^T)) with P_k = L_k R_k, row by row."""
    lora_A, lora_B = layer.lora_A.double(), layer.lora_B.double()
    left = torch.cat([lora_B_CDR - lora_B, lora_B.expand_as(lora_B_CDR)], dim=2)  # (C, D, 2R)
    right = torch.cat([lora_A_CRK, lora_A_CRK - lora_A], dim=1)  # (C, 2R, K)
    rows = [
        ((left[number].T @ left) * (right[number] @ right.transpose(1, 2))).sum(dim=(1, 2))
        for number in range(len(left))
    ]
    found_CC = torch.stack(rows)
    return (found_CC + found_CC.T) / 2
