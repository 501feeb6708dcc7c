"""The one-run audit: rows put into training by fair coins, and guessed from what the clients released.

All rows of the federation under audit are canaries, at the clients that hold them. The run is a real one: cohorts,
ledger, pools, aggregation, finaliser. The auditor stands where a curious server stands: it sees what each round sends
out and what each client sends back, knows every canary, and not the coins (Steinke, Nasr and Jagielski 2023, algorithm
1).

How it guesses: a client's update of a round carries, in known noise, the clipped gradients of the canaries that are in.
The best linear estimate of the coins, given all gradients at the model that was sent, scores each canary; the scores of
all rounds add up. Where the optimizer is not linear or steps start elsewhere, the estimate is worse and the bound
lower, never wrong.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlr.adapters.client_ranks import widened
from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.privacy.audit.one_run import epsilon_lower_bound, num_correct
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.local import Charges
from fedlr.rounds.round import ClientPool, Dropout, RoundRequest
from fedlr.simulations.audit.probe import Probe, noiseless, vectors
from fedlr.simulations.federation import Federation
from fedlr.simulations.rounds import rounds_of
from fedlr.simulations.runtime import pool_here
from fedlr.tasks.examples import Share
from fedlr.training.noise import update_noise

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OneRun:
    """What came of the guesses of one run."""

    num_canaries: int
    num_guesses: int
    num_correct: int
    num_rounds: int
    epsilon: float  # accounted
    delta: float

    @property
    def lower_bound(self) -> float:
        """Return the epsilon that the run refutes with 95 % confidence."""
        return self._bound(self.num_correct)

    @property
    def most(self) -> float:
        """Return the bound if every guess were right: where it is below epsilon, this audit cannot fail."""
        return self._bound(self.num_guesses)

    def _bound(self, correct: int) -> float:
        return epsilon_lower_bound(
            correct, num_guesses=self.num_guesses, num_canaries=self.num_canaries, delta=self.delta
        )


class Watched:
    """A pool whose tasks and updates of the latest round somebody writes down."""

    def __init__(self, pool: ClientPool) -> None:
        self._pool = pool
        self.task: RoundRequest | None = None
        self.updates: list[ClientUpdate] = []

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield the outcomes of the pool."""
        self.task = task
        self.updates.clear()
        for outcome in self._pool.train(task, cohort):
            if isinstance(outcome, ClientUpdate):
                self.updates.append(outcome)
            yield outcome


def guess_canaries(
    f: Federation,
    *,
    accounted: Mechanism,
    ledger: Charges,
    spent: Callable[[], float],
    guessed: float,
    generator: np.random.Generator,
) -> OneRun:
    """Train with a random half of the rows, guess which half, and return how many guesses were right.

    Args:
        f: the federation under audit; all its rows are canaries.
        accounted: what its ledger is told of a step.
        ledger: is charged for the rounds.
        spent: returns the epsilon of the client that spent most, after training.
        guessed: share of the canaries on which a guess is made, fixed beforehand; the auditor abstains from the others.
        generator: of the coins.

    Privacy: the count of right guesses is computed from rows in the clear. Nothing of it may be shown of rows that are
    not public.
    """
    rows = np.concatenate([client.rows for client in f.clients])
    owners = np.repeat(np.arange(len(f.clients)), [len(client) for client in f.clients])
    included = generator.random(len(rows)) < 0.5
    assert f.mechanism is not None and f.budget is not None
    table = f.clients[0].table
    halves = tuple(Share(table, rows[included & (owners == client)]) for client in range(len(f.clients)))
    scores = np.zeros(len(rows))
    trained = replace(f, clients=halves)
    e = f.experiment
    each = [Share(table, rows[[place]]) for place in range(len(rows))]
    with (
        closing(pool_here(trained, ledger)) as pool,
        Probe(f, each, mechanism=noiseless(f.mechanism), whole_batches=True) as probe,
    ):
        watched = Watched(pool)
        for _ in rounds_of(f, f.start, watched):
            assert watched.task is not None
            sent = replace(watched.task, ranks={})
            for update in watched.updates:
                canaries = np.flatnonzero(owners == update.client_id)
                if len(canaries):
                    gradients = clipped_gradients(probe, sent, canaries, f.start.adapter, accounted=accounted)
                    released = released_sum(f, sent, update, accounted=accounted)
                    scores[canaries] += estimated_coins(gradients, released, f=f, accounted=accounted)
    num_guesses = max(1, round(guessed * len(rows)))
    # A canary that is in may be in no batch: only who is seen is worth a guess.
    num_out = num_guesses // 2 if accounted.sample_rate == 1 else 0
    return OneRun(
        num_canaries=len(rows),
        num_guesses=num_guesses,
        num_correct=num_correct(scores, included, num_in=num_guesses - num_out, num_out=num_out),
        num_rounds=e.num_rounds,
        epsilon=spent(),
        delta=f.budget.delta,
    )


