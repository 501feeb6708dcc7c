"""Local training of many clients at once: the steps of `fedlr.training.local`, taken by a whole cohort together.

In each step every client draws its own Poisson batch. The examples of all of them are sorted by length and cut into
micro-batches, so little is padded; each micro-batch is one forward and one backward pass over rows of many clients
(`fedlr.training.fused`). Then each client's sum of clipped gradients, which may be empty, gets that client's noise and
goes to its row of the optimizer. With the same streams the numbers are those of `train_client`, up to the rounding of
sums taken in another order.

Notable choices:
- Micro-batches are added up in their order, whichever thread is done first: the number of threads changes no bit.
- One optimizer holds all clients: its rules work entry by entry, so the rows of a matrix are optimizers of their own.
  Others (LBFGS, Muon, Adafactor) are refused.

Legend: C clients, V trained values of one client, slot after slot in their order.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlr.adapters.client_ranks import beyond, narrowed, within
from fedlr.adapters.state import HEAD, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import RuleInputs
from fedlr.privacy.mechanism import Mechanism, gaussian_noise, on_grid
from fedlr.streams import Draws, Randomness
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import Examples, Share, micro_batches
from fedlr.training.fused import ClippedSums
from fedlr.training.local import LocalTraining, check_training

AHEAD = 2 * (os.cpu_count() or 1)  # micro-batches that run or wait to be added up: enough for every thread

# Torch's optimizers whose update of an entry reads that entry's gradient and history alone.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,  # and AdamW
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)


class FusedSums(Protocol):
    """Computes clipped sums of a micro-batch: `FusedGradients.clipped_sums` on whatever thread is free."""

    def __call__(
        self,
        batch: Batch,
        *,
        owner: Tensor,
        stacks: Mapping[Slot, Tensor],
        max_grad_norm: float,
        ranks: Tensor | None,
        active: frozenset[Slot] | None,
    ) -> ClippedSums: ...


@dataclass(frozen=True)
class Stack:
    """The trained tensors of C clients: one row of `theta` (C, V) each."""

    theta: Tensor  # float32
    shapes: Mapping[Slot, torch.Size]  # sorted by slot
    ranks: tuple[int, ...] | None = None  # of each client; None: all have the adapter's

    @classmethod
    def of(
        cls,
        starts: Sequence[Mapping[Slot, Tensor]],
        *,
        ranks: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Stack":
        """Stack the clients' starting values, of equal shapes; what lies beyond a client's rank becomes zero.

        Raises:
            ValueError: for ranks that do not fit.
        """
        most = max((min(t.shape) for slot, t in starts[0].items() if slot.role != HEAD), default=0)
        if ranks is not None and (len(ranks) != len(starts) or not all(1 <= rank <= most for rank in ranks)):
            raise ValueError(f"Expected a rank in [1, {most}] for each of {len(starts)} clients, got {list(ranks)}")
        shapes = {slot: starts[0][slot].shape for slot in sorted(starts[0])}
        rows = [torch.cat([start[slot].detach().flatten().float() for slot in shapes]) for start in starts]
        stack = cls(torch.stack(rows).to(device), shapes, None if ranks is None else tuple(ranks))
        for client, rank in enumerate(stack.ranks or ()):
            for slot, view in stack.by_slot().items():
                beyond(view[client], slot, rank).zero_()
        return stack

    def by_slot(self, rows: Tensor | None = None) -> dict[Slot, Tensor]:
        """Return views (C, ...) of each slot's tensors, or of what else `rows` (C, V) holds of them."""
        parts = (self.theta if rows is None else rows).split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {slot: part.unflatten(1, shape) for (slot, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def tensors(self, client: int) -> dict[Slot, Tensor]:
        """Return copies of one client's tensors, of its own rank, on the CPU."""
        rows = {slot: view[client] for slot, view in self.by_slot().items()}
        own = narrowed(rows, None if self.ranks is None else self.ranks[client])
        return {slot: row.to("cpu", copy=True, memory_format=torch.contiguous_format) for slot, row in own.items()}


def train_cohort(
    sums: FusedSums,
    threads: Executor,
    stack: Stack,
    shares: Sequence[Share],
    *,
    training: LocalTraining,
    mechanism: Mechanism | None,
    randomness: Randomness,
    client_ids: Sequence[int],
    round_index: int,
    inputs: RuleInputs | None = None,
) -> int:
    """Take `num_steps` noised steps of each client from the values in `stack`, in place.

    Args:
        sums: clipped sums of a micro-batch; called from `threads`.
        threads: what runs micro-batches and noise side by side.
        stack: the clients' trained tensors.
        shares: each client's private rows, of one table; a client without rows is fine.
        training, mechanism, randomness, round_index: as in `fedlr.training.local.train_client`.
        client_ids: part of the keys of each client's streams.
        inputs: what the rule of the method reads; its memory is replaced.

    Returns:
        The number of steps each client took, always `training.num_steps`.

    Raises:
        InputError: before any row is read, if mechanism, steps and optimizer do not fit together.

    Guarantees:
        As `train_client`, for each client by itself: what leaves of a client is a function of `num_steps` Gaussian sums
        over its own rows, whose noise is drawn from its own streams. An empty batch is a step like any other.
    """
    check_training(training, mechanism)
    check_elementwise(training.optimizer)
    table = shares[0].table
    if any(share.table is not table for share in shares):
        raise ValueError("Expected the shares of a cohort to be rows of one table, got several tables")
    max_grad_norm = math.inf if mechanism is None else mechanism.max_grad_norm
    theta = nn.Parameter(stack.theta, requires_grad=False)  # the optimizer writes into the stack
    optimizer = training.optimizer_of([theta], round_index=round_index)
    rule, inputs, slots = training.rule, inputs or RuleInputs(), frozenset(stack.shapes)
    start = stack.by_slot(stack.theta.clone()) if rule.changes else {}
    for step in range(training.num_steps):
        keys = [{"client": client, "round_index": round_index, "step": step} for client in client_ids]
        drawn = [
            share.rows[training.sampler.draw(len(share), randomness.sampling(**key))]
            for share, key in zip(shares, keys, strict=True)
        ]
        active = frozenset(slot for slot in slots if in_block(slot, rule.active(step, slots)))
        total = sum_over_cohort(
            sums,
            threads,
            stack,
            table,
            drawn,
            token_budget=training.token_budget,
            max_grad_norm=max_grad_norm,
            active=active,
        )
        if mechanism is not None:
            noises = [randomness.noise(**key) for key in keys]
            privatise_rows(total, stack, mechanism=mechanism, generators=noises, threads=threads, active=active)
        total.div_(training.divisor)
        if rule.changes:
            point = inputs.at(step, training.num_steps, values=stack.by_slot(), start=start)
            _overwrite(stack, total, rule(stack.by_slot(total), point))
        theta.grad = total
        optimizer.step()
    if rule.remembers:
        last = inputs.at(training.num_steps, training.num_steps, values=stack.by_slot(), start=start)
        inputs.memory.update(rule.remember(last))
    return training.num_steps


def _overwrite(stack: Stack, total: Tensor, gradient: Mapping[Slot, Tensor]) -> None:
    """Write what a rule made of the gradients into their rows; a client has nothing beyond its rank."""
    changed = {slot: value.clone() for slot, value in gradient.items()}  # a rule may give back views of the rows
    for slot, view in stack.by_slot(total).items():
        view.copy_(changed[slot])
        for client, rank in enumerate(stack.ranks or ()):
            beyond(view[client], slot, rank).zero_()


def sum_over_cohort(
    sums: FusedSums,
    threads: Executor,
    stack: Stack,
    table: Examples,
    drawn: Sequence[NDArray[np.int64]],
    *,
    token_budget: int,
    max_grad_norm: float,
    active: frozenset[Slot] | None = None,
) -> Tensor:
    """Return the sum of each client's (clipped) gradients over the rows it drew, (C, V); zeros for no rows.

    Only the `active` tensors (None: all) are clipped, jointly, and summed; the others' sums are zero.

    Privacy: raw data go in and the result is private; a client's row moves by at most C when one of its rows is added
    or removed.
    """
    stacks = stack.by_slot()
    device = stack.theta.device
    ranks = None if stack.ranks is None else torch.tensor(stack.ranks, device=device)
    rows, owners = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(mine) for mine in drawn])

    def part(places: NDArray[np.int64]) -> ClippedSums:
        batch = table.batch(rows[places]).to(device)
        owner = torch.from_numpy(owners[places])
        return sums(
            batch,
            owner=owner,
            stacks=stacks,
            max_grad_norm=max_grad_norm,
            ranks=ranks,
            active=None if active == frozenset(stacks) else active,
        )

    total = torch.zeros_like(stack.theta)
    for found in in_order(threads, part, micro_batches(table.lengths[rows], np.arange(len(rows)), token_budget)):
        found.add_to(total)
    return total


