"""A method is four small choices: the block that trains, the aggregate, what follows it, and what goes down. Some have
a fifth: a rule of the clients, roles that stay with them, or a side product that the server folds away.

A method of configs/method is a `Method` written in YAML. No other file of fedlr asks which method runs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fedlr.adapters.factors import orthonormal_rows, svd_refactor
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, ROLES, AdapterState, Block, ClientUpdate, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.momentum import turned, with_momentum
from fedlr.methods.aggregate.server_optimizer import FedAdam, FedAvgM, FedYogi
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.rate_schedule import RateSchedule

SERVER_OPTIMIZERS = (FedAvgM, FedAdam, FedYogi)


class BlockSchedule(Protocol):
    """Which block a round trains. It may look at the adapter, which is released, and trains `roles` at most."""

    @property
    def roles(self) -> Iterable[str]:
        """All roles that any round may train."""
        ...

    def __call__(self, round_index: int, adapter: AdapterState, /) -> Block: ...


class Aggregator(Protocol):
    """From the adapter that was broadcast and validated updates to the next adapter.

    The updates come one by one while clients still train, in ascending client order, at least one of them; they can be
    read once. A rule that needs several passes makes a list, and says that its memory grows with the cohort.
    """

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate], /) -> AdapterState: ...


class BoundAggregator(Aggregator, Protocol):
    """An aggregator of one model, of which it depends whether it folds into the adapter's side."""

    @property
    def folds(self) -> bool:
        """See `Method.folds`."""
        ...


@runtime_checkable
class ReadsModel(Protocol):
    """An aggregator that needs frozen weights besides: it is bound to the model once, before anything is merged."""

    def bound(self, model: nn.Module) -> BoundAggregator:
        """Return the aggregator of this model."""
        ...


class Finaliser(Protocol):
    """What the server does with an aggregated adapter; also applied once to the adapter before round 0."""

    def __call__(self, adapter: AdapterState, /) -> AdapterState: ...


class Broadcast(Protocol):
    """Which tensors a client is sent before it trains the block."""

    def __call__(self, adapter: AdapterState, block: Block, /) -> Mapping[Slot, Tensor]: ...


