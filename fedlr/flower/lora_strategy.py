"""A method of the library as a Flower strategy: rounds are those of `rounds.round`, only the clients are Flower's.

Arrays go down whole and come back whole or as the trained part, under PEFT's names. What differs from Flower's FedAvg,
because of what 1.41 does with bad luck and bad replies: every wait ends, the cohort follows from a seed, the server
sets the weights, a reply that cannot be used is dropped and counted, and too few usable ones leave the model as it was.

No noise is added and no epsilon is claimed here: that is the client's to do, before it replies.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlr.config.build import build_method
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.flower.arrays import PeftNames, read_arrays
from fedlr.flower.replies import CLIENT_ERROR, FROZEN_MOVED, ReplyPool, Weighting, first_contents, mean_metrics
from fedlr.methods.aggregate.held import TooFewUpdates
from fedlr.methods.method import Method
from fedlr.rounds.round import Answers, Dropout, ServerState, initial_state, request_of
from fedlr.streams import Purpose, stream

SERVER_ROUND, TRAINED_KEYS = "server-round", "trained-keys"  # what a client is told in its ConfigRecord
HINTS = {
    FROZEN_MOVED: " (train the arrays of config['trained-keys'] and freeze all others)",
    CLIENT_ERROR: " (what it says may hold data: it is logged with FLWR_LOG_LEVEL=DEBUG)",
}
POLL_S = 1.0
logger = logging.getLogger("flwr")


def method_named(name: str, overrides: Sequence[str] = ()) -> Method:
    """Build a method of configs/method."""
    return build_method(compose_experiment([f"method={name}", *(f"method.{override}" for override in overrides)]))


def needs_more_of_clients(method: Method) -> str | None:
    """Return what clients would have to do besides training a block from the arrays they are sent; None: nothing."""
    if method.personal:
        return f"clients keep their {', '.join(method.personal)} from round to round"
    if method.folds:
        return "clients merge what the server folds away into their base model"
    if method.prunes:
        return "clients give their factors the ranks that the server leaves them"
    if method.client.changes:
        return f"clients apply the rule {type(method.client).__name__} in every step"
    if method.dynamic_ranks:
        return "clients give their layers the ranks of each round"
    return None


@dataclass
class Running:
    """A run between `start` and its end."""

    names: PeftNames
    state: ServerState
    timeout: float
    asked: list[Message] = field(default_factory=list)  # of the step that replies are expected to


@dataclass(frozen=True)
class RoundOutcome:
    """The nodes of a round: all that were asked, those whose replies were used, and why others were not."""

    cohort: tuple[int, ...]
    used: tuple[int, ...]
    dropouts: tuple[Dropout, ...]

    def counts(self) -> dict[str, float]:
        """Return how many replies were used, how many not, and for which reason."""
        reasons = Counter(f"dropped-{dropout.reason.replace('_', '-')}" for dropout in self.dropouts)
        return {"num-results": len(self.used), "num-dropped": len(self.dropouts), **reasons}


class LoraStrategy(Strategy):
    """A method of federated LoRA as a Flower strategy; a subclass names its method of configs/method.

    A client finds the keys of the arrays to train in its config as "trained-keys". It replies with one ArrayRecord, of
    these or of all arrays, and at most one MetricRecord. Arrays it was not to train must come back as they were.

    Args:
        method: any method whose clients only train a block; None: the class's own.
        fraction_train, fraction_evaluate: of the connected nodes, to ask in each round.
        min_train_nodes, min_evaluate_nodes: to ask at least, as far as there are so many.
        min_available_nodes: to wait for before a round, for `max_wait_s` seconds at most; then those there are asked.
        min_results: usable replies without which a round leaves the model as it was; so many at least are asked.
        seed: of the cohorts: a function of the seed, the round and the connected nodes.
        weight_cap: None: all clients count alike. Else each counts what it says under `weighted_by_key`, at most this.
        train_head: whether arrays that are no LoRA factors are trained and averaged too; else they are frozen.

    Attributes:
        rounds: of the current or last run, which nodes were used in each round, and why others were not.

    Raises:
        InputError: for an option out of range, and a method that a strategy cannot be.
    """

    method_name: ClassVar[str] = ""

    def __init__(
        self,
        method: Method | None = None,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        min_results: int = 2,
        max_wait_s: float = 60.0,
        seed: int = 0,
        weighted_by_key: str = "num-examples",
        weight_cap: float | None = None,
        train_head: bool = True,
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
    ) -> None:
        self.method = method or method_named(self.method_name)
        if reason := needs_more_of_clients(self.method):
            raise InputError(
                f"Expected a method whose clients only train a block, got {self.method.name}: {reason}; "
                "use fedlr's own server and clients for it"
            )
        if self.method.server_momentum or not self.method.server_rates.is_constant:
            raise InputError(
                f"Expected a method={self.method.name} without momentum and schedule of the server's step, which this "
                "strategy would not take, got one; use fedlr's own server for it"
            )
        _check_in(0, 1, fraction_train=fraction_train, fraction_evaluate=fraction_evaluate)
        _check_in(0, math.inf, min_train_nodes=min_train_nodes, min_evaluate_nodes=min_evaluate_nodes)
        _check_in(0, math.inf, min_available_nodes=min_available_nodes, max_wait_s=max_wait_s)
        _check_in(1, math.inf, min_results=min_results)
        if weight_cap is not None and not 0 < weight_cap < math.inf:
            raise InputError(
                f"Expected weight_cap to be above 0 and finite, or None for equal weights, got {weight_cap}"
            )
        stream(seed, Purpose.COHORT)  # refuses what is no seed
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_train_nodes, self.min_evaluate_nodes = min_train_nodes, min_evaluate_nodes
        self.min_available_nodes, self.min_results, self.max_wait_s = min_available_nodes, min_results, max_wait_s
        self.seed, self.train_head = seed, train_head
        self.weighting = Weighting(weighted_by_key, weight_cap)
        self.arrayrecord_key, self.configrecord_key = arrayrecord_key, configrecord_key
        self.rounds: list[RoundOutcome] = []
        self._run: Running | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds; as Flower's own `start`, from arrays that hold one LoRA adapter under PEFT's names.

        `timeout` (seconds) also bounds how long a message may wait for its client. The result always has arrays.

        Raises:
            InputError: before anyone is asked, for arrays or a timeout that cannot be used.
        """
        if not 0 < timeout < math.inf:
            raise InputError(f"Expected timeout to be above 0 and finite, got {timeout}")
        names, adapter = read_arrays(initial_arrays)
        self._run, self.rounds = Running(names, initial_state(adapter, self.method), timeout), []
        first = names.record(self._run.state.adapter)
        try:
            return super().start(grid, first, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        finally:
            self._run = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the round's cohort to train; nobody where fewer nodes are connected than results are needed."""
        run = self._running()
        least = max(self.min_train_nodes, self.min_results)
        nodes = self._connected(grid, max(self.min_available_nodes, least))
        cohort = self._sample(nodes, server_round, Purpose.COHORT, self.fraction_train, least)
        if len(cohort) < self.min_results:
            logger.warning("round %d: %d nodes, fewer than min_results=%d", server_round, len(cohort), self.min_results)
            cohort = []
        block = request_of(run.state, self.method, train_head=self.train_head).block
        config = ConfigRecord({**config, SERVER_ROUND: server_round, TRAINED_KEYS: run.names.keys(block)})
        run.asked = self._messages(server_round, MessageType.TRAIN, cohort, arrays, config)
        return run.asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next arrays, those of before where too few replies can be used, and the metrics of the round."""
        run = self._running()
        contents, dropouts = first_contents(replies, run.asked)
        pool = ReplyPool(contents, dropouts, run.names, run.state.adapter, self.weighting)
        state, outcome = self._aggregate(run, pool)
        for dropout in outcome.dropouts:
            hint = HINTS.get(dropout.reason, "")
            logger.warning("round %d: node %d dropped: %s%s", server_round, dropout.client_id, dropout.reason, hint)
        if len(outcome.used) < self.min_results:
            logger.warning("round %d: %d usable replies, the model is kept", server_round, len(outcome.used))
            state = replace(state, adapter=run.state.adapter)
        run.state = state
        self.rounds.append(outcome)
        metrics = mean_metrics([contents[node] for node in outcome.used], self.weighting)
        return run.names.record(state.adapter), MetricRecord(dict(metrics | outcome.counts()))

    def _aggregate(self, run: Running, pool: ReplyPool) -> tuple[ServerState, RoundOutcome]:
        """Do what `run_round` does, but for its diagnostics, which take many times as long as a mean."""
        before, cohort = run.state, [message.metadata.dst_node_id for message in run.asked]
        task = request_of(before, self.method, train_head=self.train_head)
        answers = Answers(pool, task, cohort, adapter=before.adapter)
        updates = iter(answers)
        first = next(updates, None)
        adapter = before.adapter
        if first is not None:
            try:
                adapter = self.method.finalise(self.method.aggregate(adapter, chain([first], updates)))
            except TooFewUpdates:
                answers.leave_out("too_few")
            deque(updates, maxlen=0)  # all are heard, also where a rule stops early
        if adapter.side:
            raise InputError(f"Expected method.folds=true for {self.method.name}, which folds into the base, got false")
        outcome = RoundOutcome(tuple(cohort), tuple(answers.trained), tuple(answers.dropouts))
        return ServerState(adapter, before.round_index + 1), outcome

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask some of the connected nodes, without waiting for more, to evaluate."""
        run = self._running()
        nodes, least = sorted(grid.get_node_ids()), self.min_evaluate_nodes
        cohort = self._sample(nodes, server_round, Purpose.EVALUATION, self.fraction_evaluate, least)
        config = ConfigRecord({**config, SERVER_ROUND: server_round})
        run.asked = self._messages(server_round, MessageType.EVALUATE, cohort, arrays, config)
        return run.asked

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of every metric that more than half of the replies tell; None where there is none."""
        contents, dropouts = first_contents(replies, self._running().asked)
        for dropout in dropouts:
            logger.warning("evaluation %d: node %d: %s", server_round, dropout.client_id, dropout.reason)
        metrics = mean_metrics(list(contents.values()), self.weighting)
        return MetricRecord(dict(metrics)) if metrics else None

    def summary(self) -> None:
        """Log the method and how a round is made."""
        weights = "equal" if self.weighting.cap is None else f"{self.weighting.key}, at most {self.weighting.cap:g}"
        logger.info("\t├──> Method: %s (weights: %s)", self.method.name, weights)
        logger.info("\t├──> Fraction: train %.2f, evaluate %.2f", self.fraction_train, self.fraction_evaluate)
        logger.info("\t└──> Waits for %d nodes, %g s", self.min_available_nodes, self.max_wait_s)

    def _running(self) -> Running:
        if self._run is None:
            raise InputError(
                f"Expected {type(self).__name__}.start to run the rounds, got one of its steps alone: the epsilon of a "
                "wrapper that adds noise to what this returns does not hold, as factors were re-factorised or frozen "
                "before; let clients train with DP-SGD instead"
            )
        return self._run

    def _connected(self, grid: Grid, wanted: int) -> list[int]:
        deadline = time.monotonic() + self.max_wait_s
        while len(nodes := sorted(grid.get_node_ids())) < wanted and (left := deadline - time.monotonic()) > 0:
            logger.info("Waiting for nodes: %d of %d, for %.0f s more", len(nodes), wanted, left)
            time.sleep(min(POLL_S, left))
        return nodes

    def _sample(
        self, nodes: Sequence[int], server_round: int, purpose: Purpose, fraction: float, least: int
    ) -> list[int]:
        size = min(len(nodes), max(int(len(nodes) * fraction), least)) if fraction > 0 else 0
        generator = stream(self.seed, purpose, round_index=server_round - 1)
        return sorted(nodes[index] for index in generator.choice(len(nodes), size=size, replace=False)) if size else []

    def _messages(
        self, server_round: int, kind: str, nodes: Sequence[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        ttl = self._running().timeout
        return [Message(content, node, kind, ttl=ttl, group_id=str(server_round)) for node in nodes]


def _check_in(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high or value == math.inf:
            raise InputError(f"Expected {name} to be finite and in [{low:g}, {high:g}], got {value}")
