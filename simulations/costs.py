"""What a run will cost in time and memory: an estimate from a few texts that are measured on this machine.

Only held-out texts are measured, at most `MOST_MEASURED` of them, spread evenly over their lengths. What the run does
with more of them, or with clients' rows of another mean length, is taken to cost as much a token. That mean is of
private rows, and no epsilon covers an estimate that is passed on. No file is written, and no state of a frozen layer is
kept.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlr.adapters.state import num_bytes
from fedlr.config.auto_rates import alone_rounds
from fedlr.data.store import TableStore
from fedlr.models.base_delta import SideWeights
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.evaluate import MOST_SCORED, Evaluator
from fedlr.rounds.pools.fused import bytes_a_client, group_size
from fedlr.runs.prepare import past_frozen, state_store, whole_and_working
from fedlr.simulations.federation import Federation
from fedlr.simulations.runtime import pool_here
from fedlr.tasks.examples import Examples, Share
from fedlr.training.threads import torch_threads

MOST_MEASURED = 64
REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """Seconds that a piece of work took here, and how many times as many tokens the run's own piece has.

    >>> Measured(2.0, scale=5.0, fixed=0.5).of_the_run
    8.0
    """

    seconds: float
    scale: float = 1.0
    fixed: float = 0.0  # of the seconds, those that depend on no token

    @property
    def of_the_run(self) -> float:
        """Seconds of the run's own piece."""
        return self.fixed + (self.seconds - self.fixed) * self.scale


@dataclass(frozen=True)
class Costs:
    """What was measured, on one thread unless said otherwise."""

    num_texts: int  # that were measured
    num_tokens: int
    prefix: Measured | None  # all texts through the frozen layers, once; None: they are part of every step
    step: Measured  # of one client
    evaluation: Measured  # with the run's threads
    state_bytes: int  # of a token past the frozen layers, or of a text past all of them; 0 where they are not cached
    peak_bytes: int  # of this process


def measure(prepared: Federation) -> Costs:
    """Measure the texts of a micro-step, of an evaluation and of the frozen layers.

    Args:
        prepared: a federation of which no text has passed the model.
    """
    f, e = prepared, prepared.experiment
    few = spread(f.test, min(MOST_MEASURED, len(f.test)))
    with torch_threads(1):
        whole, working = whole_and_working(e.runtime, f.model, features=f.caches_features)
        measured_tokens = int(few.lengths.sum())
        prefix, state_bytes = None, 0
        if e.runtime.cache_prefix:
            started = time.perf_counter()
            few = past_frozen(whole, few, f.caches_features, num_threads=1, store=TableStore())
            hidden: NDArray[Any] = getattr(few, "hidden")  # noqa: B009  # of texts and of pictures
            prefix = Measured(time.perf_counter() - started, num_tokens(f) / measured_tokens)
            state_bytes = hidden.itemsize * hidden.shape[-1]
        probe = replace(f, working=working, side=SideWeights(working), test=few)
        step = measure_step(probe)
        evaluation = measure_evaluation(probe, num_tokens=num_states(f, f.test))
    return Costs(
        num_texts=len(few),
        num_tokens=measured_tokens,
        prefix=prefix,
        step=step,
        evaluation=evaluation,
        state_bytes=state_bytes,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in kB
    )


def measure_step(probe: Federation) -> Measured:
    """Measure a step of an average client on one thread, on held-out text.

    Of the clients' rows their number and mean length count (`longer_rows`), so the estimate depends on both: it is
    printed here and sent nowhere.
    """
    e = probe.experiment
    expected = max(1.0, statistics.fmean(len(client) for client in probe.clients) * e.trainer.sample_rate)
    rows = min(MOST_MEASURED, round(expected))
    runtime = e.runtime.model_copy(update={"num_workers": 1, "num_processes": 1})
    one = replace(
        probe.without_privacy(),
        experiment=e.model_copy(update={"runtime": runtime}),
        clients=(Share.whole(spread(probe.test, rows)),),
        training=replace(probe.training, num_steps=1, sampler=PoissonSampler(1.0)),
        weights=(1.0,),
    )
    task = probe.request()
    with closing(pool_here(one, None)) as pool:
        seconds = fastest(lambda: list(pool.train(task, [0])))
    return Measured(seconds, expected / rows * longer_rows(probe, one.clients[0]))


def longer_rows(probe: Federation, measured: Share) -> float:
    """Return how many times as long the clients' rows are as those that were measured; 1 where rows are features."""
    table = probe.clients[0].table
    if probe.caches_features or not len(table):
        return 1.0
    return float(table.lengths.mean() / measured.table.lengths[measured.rows].mean())


