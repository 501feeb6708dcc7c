"""Which blocks of a tuner a round trains, so that the mean of what clients send is the mean of their layers.

A schedule is given the name of the system (by its YAML file), so all that it may refuse is known
before a model is loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedlr.adapters.state import HEAD, SHIPPED, AdapterState, Block, Slot
from fedlr.errors import InputError
from fedlr.models.tuners.entry import Tuner
from fedlr.models.tuners.registry import TUNERS, tuner

LORA = "lora"


def role_of(system: str, block: str) -> str:
    """Return the role of a block's tensors in an adapter: LoRA's own are `lora_A` and `lora_B`.

    Other systems have tensors of these names too, for which LoRA's formulas are wrong, so theirs carry the system.

    >>> role_of("lora", "lora_A"), role_of("dora", "lora_A")
    ('lora_A', 'dora.lora_A')
    """
    return block if system == LORA else f"{system}.{block}"


def entry_of(system: str) -> Tuner:
    """Return the registry's entry, the error naming the key."""
    try:
        return tuner(system)
    except InputError as error:
        raise InputError(f"{error} (adapter.system)") from error


@dataclass(frozen=True)
class ExactBlocks:
    """Train the same blocks in every round: those of which the mean is exact.

    Of a linear system all; of a multilinear one a single block, the first that the registry declares (the one that has
    a gradient at the start); of a nonlinear one a single block that is exact alone, where it has one.

    Args:
        system: a name of the registry.
        block: another single block; None: as above.
        allow_biased: train all blocks, or a `block` that is not exact: the mean of clients is then biased.

    Raises:
        InputError: for what would be biased and is not allowed to be, with the reason.

    >>> sorted(ExactBlocks("loha").roles), sorted(ExactBlocks("loha", allow_biased=True).roles)[:2]
    (['loha.w2_b'], ['loha.w1_a', 'loha.w1_b'])
    """

    system: str
    block: str | None = None
    allow_biased: bool = False
    roles: Iterable[str] = field(init=False)

    def __post_init__(self) -> None:
        entry = entry_of(self.system)
        object.__setattr__(self, "roles", frozenset(role_of(self.system, block) for block in self._blocks(entry)))

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return the blocks, whatever the round."""
        return frozenset(self.roles)

    def _blocks(self, entry: Tuner) -> list[str]:
        exact = exact_in_order(entry)
        if self.block is not None:
            if self.block not in entry.blocks:
                raise InputError(f"Expected block to be one of {', '.join(entry.blocks)}, got {self.block!r}")
            if self.block not in exact and not self.allow_biased:
                raise InputError(
                    f"Expected block to be one of which the mean is exact, got {self.block!r}: {why(entry)}"
                )
            return [self.block]
        if self.allow_biased or entry.form == "linear":
            return list(entry.blocks)
        if not exact:
            raise InputError(f"Expected allow_biased=true for adapter.system={self.system}, got false: {why(entry)}")
        return exact[:1]


@dataclass(frozen=True)
class RotatingBlocks:
    """Train one exact block a round, in turn, in the registry's order: the others have no gradient before the first
    has moved.

    Raises:
        InputError: if the system has not two blocks that are exact alone.

    >>> RotatingBlocks("vera").roles
    ('vera.lambda_b', 'vera.lambda_d')
    """

    system: str
    roles: Iterable[str] = field(init=False)

    def __post_init__(self) -> None:
        entry = entry_of(self.system)
        exact = exact_in_order(entry)
        if len(exact) < 2:
            raise InputError(
                f"Expected a system with two exact blocks or more to rotate, got {entry.title} with "
                f"{', '.join(exact) or 'none'}; set method=fedavg"
            )
        object.__setattr__(self, "roles", tuple(role_of(self.system, block) for block in exact))

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return the round's block."""
        roles = tuple(self.roles)
        return frozenset({roles[round_index % len(roles)]})


@dataclass(frozen=True)
class AllBlocks:
    """Train every block of a system whose layers the server averages; of LoRA both factors.

    Raises:
        InputError: if the server cannot average its layers, with what to use instead.

    >>> sorted(AllBlocks("dora").roles)
    ['dora.lora_A', 'dora.lora_B', 'dora.magnitude']
    """

    system: str
    roles: Iterable[str] = field(init=False)

    def __post_init__(self) -> None:
        entry = entry_of(self.system)
        if self.system != LORA and entry.layer_mean is None:
            instead = "method=fedavg" if entry.exact_alone() else "method=fedavg with allow_biased=true"
            served = ", ".join(sorted(name for name, one in TUNERS.items() if one.layer_mean))
            raise InputError(
                f"Expected adapter.system to be one whose layers a server can average ({LORA}, {served}), got "
                f"{self.system}, which is {entry.form}; set {instead}"
            )
        object.__setattr__(self, "roles", frozenset(role_of(self.system, block) for block in entry.blocks))

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return the blocks, whatever the round."""
        return frozenset(self.roles)


def all_blocks(adapter: AdapterState, block: Block) -> dict[Slot, Tensor]:
    """Send every block of the system, and the head if it trains: a client that missed a round has an old one.

    A frozen head is not sent, and parts that were shipped are not sent again.
    """
    others = {slot.role for slot in adapter.tensors} - {HEAD, SHIPPED}
    return adapter.select(block | others)


def exact_in_order(entry: Tuner) -> list[str]:
    """Return the blocks that are exact alone, in the registry's order."""
    return [block for block in entry.blocks if block in entry.exact_alone()]


def why(entry: Tuner) -> str:
    """Say why a mean is biased, and what is exact instead."""
    exact = ", ".join(exact_in_order(entry))
    instead = f"exact alone: {exact}" if exact else "no block is exact alone"
    return f"{entry.title} is {entry.form}, so the layer of the mean tensors is not the mean of the layers ({instead})"