@dataclass(frozen=True)
class Method:
    """One federated method. All of its choices see released tensors only, so they are post-processing.

    Args:
        personal: roles that train and are not sent: a client keeps them for its next round.
        folds: whether the server folds products into the adapter's side, which clients merge into their base.
        mixed_ranks: whether clients may have ranks of their own (adapter.client_ranks).
        dynamic_ranks: whether the server changes the rank of a layer from round to round, for all clients.
        client: what clients do with a noised gradient.
        server_momentum: of the server's step, in [0, 1); a key of the experiment (`fedlr.methods.aggregate.momentum`).
        server_rates: what the step of a server with a momentum or an optimizer is multiplied with, by round.
        server_rate: the factor of one round (`at`), of a step with momentum.
    """

    name: str
    block_schedule: BlockSchedule
    aggregate: Aggregator
    finalise: Finaliser
    broadcast: Broadcast
    personal: Sequence[str] = ()
    folds: bool = False
    mixed_ranks: bool = False
    dynamic_ranks: bool = False
    client: ClientRule = ClientRule()
    server_momentum: float = 0.0
    server_rates: RateSchedule = RateSchedule()
    server_rate: float = 1.0

    def at(self, round_index: int) -> "Method":
        """Return the method as it is in a round: the rate of its server's step follows the schedule."""
        factor = self.server_rates.factor(round_index)
        if factor == 1.0:
            return self
        own = self.aggregate
        if isinstance(own, SERVER_OPTIMIZERS):
            return replace(self, aggregate=replace(own, lr=own.lr * factor))
        return replace(self, server_rate=factor)

    @property
    def server_step(self) -> tuple[float, float]:
        """Momentum and rate of a server optimizer that is linear in the mean: its own, or none (0, 1)."""
        own = self.aggregate
        return (own.momentum, own.lr) if isinstance(own, FedAvgM) else (self.server_momentum, 1.0)

    @property
    def momentum_roles(self) -> frozenset[str]:
        """The roles whose coordinates last from round to round, so that a momentum in them means something: the head;
        lora_B where lora_A never trains; all that trains where the aggregate is in the factors and the finaliser keeps
        them."""
        roles = frozenset(self.block_schedule.roles) - set(self.personal)
        lasts = self.aggregate is weighted_mean or getattr(self.aggregate, "keeps_coordinates", False)
        if not {LORA_A, LORA_B} <= roles:
            lasts = lasts or getattr(self.aggregate, "keeps_coordinates_of_one", False)
        if not lasts or self.dynamic_ranks:
            return frozenset({HEAD})
        if self.finalise is keep:
            return roles | {HEAD}
        turns = isinstance(self.finalise, SvdRefactor | OrthonormalRows) and LORA_A not in self.block_schedule.roles
        return frozenset({LORA_B, HEAD}) if turns else frozenset({HEAD})

    def finish(self, before: AdapterState, aggregated: AdapterState, block: Block) -> AdapterState:
        """Return the next adapter from the aggregate of the updates to a block: the server's momentum, if it has any,
        then the finaliser."""
        if not self.server_momentum:
            return self.finalise(aggregated)
        roles = self.momentum_roles
        moved = with_momentum(
            before,
            aggregated,
            momentum=self.server_momentum,
            rate=self.server_rate,
            moves=lambda slot: slot.role in roles and in_block(slot, block),
        )
        return turned(moved, self.finalise(moved))

    @property
    def prunes(self) -> bool:
        """Whether the server may lower the rank of a client (`fedlr.methods.aggregate.pruning`)."""
        return bool(getattr(self.aggregate, "prunes", False))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w .+-]{0,99}", self.name):
            raise InputError(
                f"Expected method.name to be at most 100 letters, digits, '_', '-' and '.', got {self.name!r}"
            )
        roles = set(self.block_schedule.roles)
        if isinstance(self.personal, str) or not set(self.personal) < roles:
            raise InputError(
                f"Expected method.personal to be some of the trained roles ({', '.join(sorted(roles))}), not all, got "
                f"{self.personal!r}"
            )
        if not isinstance(self.client, ClientRule):
            raise InputError(f"Expected method.client to be a ClientRule, got {type(self.client).__name__}")
        if self.dynamic_ranks:
            self._check_dynamic_ranks()
        if self.server_momentum:
            self._check_momentum()
        if not (self.server_rates.is_constant or self.server_momentum or isinstance(self.aggregate, SERVER_OPTIMIZERS)):
            raise InputError(
                f"Expected server_lr_schedule=constant and server_warmup_rounds=0 for method={self.name}, whose server "
                "takes what its clients sent without a step of its own, got a schedule; set trainer.lr_schedule, which "
                "is the clients' rate, or server_momentum"
            )

    @property
    def least_updates(self) -> int:
        """How many usable updates a round needs (`fedlr.methods.aggregate.held`): 1, or what a robust rule says."""
        return int(getattr(self.aggregate, "least_updates", 1))

    def of_one_client(self) -> "Method":
        """Return the method for a client that trains alone, where a rule that compares clients has nobody to compare:
        the mean of one."""
        return replace(self, aggregate=weighted_mean) if self.least_updates > 1 else self

    def check_finalised(self, before: AdapterState, after: AdapterState) -> None:
        """Refuse what a round did to an adapter that the method does not declare."""
        if after.side is not before.side and not self.folds:
            raise InputError(f"Expected method.folds=true for method={self.name}, which folds into the base, got false")
        if not self.dynamic_ranks and after.ranks() != before.ranks():
            raise InputError(
                f"Expected method.dynamic_ranks=true for method={self.name}, which changes a layer's rank, got false"
            )

    def _check_dynamic_ranks(self) -> None:
        why = f"with method.dynamic_ranks, got another for method={self.name}"
        if self.broadcast is not full_adapter:
            raise InputError(f"Expected method.broadcast=full_adapter {why}: both factors change")
        if self.personal or self.client.remembers:
            raise InputError(f"Expected clients that keep nothing {why}: what they keep has the rank of its round")
        if self.mixed_ranks:
            raise InputError(f"Expected method.mixed_ranks=false {why}: a layer has one rank for all clients")

    def _check_momentum(self) -> None:
        if isinstance(self.aggregate, SERVER_OPTIMIZERS):
            raise InputError(
                f"Expected server_momentum=0 for method={self.name}, whose server has an optimizer of its own, got "
                f"{self.server_momentum:g}; set that one's in method.aggregate"
            )
        if self.folds:
            raise InputError(
                f"Expected server_momentum=0 for method={self.name}, which folds what it learns into the base, got "
                f"{self.server_momentum:g}: nothing is left whose momentum it would be"
            )

    def bound(self, model: nn.Module) -> "Method":
        """Return the method with an aggregator that has what it reads of the model."""
        if not isinstance(self.aggregate, ReadsModel):
            return self
        aggregate = self.aggregate.bound(model)
        return replace(self, aggregate=aggregate, folds=self.folds or aggregate.folds)


@dataclass(frozen=True)
class Always:
    """Train the same roles in every round.

    >>> sorted(Always(["lora_B", "head"]).roles)
    ['head', 'lora_B']
    """

    roles: Iterable[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", frozenset(_checked_roles(self.roles)))

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return the roles, whatever the round."""
        return frozenset(self.roles)


@dataclass(frozen=True)
class Alternate:
    """Train one role a round, in turn (RoLoRA, Chen et al. 2025, sec. 3, https://arxiv.org/abs/2502.01755).

    While lora_B is zero lora_A has no gradient, so lora_B comes first.
    """

    roles: Iterable[str] = (LORA_B, LORA_A)

    def __post_init__(self) -> None:
        roles = tuple(_checked_roles(self.roles))
        if len(set(roles)) < len(roles) or len(roles) < 2:
            raise InputError(f"Expected two different roles or more to alternate, got {list(roles)}")
        object.__setattr__(self, "roles", roles)

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        """Return the round's role."""
        roles = tuple(self.roles)
        return frozenset({roles[round_index % len(roles)]})


def _checked_roles(given: Iterable[str]) -> Sequence[str]:
    # A string would be read as its letters; a one-shot iterable would be empty from round 1 on.
    roles = () if isinstance(given, str) else tuple(given)
    if not roles or not all(role in ROLES for role in roles):
        raise InputError(f"Expected roles to be a list of {', '.join(ROLES)}, got {given!r}")
    return roles


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