def privatise_rows(
    total: Tensor,
    stack: Stack,
    *,
    mechanism: Mechanism,
    generators: Sequence[Draws],
    threads: Executor,
    active: frozenset[Slot] | None = None,
) -> None:
    """Add Gaussian noise of standard deviation `noise_multiplier` * C to every entry of each client's sum, in place;
    of tensors that are not `active` (None: all are) the sums are zero, and stay so.

    Each client's noise is drawn from its own generator, one draw a slot in the order of the slots, and has the shape of
    what that client trains: the same numbers as `fedlr.training.local.privatise` draws.

    Privacy: the only way for the sums of a cohort to leave a step.
    """
    std = mechanism.noise_multiplier * mechanism.max_grad_norm
    by_slot = stack.by_slot(total)

    def add(client: int) -> None:
        grid = mechanism.grid(total.shape[1])  # of all that trains: more values than are noised only make it finer
        for slot, rows in by_slot.items():
            if active is None or slot in active:
                own = rows[client] if stack.ranks is None else within(rows[client], slot, stack.ranks[client])
                if grid is None:
                    own += gaussian_noise(own.shape, std=std, generator=generators[client]).to(own.device)
                else:
                    own.copy_(on_grid(own, grid, generator=generators[client]))

    deque(threads.map(add, range(len(total))), maxlen=0)


