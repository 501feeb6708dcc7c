"""What a method does, measured: a small federation of made-up clients plays rounds of the method's own functions.

Nothing here is typed in by hand for a method, so a table of these properties cannot go stale. The numbers of a message
are counted layer by layer, in layers whose sizes are different primes: where a count is R (D + K) in all of them, it is
no coincidence.
Legend: D out_features, K in_features, R rank, r rank where the server chooses it, M rank of the side product.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, Block, ClientUpdate, Slot, in_block, num_values
from fedlr.config.build import build_method
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import Method
from fedlr.rounds.round import RoundRequest, ServerState, initial_state, request_of, run_round

LAYERS = {"layer.0": (41, 53), "layer.1": (67, 43), "layer.2": (59, 61)}  # D, K
RANK, NUM_CLIENTS, NUM_ROUNDS = 4, 3, 6
WEIGHTS, MIXED_RANKS = (1.0, 2.0, 3.0), (RANK, RANK - 1, RANK - 2)
SPREAD = 0.1  # of what a client adds to each number of the first layer; twice that in the next, and so on
MOST_FACTORS = 3  # of one kind that a message holds a layer
EXACT_BELOW = 1e-5  # relative; adapters are float32, which rounds at 1e-7
LETTERS = {LORA_A: "A", LORA_B: "B", "head": "head"}


@dataclass(frozen=True)
class Properties:
    """What one method was seen to do, in words and formulas; of round 1 and later, as round 0 may lack what follows."""

    name: str
    trains: str
    up: str  # numbers a layer and client
    down: str
    noised: str  # under DP: what a step of a client trains
    aggregate_error: float  # largest, relative, over all rounds and layers
    final_error: float  # the same after the finaliser
    mixed_error: float | None  # of the aggregate, where clients have ranks of their own; None: not allowed
    personal: tuple[str, ...]
    side_columns: tuple[int, ...]  # M at the start of every round, the largest over the layers
    client_rule: str  # "" for none
    client_remembers: bool
    dynamic_ranks: bool  # whether layers have a rank that changes
    prunes: bool  # whether clients' ranks may fall
    uniform: bool  # whether it refuses clients of unlike weights
    least_updates: int  # that a round needs
    server_memory: tuple[str, ...]
    adapters: Sequence[AdapterState] = field(repr=False, compare=False)  # before round 0 and after each
    updates: Sequence[Sequence[ClientUpdate]] = field(repr=False, compare=False)  # of each round

    @property
    def folds(self) -> bool:
        """Whether anything went into the side product."""
        return any(self.side_columns)

    @property
    def aggregate(self) -> str:
        """Whether the server's function is what an ideal server would have, or that there is no one model."""
        if self.personal:
            return "personal"
        is_exact = self.aggregate_error < EXACT_BELOW and self.final_error < EXACT_BELOW
        return "exact" if is_exact else "biased"

    @property
    def notes(self) -> tuple[str, ...]:
        """Everything else that sets the method apart, shortly."""
        return tuple(
            text
            for text, holds in (
                (f"{_listed(self.personal)} personal", self.personal),
                ("folds", self.folds),
                ("mixed ranks", self.mixed_error is not None),
                ("dynamic ranks", self.dynamic_ranks),
                ("prunes ranks", self.prunes),
                ("uniform weights only", self.uniform),
                (f"{self.least_updates} updates at least", self.least_updates > 1),
                (f"client rule {self.client_rule}", self.client_rule),
                ("clients remember", self.client_remembers),
                ("server remembers", self.server_memory),
            )
            if holds
        )


@cache
def properties_of(name: str) -> Properties:
    """Return the properties of a method of configs/method, as its file configures it.

    Raises:
        InputError: if there is no such file, or it cannot be built.
    """
    return measured(named_method(name))


def named_method(name: str) -> Method:
    """Build a method from its file alone, with the defaults of every other group."""
    return build_method(compose_experiment([f"method={name}"]))


def measured(method: Method, *, num_rounds: int = NUM_ROUNDS) -> Properties:
    """Return the properties of a method, from rounds of it: of clients with unlike weights, if it takes those."""
    try:
        return _measured(method, MadeUpClients(), num_rounds=num_rounds)
    except InputError:
        alike = (1.0,) * max(NUM_CLIENTS, method.least_updates)
        return replace(_measured(method, MadeUpClients(weights=alike), num_rounds=num_rounds), uniform=True)


def _measured(method: Method, pool: "MadeUpClients", *, num_rounds: int) -> Properties:
    states, tasks = [initial_state(pool.adapter, method)], []
    errors, final_errors = [0.0], [0.0]
    for _ in range(num_rounds):
        before = states[-1]
        tasks.append(request_of(before, method))
        after, diagnostics = run_round(before, range(pool.num_clients), pool=pool, method=method)
        ideal = Ideal.of(before.adapter, pool.rounds[-1])
        errors += diagnostics.aggregation_error.values()
        final_errors += aggregation_error(ideal, after.adapter).values()
        states.append(after)
    later = list(zip(states[1:], tasks[1:], strict=False))
    sent = [[*task.broadcast.items(), *task.control.items()] for _, task in later]
    columns = [max((len(layer.lora_A) for layer in state.adapter.side.values()), default=0) for state in states]
    down = formula(sent) + (" + M (D + K)" if any(columns) else "")
    return Properties(
        name=method.name,
        trains=_trained([[task.block] for _, task in later], " and ", by_step=False),
        up=formula([state.adapter.select(task.shared).items() for state, task in later]),
        down=down,
        noised=_trained([_steps(method, task) for _, task in later], " and ", by_step=method.client.alternates),
        aggregate_error=_largest(errors),
        final_error=_largest(final_errors),
        mixed_error=_mixed_error(method) if method.mixed_ranks else None,
        personal=tuple(LETTERS[role] for role in sorted(method.personal)),
        side_columns=tuple(columns),
        client_rule=type(method.client).__name__ if method.client.changes else "",
        client_remembers=method.client.remembers,
        dynamic_ranks=method.dynamic_ranks,
        prunes=method.prunes,
        uniform=False,
        least_updates=method.least_updates,
        server_memory=tuple(sorted(states[-1].adapter.memory)),
        adapters=[state.adapter for state in states],
        updates=pool.rounds,
    )


