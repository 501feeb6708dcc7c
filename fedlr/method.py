"""A method is four small choices: the block that trains, the aggregate, what follows it, and what goes down.

A method of configs/method is a `Method` written in YAML. No other file of fedlr asks which method runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedlr.adapter import LORA_A, LORA_B, ROLES, AdapterState, Block, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.refactor import orthonormal_rows, svd_refactor


class BlockSchedule(Protocol):
    """Which block a round trains."""

    def __call__(self, round_index: int, /) -> Block: ...


class Aggregator(Protocol):
    """From the adapter that was broadcast and validated updates to the next adapter.

    The updates come one by one while clients still train, in ascending client order, at least one of them; they can be
    read once. A rule that needs several passes makes a list, and says that its memory grows with the cohort.
    """

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate], /) -> AdapterState: ...


class Finaliser(Protocol):
    """What the server does with an aggregated adapter; also applied once to the adapter before round 0."""

    def __call__(self, adapter: AdapterState, /) -> AdapterState: ...


class Broadcast(Protocol):
    """Which tensors a client is sent before it trains the block."""

    def __call__(self, adapter: AdapterState, block: Block, /) -> Mapping[Slot, Tensor]: ...


@dataclass(frozen=True)
class Method:
    """One federated method. All four choices see released tensors only, so they are post-processing."""

    name: str
    block_schedule: BlockSchedule
    aggregate: Aggregator
    finalise: Finaliser
    broadcast: Broadcast


@dataclass(frozen=True)
class Always:
    """Train the same roles in every round.

    >>> sorted(Always(["lora_B", "head"])(round_index=0))
    ['head', 'lora_B']
    """

    roles: Iterable[str]

    def __post_init__(self) -> None:
        # A string would be read as its letters; a one-shot iterable would be empty from round 1 on.
        roles = self.roles if isinstance(self.roles, str) else frozenset(self.roles)
        if isinstance(roles, str) or not roles or not roles <= set(ROLES):
            raise InputError(f"Expected roles to be a list of {', '.join(ROLES)}, got {self.roles!r}")
        object.__setattr__(self, "roles", roles)

    def __call__(self, round_index: int) -> Block:
        """Return the roles, whatever the round."""
        return frozenset(self.roles)


def keep(adapter: AdapterState) -> AdapterState:
    """Return the adapter as it is."""
    return adapter


@dataclass(frozen=True)
class SvdRefactor:
    """Re-factorise every layer by its SVD (FedSVD, Lee et al. 2025, sec. 3,
    https://arxiv.org/abs/2505.12805).

    Guarantees: delta_W, the scale and the head are kept; a layer whose lora_B is zero is untouched.
    """

    def __call__(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter with U S and V^T as every layer's factors."""
        return adapter.with_factors({path: svd_refactor(layer) for path, layer in adapter.factors().items()})


@dataclass(frozen=True)
class OrthonormalRows:
    """Give every lora_A orthonormal rows, once: from then on a no-op as long as lora_A does not train."""

    def __call__(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter with orthonormal rows in every lora_A and the same delta_W."""
        new = {path: orthonormal_rows(layer) for path, layer in adapter.factors().items()}
        return adapter.with_factors(new)


def full_adapter(adapter: AdapterState, block: Block) -> dict[Slot, Tensor]:
    """Send both factors of every layer, and the head if it trains: any client can start from it.

    A frozen head is not sent, as the frozen base model is not: every client builds it from the same seed.
    """
    return adapter.select(block | {LORA_A, LORA_B})


def trained_block(adapter: AdapterState, block: Block) -> dict[Slot, Tensor]:
    """Send the trained tensors only: every client must hold the others, bit for bit, from the start."""
    return adapter.select(block)