def in_order(
    threads: Executor, work: Callable[[NDArray[np.int64]], ClippedSums], pieces: Sequence[NDArray[np.int64]]
) -> Iterator[ClippedSums]:
    """Work on the pieces side by side and yield the results in the order of the pieces.

    No more than `AHEAD` results wait at a time: the memory that they take does not tell how many rows were drawn. If
    one fails, the others are called off or waited for, and its error is raised.
    """
    rest = iter(pieces)
    waiting = deque(threads.submit(work, piece) for piece in islice(rest, AHEAD))
    try:
        while waiting:
            found = waiting.popleft().result()
            waiting.extend(threads.submit(work, piece) for piece in islice(rest, 1))
            yield found
    finally:
        for future in [future for future in waiting if not future.cancel()]:
            future.exception()


def check_elementwise(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Refuse an optimizer whose update of one client could read another's.

    Raises:
        InputError: naming it and what serves it.
    """
    made = optimizer([nn.Parameter(torch.zeros(1))])
    if not isinstance(made, ELEMENTWISE):
        known = ", ".join(sorted(kind.__name__ for kind in ELEMENTWISE))
        raise InputError(
            f"Expected a trainer.optimizer that works entry by entry ({known}) for trainer.engine=fused, got "
            f"{type(made).__name__}; set trainer.engine=opacus"
        )
