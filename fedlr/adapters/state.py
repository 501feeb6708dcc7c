"""The adapter as tensors by name: what a server aggregates, a client sends and a file holds. No model is needed.

delta_W of a layer is `scale * lora_B @ lora_A` (Hu et al. 2021, sec. 4.1).
Legend: D out_features, K in_features, R rank.

A tensor is addressed by a `Slot(path, role)`, never by a substring of its name. A round trains one *block*: a set of
roles, or of single slots where layers differ. Everything else of the model is frozen.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

LORA_A, LORA_B, HEAD = "lora_A", "lora_B", "head"
SIDE_A, SIDE_B = "side_A", "side_B"
ROLES = (LORA_A, LORA_B, HEAD)
SHIPPED = "shipped"  # of frozen parts that clients are given once; no block trains it
# Of a message. No adapter that works comes near it, and products of two such values are far from float32's end: one
# client's finite numbers cannot make the server's arithmetic overflow.
LARGEST_VALUE = 1e6


class Slot(NamedTuple):
    """Address of one adapter tensor: the path of its layer (for a head, of its parameter) and its role."""

    path: str
    role: str


Block = frozenset[str | Slot]


def in_block(slot: Slot, block: Block) -> bool:
    """Return whether a block trains a tensor: by its role, or by itself.

    >>> in_block(Slot("a", LORA_B), frozenset({LORA_B})), in_block(Slot("a", LORA_B), frozenset({Slot("b", LORA_B)}))
    (True, False)
    """
    return slot.role in block or slot in block


def roles_of(block: Block) -> frozenset[str]:
    """Return the roles that a block trains, in some layer or in all."""
    return frozenset(entry.role if isinstance(entry, Slot) else entry for entry in block)


def with_head(block: Block, train_head: bool) -> Block:
    """Return a block with the head in it, where that trains beside what a method trains.

    >>> sorted(with_head(frozenset({LORA_B}), True))
    ['head', 'lora_B']
    """
    return block | {HEAD} if train_head else block


@dataclass(frozen=True)
class LoraFactors:
    """One layer's low-rank update, delta_W = scale * lora_B @ lora_A (Hu et al. 2021, sec. 4.1)."""

    lora_A: Tensor  # (R, K)
    lora_B: Tensor  # (D, R)