class MadeUpClients:
    """A ClientPool whose clients add random numbers to what they should have trained: the same in every process."""

    def __init__(self, *, weights: Sequence[float] = WEIGHTS) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors: dict[Slot, Tensor] = {}
        for path, (out_features, in_features) in LAYERS.items():
            drawn_RK = torch.randn(RANK, in_features, generator=generator) / in_features**0.5
            tensors[Slot(path, LORA_A)] = drawn_RK
            tensors[Slot(path, LORA_B)] = torch.zeros(out_features, RANK)
        self.adapter = AdapterState(tensors, scale=1.0)
        self.rounds: list[list[ClientUpdate]] = []
        self._weights = weights
        self.num_clients = len(weights)

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        """Yield one update a client."""
        start = self.adapter.overlaid(task.broadcast).select(task.shared)
        self.rounds.append([])
        for client in cohort:
            generator = torch.Generator().manual_seed(1 + 100 * task.round_index + client)
            trained = {s: t + _strength(s, t) * torch.randn(t.shape, generator=generator) for s, t in start.items()}
            own = dict(narrowed(trained, task.ranks.get(client)))
            self.rounds[-1].append(ClientUpdate(client, own, self._weights[client], task.round_index))
            yield self.rounds[-1][-1]


def _strength(slot: Slot, tensor: Tensor) -> Tensor:
    """Return how much a client moves the numbers of a tensor: layers differ, and directions of the rank."""
    falling_R = SPREAD * 2.0 ** (list(LAYERS).index(slot.path) - torch.arange(min(tensor.shape)))
    return falling_R[:, None] if slot.role == LORA_A else falling_R


def formula(messages: Iterable[Collection[tuple[Slot, Tensor]]]) -> str:
    """Return what the numbers of a message are in every layer: one formula, or those that occur joined by `or`.

    Where a layer's rank is not RANK in some message, it is r and not R.

    >>> formula([[(Slot(path, LORA_B), torch.zeros(D, RANK)) for path, (D, _) in LAYERS.items()]])
    'R D'
    """
    found, ranks = set(), {RANK}
    for message in messages:
        for path, (out_features, in_features) in LAYERS.items():
            sent = [tensor for slot, tensor in message if slot.path == path]
            rank = min((min(tensor.shape) for tensor in sent), default=RANK)
            found.add(_formula(num_values(sent), out_features, in_features, rank=rank))
            ranks.add(rank)
    letter = "R" if ranks == {RANK} else "r"
    return " or ".join(sorted(found)).replace("R", letter)


def message_sizes(out_features: int, in_features: int, *, rank: int = RANK) -> dict[str, int]:
    """Return the sizes that a message may have in a layer: up to MOST_FACTORS of either factor, or a core."""
    sizes = {"R²": rank * rank}
    for num_B, num_A in product(range(MOST_FACTORS + 1), repeat=2):
        sizes[_sum(num_B, num_A)] = rank * (num_B * out_features + num_A * in_features)
    return sizes


def _sum(num_B: int, num_A: int) -> str:
    if num_B == num_A:
        return _times(num_B, "R (D + K)") or "0"
    return " + ".join(filter(None, (_times(num_B, "R D"), _times(num_A, "R K"))))


def _times(number: int, text: str) -> str:
    return "" if number == 0 else text if number == 1 else f"{number} {text}"


def _formula(number: int, out_features: int, in_features: int, *, rank: int) -> str:
    candidates = message_sizes(out_features, in_features, rank=rank).items()
    return next(
        (name for name, value in candidates if value == number), f"{number:,} at {out_features} x {in_features}"
    )


def _steps(method: Method, task: RoundRequest) -> list[Block]:
    return [method.client.active(step, task.block) for step in range(2 * len(LETTERS))]


def _trained(rounds: Sequence[Sequence[Block]], joined: str, *, by_step: bool) -> str:
    """Return which factors train together in a layer, and if that changes, with what."""
    in_layers = [[[_roles(block, path) for path in LAYERS] for block in steps] for steps in rounds]
    kinds = {roles for steps in in_layers for block in steps for roles in block if roles}
    told = " or ".join(joined.join(roles) for roles in sorted(kinds))
    if len(kinds) < 2:
        return told
    by_layer = any(len(set(block)) > 1 for steps in in_layers for block in steps)
    return f"{told}, by {'step' if by_step else 'layer' if by_layer else 'round'}"


def _roles(block: Block, path: str) -> tuple[str, ...]:
    return tuple(letter for role, letter in LETTERS.items() if in_block(Slot(path, role), block))


def _mixed_error(method: Method, *, num_rounds: int = 3) -> float:
    pool = MadeUpClients()
    state: ServerState = initial_state(pool.adapter, method)
    errors = [0.0]
    for _ in range(num_rounds):
        state, diagnostics = run_round(state, range(NUM_CLIENTS), pool=pool, method=method, ranks=MIXED_RANKS)
        errors += diagnostics.aggregation_error.values()
    return _largest(errors)


def _largest(errors: Sequence[float]) -> float:
    """Return the largest, and nan where any is: Python's max may lose it."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _listed(letters: Collection[str]) -> str:
    return " and ".join(letters)
