"""Virtual clients in this process: worker threads over one resident base model.

Every worker holds its own adapter tensors and hooks; the frozen base tensors are shared. A worker runs single-threaded,
so a client's numbers do not depend on how many workers there are; only the sums over clients could, and the round adds
those in client order.
"""

import copy
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedlr.adapters.state import AdapterState, Block, ClientUpdate, Slot
from fedlr.methods.client_rules.rule import RuleInputs
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import LAYOUT, adapter_parameters, train_only, write_adapter
from fedlr.privacy.ledger import Refusal
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.rehearsal import Rehearsal, SafeGradients
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.streams import Randomness
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import PerExampleLoss, class_losses
from fedlr.training.gradients import GhostGradients, Gradients, HookGradients, LoopGradients, SumGradients
from fedlr.training.local import LocalTraining, train_client
from fedlr.training.tuner_gradients import engine

GRADIENTS: dict[str, type[HookGradients | GhostGradients | LoopGradients | SumGradients]] = {
    "hooks": HookGradients,
    "ghost": GhostGradients,
    "loop": LoopGradients,
    "sum": SumGradients,
}


Model = TypeVar("Model", bound=nn.Module)
Value = TypeVar("Value", covariant=True)


class ByClient(Protocol[Value]):
    """What each client has: a list of all clients, or a dictionary of the one that lives on this device."""

    def __getitem__(self, client: int, /) -> Value: ...