@dataclass(frozen=True)
class AdapterState:
    """All tensors of one adapter, detached and on the CPU, with the scale its layers share.

    A layer computes W + scale * (side.lora_B @ side.lora_A + lora_B @ lora_A). The *side* product is frozen: what a
    server folded away (`models.base_delta` merges it into W). `memory` holds what the server alone remembers, by name:
    momentum, scores; clients are sent no more of it than "control" (`fedlr.rounds.round.RoundRequest`).
    """

    tensors: Mapping[Slot, Tensor]
    scale: float
    side: Mapping[str, LoraFactors] = field(default_factory=dict)  # by layer, of any rank; absent where there is none
    memory: Mapping[str, Mapping[Slot, Tensor]] = field(default_factory=dict)

    def factors(self) -> dict[str, LoraFactors]:
        """Return the factors of every layer, sorted by path."""
        paths = sorted({slot.path for slot in self.tensors if slot.role == LORA_A})
        return {p: LoraFactors(self.tensors[Slot(p, LORA_A)], self.tensors[Slot(p, LORA_B)]) for p in paths}

    def products(self) -> dict[str, LoraFactors]:
        """Return factors of the whole product of every layer of LoRA, the side included: R rows of lora_A, then its."""
        layers = self.factors()
        for path, side in ((path, side) for path, side in self.side.items() if path in layers):
            lora_A, lora_B = layers[path].lora_A, layers[path].lora_B
            layers[path] = LoraFactors(torch.cat([lora_A, side.lora_A]), torch.cat([lora_B, side.lora_B], dim=1))
        return layers

    def with_factors(self, factors: Mapping[str, LoraFactors]) -> "AdapterState":
        """Return a copy in which the given layers have new factors, perhaps of another rank."""
        new: dict[Slot, Tensor] = {}
        for path, layer in factors.items():
            new[Slot(path, LORA_A)], new[Slot(path, LORA_B)] = layer.lora_A, layer.lora_B
        return self.overlaid(new)

    def with_tensors(self, tensors: Mapping[Slot, Tensor]) -> "AdapterState":
        """Return a copy in which the given slots, all of them known, hold new tensors of the same shape."""
        for slot, tensor in tensors.items():
            if slot not in self.tensors or self.tensors[slot].shape != tensor.shape:
                raise ValueError(f"Expected a tensor that the adapter has, got {slot} of shape {tuple(tensor.shape)}")
        return replace(self, tensors={**self.tensors, **tensors})

    def overlaid(self, tensors: Mapping[Slot, Tensor]) -> "AdapterState":
        """Return a copy as `with_tensors`, where a layer of which both factors are given may have another rank."""
        ranks = given_ranks(tensors)
        other = {s: of_rank(t, s, ranks[s.path]) for s, t in self.tensors.items() if s.path in ranks}
        return replace(self, tensors={**self.tensors, **other}).with_tensors(tensors)

    def ranks(self) -> dict[str, int]:
        """Return the rank of every layer, by path."""
        return {path: len(layer.lora_A) for path, layer in self.factors().items()}

    def with_rounded(self, values: Mapping[Slot, Tensor]) -> "AdapterState":
        """Return a copy as `with_tensors`, whose new tensors are the values rounded to the dtypes of the old ones."""
        return self.with_tensors({slot: value.to(self.tensors[slot].dtype) for slot, value in values.items()})

    def select(self, block: Block) -> dict[Slot, Tensor]:
        """Return the tensors that `block` trains, sorted by slot."""
        return {slot: self.tensors[slot] for slot in sorted(self.tensors) if in_block(slot, block)}

    def remembering(self, name: str, tensors: Mapping[Slot, Tensor]) -> "AdapterState":
        """Return a copy whose memory of that name holds these tensors."""
        return replace(self, memory={**self.memory, name: tensors})

    def fingerprint(self) -> str:
        """Return the SHA-256 of every slot, shape and value, the side's too, in hexadecimal; memory is no part of it.

        >>> AdapterState({Slot("layer", LORA_A): torch.ones(1, 2)}, scale=1.0).fingerprint()[:8]
        '7e317337'
        """
        digest = hashlib.sha256(repr(self.scale).encode())
        tensors = {**self.tensors, **side_tensors(self.side)}
        for slot, tensor in sorted(tensors.items(), key=lambda item: item[0]):
            digest.update(repr((slot.path, slot.role, str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def given_ranks(tensors: Mapping[Slot, Tensor]) -> dict[str, int]:
    """Return the rank of every layer of which both factors are there and agree, by path."""
    found: dict[str, int] = {}
    for slot, lora_A in tensors.items():
        lora_B = tensors.get(Slot(slot.path, LORA_B)) if slot.role == LORA_A else None
        if lora_B is not None and lora_A.ndim == lora_B.ndim == 2 and len(lora_A) == lora_B.shape[1] > 0:
            found[slot.path] = len(lora_A)
    return found


def of_rank(factor: Tensor, slot: Slot, rank: int) -> Tensor:
    """Return a factor of the same layer, of any values, that has this rank: (rank, K) or (D, rank)."""
    return factor.new_empty((rank, factor.shape[1]) if slot.role == LORA_A else (len(factor), rank))


def side_tensors(side: Mapping[str, LoraFactors]) -> dict[Slot, Tensor]:
    """Return the factors of a side product by slot, the roles named side_A and side_B."""
    named = ((path, ((SIDE_A, layer.lora_A), (SIDE_B, layer.lora_B))) for path, layer in sorted(side.items()))
    return {Slot(path, role): factor for path, factors in named for role, factor in factors}


@dataclass(frozen=True)
class ClientUpdate:
    """What one client returns from one round: the trained block less what is personal, as values, not as a difference.

    `weight` is set by the server's rule, never by the client's word (uniform unless sizes are declared public), and so
    is `rank`, that of a client whose factors are zero beyond it (None: the adapter's).
    """

    client_id: int
    tensors: Mapping[Slot, Tensor]
    weight: float
    base_round: int
    rank: int | None = None


def num_values(tensors: Iterable[Tensor]) -> int:
    """Return how many numbers the tensors hold together."""
    return sum(math.prod(t.shape) for t in tensors)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the numbers themselves: what a message carries, without layout and transport."""
    return sum(t.numel() * t.element_size() for t in tensors)