def clipped_gradients(
    probe: Probe, task: RoundRequest, canaries: NDArray[np.int64], enrolled: AdapterState, *, accounted: Mechanism
) -> Floats:
    """Return each canary's gradient as the client clips it, (m, V), in units of C: at the model that was sent, of what
    is sent back."""
    answer = probe.train(task=task, clients=canaries.tolist())
    shared = enrolled.select(task.shared)
    step = answer.steps[0]
    zeros = {slot: torch.zeros(len(canaries), *shared[slot].shape) for slot in shared if slot not in step}
    found = {slot: {**step, **zeros}[slot] for slot in sorted(shared)}
    return vectors(found) / accounted.max_grad_norm


def released_sum(f: Federation, task: RoundRequest, update: ClientUpdate, *, accounted: Mechanism) -> Floats:
    """Return what a client released in a round as a sum of clipped gradients in noise, (V,), in units of C.

    An update of plain SGD is such a sum times a known number. Of any other optimizer it is taken as one whose noise has
    the size of all of it.
    """
    shared = f.start.adapter.overlaid(task.broadcast).select(task.shared)
    tensors: Mapping[Slot, Tensor] = widened(update, shared).tensors
    moved = torch.cat([(shared[slot] - tensors[slot]).double().flatten() for slot in sorted(shared)]).numpy()
    unit = update_noise(f.training, accounted) or float(np.sqrt(np.mean(np.square(moved)))) or 1.0
    return np.asarray(moved / unit * accounted.noise_multiplier * np.sqrt(f.training.num_steps))


def estimated_coins(gradients: Floats, released: Floats, *, f: Federation, accounted: Mechanism) -> Floats:
    """Return the best linear estimate of each canary's coin less a half, (m,), from one released sum.

    A canary is in each of T steps with probability q if its coin says in, so its count has mean T q / 2 and variance
    T q (1 - q) / 2 + (T q)^2 / 4, of which the coin explains the second part.

    Args:
        gradients: (m, V), clipped, in units of C.
        released: (V,), in units of C.
    """
    often = f.training.num_steps * accounted.sample_rate
    variance = often * (1 - accounted.sample_rate) / 2 + often**2 / 4
    most = f.training.num_steps * accounted.noise_multiplier**2
    scales, directions = np.linalg.eigh(gradients @ gradients.T)
    scales = np.maximum(scales, 0.0)
    seen = released - often / 2 * gradients.sum(axis=0)
    along = directions.T @ (gradients @ seen)
    noise = likeliest_noise(most, variance * scales, along, scales, energy=float(seen @ seen), size=seen.size)
    return np.asarray(often / 4 * directions @ (along / (variance * scales + noise)))


def likeliest_noise(
    most: float, variances: Floats, along: Floats, scales: Floats, *, energy: float, size: int
) -> float:
    """Return which of some variances of the noise explains a released sum best: the accounted one, or one far below.

    An auditor who trusted the accounted noise would not see canaries that lie too close together for it, and are plain
    to see where the noise is missing. The coins have no part in the choice.
    """
    real = scales > 1e-9 * scales.max(initial=1e-30)
    inside = np.square(along[real]) / scales[real]
    outside = max(0.0, energy - float(inside.sum()))

    def log_likelihood(noise: float) -> float:
        total = variances[real] + noise
        left = (size - int(real.sum())) * np.log(noise) + outside / noise
        return -float(np.sum(np.log(total) + inside / total) + left)

    return max((most * 10.0**-power for power in range(0, 11)), key=log_likelihood) if most else 1e-9