class Charges(Protocol):
    """What a pool asks of a `PrivacyLedger`, or of what stands for one where another process keeps it."""

    def reserve(
        self,
        round_index: int,
        mechanism: Mechanism,
        num_steps: int,
        client_ids: Sequence[int],
        task: str | None = None,
    ) -> Mapping[int, Refusal | None]:
        """Charge a round to each client, or refuse; `task` names what they compute."""
        ...

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Say how many steps each client took."""
        ...


class Accounts:
    """What the clients of a pool have spent: written before their data are read, and after they trained."""

    def __init__(
        self,
        ledger: Charges | None,
        mechanism: Mechanism | None,
        training: LocalTraining,
        *,
        enrolled: AdapterState,
        randomness: Randomness,
    ) -> None:
        if (mechanism is None) != (ledger is None):
            raise ValueError(
                "Expected a ledger exactly when there is a mechanism: private training is always written down"
            )
        self._ledger, self._mechanism, self._num_steps = ledger, mechanism, training.num_steps
        self._given = "" if ledger is None else f"{enrolled.fingerprint()} {randomness!r}"
        self._lock = threading.Lock()

    def reserve(self, task: RoundRequest, cohort: Sequence[int], kept: Kept) -> tuple[list[int], list[Dropout]]:
        """Charge a round to those who can pay: return them, and the others.

        The ledger is told all that decides what they compute, but for their data and the configuration: what they are
        asked, together, what they were given and have kept, and the seed of the noise if there is one.
        """
        if self._ledger is None or self._mechanism is None:
            return list(cohort), []
        computed = (task.fingerprint(), self._given, kept.fingerprint(cohort), list(cohort))
        name = hashlib.sha256(repr(computed).encode()).hexdigest()
        with self._lock:
            answers = self._ledger.reserve(task.round_index, self._mechanism, self._num_steps, list(cohort), name)
        refused = [Dropout(client, "refused", answer.reason) for client, answer in answers.items() if answer]
        return [client for client in cohort if answers[client] is None], refused

    def settle(self, round_index: int, steps: Mapping[int, int]) -> None:
        """Write down how many steps each client took."""
        if self._ledger is not None:
            with self._lock:
                self._ledger.settle_all(round_index, steps)


class LocalPool:
    """A `ClientPool` (fedlr.rounds.round) of simulated clients.

    Args:
        model: PEFT model whose frozen tensors all workers share; it is not changed.
        clients: by client id, private examples.
        enrolled: the adapter every client was given once, when it joined; broadcasts overlay it.
        training: local training, the same for all.
        mechanism: clip and noise, or None for no privacy.
        ledger: where each client's spending is written before its data are read; None exactly when mechanism is.
        randomness: sampling and noise streams.
        weights: aggregation weight of each client, by the server's rule.
        grad_sample_mode: hooks, ghost or loop.
        num_workers: threads.
        side: what merges a folded product into the model; None: made here.
        rehearsal: what a device tries a round on before it is charged; None: nothing, as in a simulation.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: ByClient[Share],
        *,
        enrolled: AdapterState,
        training: LocalTraining,
        mechanism: Mechanism | None,
        ledger: Charges | None,
        randomness: Randomness,
        weights: ByClient[float],
        grad_sample_mode: str,
        num_workers: int,
        side: SideWeights | None = None,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self._clients, self._enrolled, self._weights = clients, enrolled, weights
        self._training, self._mechanism, self._randomness = training, mechanism, randomness
        self._accounts = Accounts(ledger, mechanism, training, enrolled=enrolled, randomness=randomness)
        self._side, self.kept = side or SideWeights(model), Kept()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="client")
        self._workers: SimpleQueue[Worker] = SimpleQueue()
        mode = grad_sample_mode if mechanism is not None else "sum"
        for _ in range(num_workers):
            self._workers.put(Worker(sharing_base(model), mode, loss=training.loss))
        self._rehearsal = rehearsal
        self._rehearsed: Block | None = None  # with long rows too
        self.seconds: dict[int, float] = {}  # by client, of its latest round

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Reserve each client's spending, then train those that can still pay; yield as they finish."""
        # What does not fit is an error here, before anybody is charged.
        adapter = replace(self._enrolled.overlaid(task.broadcast), side=task.side)
        self._side.merge(adapter)
        self.kept.check(cohort, task, adapter)
        self._rehearse(task, adapter, cohort)
        admitted, refused = self._accounts.reserve(task, cohort, self.kept)
        yield from refused
        for future in as_completed([self._threads.submit(self._train_one, task, adapter, c) for c in admitted]):
            yield future.result()

    def close(self) -> None:
        """Drop the clients that wait, let those that train finish their round, and remove all hooks."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._workers.empty():
            self._workers.get().close()

    def _rehearse(self, task: RoundRequest, adapter: AdapterState, cohort: Sequence[int]) -> None:
        """Try the round on constant rows; the first of a block on the longest there may be."""
        if (rehearsal := self._rehearsal) is None:
            return
        rows = rehearsal.rows(with_long=task.block != self._rehearsed)
        training, mechanism = rehearsal.training(self._training), rehearsal.mechanism(self._mechanism)
        steps = partial(self._steps, training=training, mechanism=mechanism, is_safe=False)
        for client in cohort:
            self._threads.submit(steps, rows, task, adapter, client).result()
        self._rehearsed = task.block

    def _train_one(self, task: RoundRequest, adapter: AdapterState, client: int) -> ClientUpdate:
        started = time.perf_counter()
        tensors, inputs, steps = self._steps(
            self._clients[client],
            task,
            adapter,
            client,
            training=self._training,
            mechanism=self._mechanism,
            is_safe=self._rehearsal is not None,
        )
        self.kept.remember([client], inputs)
        self._accounts.settle(task.round_index, {client: steps})
        self.seconds[client] = time.perf_counter() - started
        return ClientUpdate(client, self.kept.keep(client, task, tensors), self._weights[client], task.round_index)

    def _steps(
        self,
        share: Share,
        task: RoundRequest,
        adapter: AdapterState,
        client: int,
        *,
        training: LocalTraining,
        mechanism: Mechanism | None,
        is_safe: bool,
    ) -> tuple[dict[Slot, Tensor], RuleInputs, int]:
        """Take a round's steps from what a client is sent and keeps; what it keeps is not changed."""
        torch.set_num_threads(1)
        worker = self._workers.get()
        try:
            start = adapter.with_tensors(self.kept.start(client, task, adapter))
            trained, gradients = worker.start_from(start, task.block)
            if is_safe and self._rehearsal is not None:
                gradients = SafeGradients(gradients, trained, self._rehearsal)
            device = next(iter(trained.values())).device
            inputs = self.kept.inputs([client], task, adapter, rule=training.rule, device=device)
            steps = train_client(
                worker.model,
                gradients,
                share,
                training=training,
                mechanism=mechanism,
                randomness=self._randomness,
                client_id=client,
                round_index=task.round_index,
                trained=trained,
                inputs=inputs,
            )
            tensors = {slot: parameter.detach().to("cpu", copy=True) for slot, parameter in trained.items()}
        finally:
            self._workers.put(worker)
        return tensors, inputs, steps


class Worker:
    """One model with its gradient hooks; reused from client to client."""

    def __init__(self, model: nn.Module, mode: str, *, loss: PerExampleLoss = class_losses) -> None:
        self.model = model
        self._mode, self._loss = mode, loss
        self._block: Block | None = None
        self._trained: dict[Slot, nn.Parameter] = {}
        self._gradients: Gradients | None = None

    def start_from(self, adapter: AdapterState, block: Block) -> tuple[dict[Slot, nn.Parameter], Gradients]:
        """Load an adapter and hook the tensors of `block`; the hooks stay while the block does."""
        write_adapter(self.model, adapter.tensors)
        if self._gradients is None or self._block != block:
            self.close()
            self._trained = train_only(self.model, block)
            self.model.train()
            self._gradients = self._make()
            self._block = block
        return self._trained, self._gradients

    def _make(self) -> Gradients:
        layout = getattr(self.model, LAYOUT, None)
        if layout is not None and self._mode == "hooks":
            return engine(layout.tuner, self.model, self._trained, loss=self._loss)
        return GRADIENTS[self._mode](self.model, self._trained, loss=self._loss)

    def close(self) -> None:
        """Remove the hooks."""
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None


def sharing_base(model: Model) -> Model:
    """Copy a model so that only its adapter is new: the frozen tensors are the same objects."""
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    shared = [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in own]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
