"""What an experiment will spend, said before it runs: epsilon, bytes, memory and time.

Time and memory are measured, not guessed: one client's step on held-out text, and one evaluation, on this machine.
"""

import math
import resource
import statistics
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from secrets import randbits

import numpy as np

from fedlr.adapter import SHIPPED, num_values, roles_of
from fedlr.client_ranks import narrowed
from fedlr.cohorts import cohorts
from fedlr.data.tokenise import Share
from fedlr.experiment import Experiment
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.sampling import PoissonSampler
from fedlr.report.wording import epsilon_text
from fedlr.wire import num_bytes
from simulations.federation import Federation, assemble
from simulations.progress import alone_rounds
from simulations.runtime import make_pool
from simulations.simulate import evaluator_of


def make_plan(experiment: Experiment) -> str:
    """Return the plan as text; nothing is written and no budget is spent.

    Raises:
        InputError: for an experiment that cannot run.
    """
    federation = assemble(experiment, seed=randbits(32) if experiment.seed is None else experiment.seed)
    e = experiment
    title = (
        f"{e.name}: {federation.method.name}, {e.num_rounds} rounds, {e.cohort_size} of {e.num_clients} clients each"
    )
    return "\n".join(
        [
            title,
            *federation.notes,
            *privacy_lines(federation),
            *traffic_lines(federation),
            *cost_lines(federation),
        ]
    )


def privacy_lines(federation: Federation) -> list[str]:
    """Say what the clients spend if they take part as drawn, and if they take part as often as they may."""
    mechanism, budget, e = federation.mechanism, federation.budget, federation.experiment
    if mechanism is None or budget is None:
        return ["privacy     none: epsilon is infinite"]
    participations = np.zeros(e.num_clients, dtype=int)
    draws = cohorts(
        seed=federation.seed,
        num_clients=e.num_clients,
        cohort_size=e.cohort_size,
        max_participations=e.max_participations,
    )
    for cohort in islice(draws, e.num_rounds):
        participations[list(cohort)] += 1
    event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier)

    def spent(rounds: int) -> float:
        steps = [(event, rounds * federation.training.num_steps)] if rounds else []
        return epsilon(steps, budget.delta, accountant=e.privacy.accountant)

    expected = math.ceil(e.num_rounds * e.cohort_size / e.num_clients)
    busiest = int(participations.max())
    whose = "a draw of cohorts" if e.seed is None else f"the cohorts of seed {e.seed}"
    lines = [
        f"noise       multiplier {mechanism.noise_multiplier:g}, clip {mechanism.max_grad_norm:g}, "
        f"sample rate {mechanism.sample_rate:g}, {federation.training.num_steps} steps a round",
        f"epsilon     {epsilon_text(spent(expected))} expected: a client trains in about {expected} of "
        f"{e.num_rounds} rounds",
        f"            {epsilon_text(spent(busiest))} for the busiest client in {whose}: {busiest} rounds",
        f"            {epsilon_text(spent(e.max_participations))} worst case: {e.max_participations} rounds, the "
        f"most that one client may train in; budget {budget.epsilon:g} at delta {budget.delta:g}",
    ]
    if spent(e.max_participations) > budget.epsilon:
        lasting = max(n for n in range(e.max_participations) if spent(n) <= budget.epsilon)
        lines.append(f"            the budget lasts for {lasting} rounds of a client; after them it refuses to train")
    return lines


def traffic_lines(federation: Federation) -> list[str]:
    """Say what each client sends and receives in the first round, and all of them in the run."""
    e, adapter = federation.experiment, federation.start.adapter
    task = federation.task()
    ranks = federation.ranks or (None,)  # a mean over clients of different ranks
    up = round(statistics.fmean(num_bytes(narrowed(adapter.select(task.shared), rank).values()) for rank in ranks))
    down = round(statistics.fmean(task.num_bytes(rank) for rank in ranks))
    a_round = (e.cohort_size * up, e.cohort_size * down)
    # What is folded into the base, or keeps clients from drifting, goes down from later rounds on.
    least = "at least " if federation.method.folds or federation.training.rule.remembers else ""
    return [
        f"adapter     {federation.num_trained_values:,} trained values, {places(federation)}",
        f"bytes       {size(up)} up and {size(down)} down for a client in a round",
        f"            {size(a_round[0])} up and {size(a_round[1])} down a round, "
        f"{size(e.num_rounds * a_round[0])} and {least}{size(e.num_rounds * a_round[1])} in all {e.num_rounds}",
    ]


def places(federation: Federation) -> str:
    """Say where the trained values are; of another system than LoRA also what each client is given once."""
    adapter, config = federation.start.adapter, federation.experiment.adapter
    if layers := adapter.factors():
        return f"rank {config.rank}, on {len(layers)} layers"
    blocks = ", ".join(sorted(roles_of(federation.task().block)))
    shipped = num_values(adapter.select(frozenset({SHIPPED})).values())
    return f"{blocks}, and {shipped:,} frozen ones that each client is given once"


def cost_lines(federation: Federation) -> list[str]:
    """Measure a step and an evaluation, and say what the run costs in time and memory."""
    e = federation.experiment
    step_s = measure_step(federation)
    _, evaluate_s = evaluator_of(federation).score(federation.start)
    client_rounds = e.num_rounds * e.cohort_size
    arms = 1 + int(e.tracking.run_no_privacy and federation.mechanism is not None)
    alone = e.num_clients * alone_rounds(e) if e.tracking.run_alone else 0
    evaluations = arms * (e.num_rounds + 1) + (e.num_clients if e.tracking.run_alone else 0)
    steps = (arms * client_rounds + alone) * federation.training.num_steps
    total = steps * step_s / e.runtime.num_workers + evaluations * evaluate_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kB
    return [
        f"time        about {duration(total)} here: {steps:,} steps of {duration(step_s)} in {e.runtime.num_workers} "
        f"workers, {evaluations} evaluations of {duration(evaluate_s)}",
        f"memory      {size(peak)} at its peak while this was measured, and about the same in the run",
    ]


def size(num_bytes: float) -> str:
    """Write a number of bytes in the largest unit that keeps it at 1 or more.

    >>> size(512), size(18_432), size(1.5e9)
    ('512 B', '18.4 kB', '1.5 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Write seconds in the unit a person would use.

    >>> duration(0.012), duration(4.2), duration(600), duration(9000)
    ('12 ms', '4.2 s', '10.0 min', '2.5 h')
    """
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def measure_step(federation: Federation) -> float:
    """Return the seconds of one private step of an average client, on held-out text: no client's data are read."""
    expected = (
        statistics.fmean(len(client) for client in federation.clients) * federation.experiment.trainer.sample_rate
    )
    rows = np.arange(max(1, round(expected))) % len(federation.test)
    everything = replace(federation.training, num_steps=1, sampler=PoissonSampler(1.0))
    probe = replace(
        federation.without_privacy(),
        clients=(Share.whole(federation.test.subset(rows)),),
        training=everything,
        weights=(1.0,),
    )
    task = federation.task()
    with closing(make_pool(probe, None)) as pool:
        list(pool.train(task, [0]))  # the first step pays for what later ones find ready
        started = time.perf_counter()
        list(pool.train(task, [0]))
        return time.perf_counter() - started