def readings(federation: Federation) -> float:
    """Return how often a row of a client is read in training, on average."""
    e = federation.experiment
    return e.num_rounds * e.cohort_size * federation.training.num_steps * e.trainer.sample_rate / e.num_clients


def measure_evaluation(probe: Federation, *, num_tokens: int) -> Measured:
    """Measure an evaluation with the run's threads: what it costs with one text, and what the others add."""

    def seconds(test: Examples) -> float:
        num_threads = probe.experiment.runtime.num_workers
        evaluator = Evaluator(probe.working, test, task=probe.task, side=probe.side, num_threads=num_threads)
        return fastest(lambda: evaluator.score(probe.start))

    of_all, of_one = seconds(probe.test), seconds(spread(probe.test, 1))
    return Measured(of_all, num_tokens / int(probe.test.lengths.sum()), fixed=min(of_one, of_all))


def fastest(work: Callable[[], object]) -> float:
    """Return the least seconds of some runs of the same work: the first finds nothing ready, any may be disturbed."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def spread(data: Examples, num_texts: int) -> Examples:
    """Return so many texts, spread evenly over the lengths; some twice where there are fewer."""
    by_length = np.argsort(data.lengths, kind="stable")
    return data.subset(by_length[((np.arange(num_texts) + 0.5) * len(data) / num_texts).astype(np.int64)])


def num_texts(federation: Federation) -> int:
    """Return how many texts pass the frozen layers: those of all clients, and the held-out ones."""
    return len(federation.clients[0].table) + len(federation.test)


def num_tokens(federation: Federation) -> int:
    """Return how many tokens `num_texts` have."""
    return int(federation.clients[0].table.lengths.sum() + federation.test.lengths.sum())


def num_states(federation: Federation, table: Examples) -> int:
    """Return how many rows a table has in a cache: its tokens, or its texts where features are cached."""
    return len(table) if federation.caches_features else int(table.lengths.sum())


def num_passes(federation: Federation) -> int:
    """Return how many times each text passes the frozen layers: once, unless processes share no folder."""
    runtime = federation.experiment.runtime
    return 1 if runtime.num_processes == 1 or runtime.cache_dir else 1 + runtime.num_processes


def num_steps(federation: Federation) -> int:
    """Return the steps of all clients, baselines included."""
    e = federation.experiment
    alone = e.num_clients * alone_rounds(e) if e.tracking.run_alone else 0
    together = e.num_rounds * e.num_clients if e.tracking.run_centralised else 0  # a step of one with all rows
    return (num_arms(federation) * e.num_rounds * e.cohort_size + together + alone) * federation.training.num_steps


def num_evaluations(federation: Federation) -> int:
    """Return how often the held-out texts are scored, baselines included."""
    e = federation.experiment
    models = min(MOST_SCORED, e.num_clients) if federation.method.personal else 1  # a client's own after its rounds
    alone = e.num_clients if e.tracking.run_alone else 0
    num_runs = num_arms(federation) + int(e.tracking.run_centralised)
    num_scored = -(-e.num_rounds // e.tracking.evaluate_every)  # the last round always is
    return num_runs * (1 + num_scored * models) + alone


def num_arms(federation: Federation) -> int:
    """Return how many times the rounds run: once, and once more without privacy if that is compared."""
    return 1 + int(federation.experiment.tracking.run_no_privacy and federation.experiment.privacy.is_private)


def num_threads(federation: Federation) -> int:
    """Return how many threads of the run can work at a time on this machine."""
    runtime = federation.experiment.runtime
    return min(runtime.num_workers * runtime.num_processes, len(os.sched_getaffinity(0)))


def state_places(federation: Federation, costs: Costs) -> tuple[int, int]:
    """Return the bytes of states in memory, and of those on a disk."""
    store = state_store(federation.experiment.runtime, say=lambda line: None)
    tables = [federation.clients[0].table, federation.test]
    sizes = [num_states(federation, table) * costs.state_bytes for table in tables]
    in_memory = sum(size for size in sizes if store.is_in_memory(size))
    return in_memory, sum(sizes) - in_memory


def cohort_bytes(federation: Federation) -> int:
    """Return what the clients that train at once need beside the one that was measured."""
    e = federation.experiment
    trained = federation.start.adapter.select(federation.request().block)
    has_rule = federation.training.rule.changes
    if e.trainer.engine != "fused":
        return (min(e.cohort_size, num_threads(federation)) - 1) * num_bytes(trained.values())
    at_once = min(e.cohort_size, group_size(trained, e.runtime.memory_gb, has_rule=has_rule))
    return (at_once - 1) * bytes_a_client(trained, has_rule=has_rule)
