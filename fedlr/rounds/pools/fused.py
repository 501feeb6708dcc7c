"""Virtual clients that train together: one resident base model, a whole group of clients in each pass.

The admitted clients of a round are cut into groups. A group's trained tensors are one matrix, a row a client; worker
threads compute clipped sums of micro-batches that hold rows of many clients (`fedlr.training.cohort`). A client that
only is enrolled costs its row numbers.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from fedlr.adapters.state import AdapterState, Block, ClientUpdate, Slot
from fedlr.methods.client_rules.rule import RuleInputs
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import train_only, write_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.local import Accounts, ByClient, Charges, sharing_base
from fedlr.rounds.pools.rehearsal import Rehearsal, SafeSums
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.streams import Randomness
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import PerExampleLoss
from fedlr.training.cohort import FusedSums, Stack, train_cohort
from fedlr.training.fused import ClippedSums, FusedGradients
from fedlr.training.local import LocalTraining
from fedlr.training.parity import ParityCheck

# More of them fill no micro-batch better: the lengths of their examples lie close enough.
LARGEST_GROUP = 64
# Rows of float32 that a client needs at once: tensors, sums, two of an optimizer, noise on its way; and with a rule
# after the noise: the start, what it makes of the gradient, and what it remembers.
ROWS_A_CLIENT, ROWS_OF_A_RULE = 6, 3
MOST_ENGINES = 3  # of one worker: blocks that take turns


class FusedPool:
    """A `ClientPool` (fedlr.rounds.round) of simulated clients that train together.

    Args:
        model: PEFT model whose frozen tensors all workers share; it is not changed.
        clients: by client id, private examples, rows of one table.
        enrolled: the adapter every client was given once, when it joined; broadcasts overlay it.
        training: local training, the same for all.
        mechanism: clip and noise, or None for no privacy.
        ledger: where each client's spending is written before its data are read; None exactly when mechanism is.
        randomness: sampling and noise streams.
        weights: aggregation weight of each client, by the server's rule.
        num_workers: threads.
        side: what merges a folded product into the model; None: made here.
        memory_gb: for the clients that train at once; None: as for `LARGEST_GROUP` of them.
        check_parity: compare the first batch with Opacus.
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
        num_workers: int,
        side: SideWeights | None = None,
        memory_gb: float | None = None,
        check_parity: bool = True,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self._clients, self._enrolled, self._weights = clients, enrolled, weights
        self._training, self._mechanism, self._randomness = training, mechanism, randomness
        self._accounts = Accounts(ledger, mechanism, training, enrolled=enrolled, randomness=randomness)
        self._memory_gb = memory_gb
        self._side, self.kept = side or SideWeights(model), Kept()
        self._device = next(model.parameters()).device
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rows", initializer=_one_thread)
        self._workers: SimpleQueue[FusedWorker] = SimpleQueue()
        for _ in range(num_workers):
            self._workers.put(FusedWorker(sharing_base(model), training.loss))
        self._parity = ParityCheck(sharing_base(model), loss=training.loss) if check_parity else None
        self._rehearsal = rehearsal
        self._rehearsed: Block | None = None  # with long rows too
        self.seconds: dict[int, float] = {}  # by client, of its latest round: its part of its group's time

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Reserve each client's spending, then train those that can still pay, group by group; yield in their order."""
        # What does not fit is an error here, before anybody is charged.
        adapter = replace(self._enrolled.overlaid(task.broadcast), side=task.side)
        self._side.merge(adapter)
        self.kept.check(cohort, task, adapter)
        self._rehearse(task, adapter, cohort)
        admitted, refused = self._accounts.reserve(task, cohort, self.kept)
        yield from refused
        size = group_size(adapter.select(task.block), self._memory_gb, has_rule=self._training.rule.changes)
        for start in range(0, len(admitted), size):
            yield from self._train_group(task, adapter, admitted[start : start + size])

    def close(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _rehearse(self, task: RoundRequest, adapter: AdapterState, cohort: Sequence[int]) -> None:
        """Try the round on constant rows; the first of a block on the longest there may be."""
        if (rehearsal := self._rehearsal) is None:
            return
        rows = rehearsal.rows(with_long=task.block != self._rehearsed)
        sums = GroupSums(self._workers, adapter, task.block, None)
        training, mechanism = rehearsal.training(self._training), rehearsal.mechanism(self._mechanism)
        for client in cohort:
            self._steps(sums, [rows], task, adapter, [client], training=training, mechanism=mechanism)
        self._rehearsed = task.block

    def _train_group(self, task: RoundRequest, adapter: AdapterState, group: Sequence[int]) -> Iterator[ClientUpdate]:
        started = time.perf_counter()
        sums: FusedSums = GroupSums(self._workers, adapter, task.block, self._parity)
        if self._rehearsal is not None:
            sums = SafeSums(sums, self._rehearsal)
        shares = [self._clients[client] for client in group]
        stack, inputs, steps = self._steps(
            sums, shares, task, adapter, group, training=self._training, mechanism=self._mechanism
        )
        self.kept.remember(group, inputs)
        self._accounts.settle(task.round_index, dict.fromkeys(group, steps))
        self.seconds.update(dict.fromkeys(group, (time.perf_counter() - started) / len(group)))
        for place, client in enumerate(group):
            sent = self.kept.keep(client, task, stack.tensors(place))
            yield ClientUpdate(client, sent, self._weights[client], task.round_index)

    def _steps(
        self,
        sums: FusedSums,
        shares: Sequence[Share],
        task: RoundRequest,
        adapter: AdapterState,
        group: Sequence[int],
        *,
        training: LocalTraining,
        mechanism: Mechanism | None,
    ) -> tuple[Stack, RuleInputs, int]:
        """Take a round's steps from what the group is sent and keeps; what it keeps is not changed."""
        starts = [self.kept.start(client, task, adapter) for client in group]
        ranks = [task.ranks[client] for client in group] if task.ranks else None
        stack = Stack.of(starts, ranks=ranks, device=self._device)
        inputs = self.kept.inputs(group, task, adapter, rule=training.rule, device=self._device)
        steps = train_cohort(
            sums,
            self._threads,
            stack,
            shares,
            training=training,
            mechanism=mechanism,
            randomness=self._randomness,
            client_ids=group,
            round_index=task.round_index,
            inputs=inputs,
        )
        return stack, inputs, steps


class FusedWorker:
    """One model with its fused copy; serves one micro-batch at a time."""

    def __init__(self, model: nn.Module, loss: PerExampleLoss) -> None:
        self._model, self._loss = model, loss
        self._engines: dict[Block, FusedGradients] = {}
        self._adapter: AdapterState | None = None

    def engine(self, adapter: AdapterState, block: Block) -> FusedGradients:
        """Return the engine of a block, over an adapter's frozen tensors."""
        if self._adapter is not adapter:
            write_adapter(self._model, adapter.tensors)
            self._adapter = adapter
        if block not in self._engines:
            if len(self._engines) == MOST_ENGINES:
                self._engines.clear()  # a method that chooses by layer may never train the same block again
            self._engines[block] = FusedGradients(self._model, train_only(self._model, block), loss=self._loss)
        return self._engines[block]


class GroupSums:
    """Clipped sums of one group's micro-batches, by whichever worker is free."""

    def __init__(
        self, workers: SimpleQueue[FusedWorker], adapter: AdapterState, block: Block, parity: ParityCheck | None
    ) -> None:
        self._workers, self._adapter, self._block, self._parity = workers, adapter, block, parity

    def __call__(
        self,
        batch: Batch,
        *,
        owner: Tensor,
        stacks: Mapping[Slot, Tensor],
        max_grad_norm: float,
        ranks: Tensor | None,
        active: frozenset[Slot] | None,
    ) -> ClippedSums:
        """See `fedlr.training.cohort.FusedSums`."""
        worker = self._workers.get()
        try:
            engine = worker.engine(self._adapter, self._block)
            found = engine.clipped_sums(
                batch, owner=owner, stacks=stacks, max_grad_norm=max_grad_norm, ranks=ranks, active=active
            )
        finally:
            self._workers.put(worker)
        if self._parity is not None and ranks is None:  # the reference has one rank
            self._parity.compare(
                found,
                batch,
                owner=owner,
                adapter=self._adapter.tensors,
                stacks=stacks,
                max_grad_norm=max_grad_norm,
                active=active,
            )
        return found


def group_size(trained: Mapping[Slot, Tensor], memory_gb: float | None, *, has_rule: bool = False) -> int:
    """Return how many clients train at once: a function of the configuration alone, so that sums always add up alike.

    >>> group_size({Slot("layer", "lora_B"): torch.zeros(1000, 1000)}, 0.1)
    4
    """
    if memory_gb is None:
        return LARGEST_GROUP
    return max(1, min(LARGEST_GROUP, int(memory_gb * 1e9 / bytes_a_client(trained, has_rule=has_rule))))


def bytes_a_client(trained: Mapping[Slot, Tensor], *, has_rule: bool) -> int:
    """Return what one more client of a group needs while it trains.

    >>> bytes_a_client({Slot("layer", "lora_B"): torch.zeros(1000, 1000)}, has_rule=False)
    24000000
    """
    num_rows = ROWS_A_CLIENT + (ROWS_OF_A_RULE if has_rule else 0)
    return 4 * num_rows * sum(tensor.numel() for tensor in trained.values())


def _one_thread() -> None:
    torch.set_num_threads(1)
