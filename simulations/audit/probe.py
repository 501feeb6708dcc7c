"""Reads off what leaves each step of the real training path, just after the noise and before the optimizer.

The path is the one that a run takes: pools, engines, samplers, streams, `train_client` or `train_cohort`. A rule of
the clients (`fedlr.methods.client_rules.rule`) is handed every noised gradient, so a rule that writes down what it is
handed is all the instrument there is. A probe leaves the trained values where they are (its optimizer has rate 0), so
that every step of it starts from the same model; what optimizer and method's rule make of a noised gradient is
post-processing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlr.adapters.state import Block, ClientUpdate, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint
from fedlr.privacy.ledger import Refusal
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.round import RoundRequest
from fedlr.simulations.federation import Federation
from fedlr.simulations.runtime import pool_here
from fedlr.tasks.examples import Share

Step = dict[Slot, Tensor]  # of each trained tensor every client's noised sum, (C, ...)


class Unmetered:
    """Charges nobody: what a probe releases goes to the auditor alone."""

    def reserve(
        self, round_index: int, mechanism: Mechanism, num_steps: int, client_ids: Sequence[int], task: str | None = None
    ) -> Mapping[int, Refusal | None]:
        """Admit every client."""
        return dict.fromkeys(client_ids)

    def settle_all(self, round_index: int, steps_taken: Mapping[int, int]) -> None:
        """Write nothing down."""


class Tap(ClientRule):
    """Writes down every noised gradient of a group of clients, and hands it on unchanged."""

    def __init__(self, rule: ClientRule) -> None:
        """Train in each step what `rule`, the method's, would."""
        self._rule, self.alternates = rule, rule.alternates
        self.seen: list[Step] = []  # one a group and step

    def active(self, step: int, block: Block) -> Block:
        """Return what the method's rule trains in a step."""
        return self._rule.active(step, block)

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Write a gradient down; tensors that the step does not train are left out."""
        active = self.active(point.step, frozenset(gradient))
        self.seen.append(
            {slot: gradient[slot].detach().cpu().clone() for slot in sorted(gradient) if in_block(slot, active)}
        )
        return gradient


class Magnified:
    """A loss times a constant: gradients of any size, so that the clip is reached whatever the rows are."""

    def __init__(self, loss: Callable[..., Tensor], factor: float) -> None:
        """Take the loss of the run."""
        self._loss, self._factor = loss, factor

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        """Return the magnified losses, one an example."""
        return self._loss(*args, **keywords) * self._factor


@dataclass(frozen=True)
class Answer:
    """What a round of a probe gave: each step's noised sums, and what each client sent, in the order of the shares."""

    steps: list[Step]
    sent: list[Mapping[Slot, Tensor]]


class Probe:
    """A pool of clients that hold `shares`, and train as the federation's do.

    Args:
        f: the federation under audit.
        shares: of each client; any number of them, empty ones too.
        mechanism: clip and noise; a noise multiplier of 0 gives the bare clipped sums.
        whole_batches: take one step over all rows, in place of the configured steps over drawn ones.
        magnify: the loss, by this factor.
        lr: rate of plain SGD, in place of the configured optimizer.
    """

    def __init__(
        self,
        f: Federation,
        shares: Sequence[Share],
        *,
        mechanism: Mechanism,
        whole_batches: bool = False,
        magnify: float = 1.0,
        lr: float = 0.0,
    ) -> None:
        self._tap = Tap(f.training.rule)
        loss: Any = Magnified(f.training.loss, magnify) if magnify != 1 else f.training.loss
        training = replace(f.training, rule=self._tap, loss=loss, optimizer=partial(torch.optim.SGD, lr=lr))
        if whole_batches:
            training = replace(training, num_steps=1, sampler=PoissonSampler(1.0))
            mechanism = replace(mechanism, sample_rate=1.0)
        self._f = replace(
            with_plain_pool(f),
            clients=tuple(shares),
            training=training,
            mechanism=mechanism,
            weights=(1.0,) * len(shares),
        )
        self._pool = pool_here(self._f, Unmetered())

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *reason: object) -> None:
        """Stop the pool's threads."""
        self._pool.close()

    def train(
        self, round_index: int = 0, *, task: RoundRequest | None = None, clients: Sequence[int] | None = None
    ) -> Answer:
        """Train a round, and return what left its clients.

        Args:
            round_index: of the streams.
            task: what is asked; None: what the round asks of clients that start from the first adapter.
            clients: who is asked; None: all.
        """
        cohort = range(len(self._f.clients)) if clients is None else clients
        self._tap.seen.clear()
        outcomes = list(self._pool.train(task or self._f.request(round_index), cohort))
        updates = {one.client_id: one.tensors for one in outcomes if isinstance(one, ClientUpdate)}
        if len(updates) < len(cohort):
            raise InputError(f"Expected an update of every client that is probed, got {len(updates)} of {len(cohort)}")
        training = self._f.training
        seen = [{slot: t * training.divisor for slot, t in step.items()} for step in self._tap.seen]
        return Answer(list(_by_step(seen, training.num_steps)), [updates[client] for client in cohort])


def with_plain_pool(f: Federation) -> Federation:
    """Return the federation with pools whose clients come in order, and that compare nothing with Opacus.

    The fused engine trains groups of clients in order with any number of threads; the other engine, with one.
    """
    trainer = f.experiment.trainer.model_copy(update={"check_parity": False})
    runtime = f.experiment.runtime
    if trainer.engine == "opacus":
        runtime = runtime.model_copy(update={"num_workers": 1})
    return replace(f, experiment=f.experiment.model_copy(update={"trainer": trainer, "runtime": runtime}))


def _by_step(seen: Sequence[Step], num_steps: int) -> Iterator[Step]:
    """Put groups of clients together again: they were written down group after group, step after step."""
    for step in range(num_steps):
        groups = seen[step::num_steps]
        yield {slot: torch.cat([group[slot] for group in groups]) for slot in groups[0]}


def vectors(step: Step) -> np.ndarray:
    """Return what each client released in a step as a vector, (C, V), tensor after tensor in their order."""
    return torch.cat([t.flatten(1) for t in step.values()], dim=1).double().numpy()


def noiseless(mechanism: Mechanism) -> Mechanism:
    """Return a mechanism without its noise: for an auditor's own eyes."""
    return replace(mechanism, noise_multiplier=0.0)
