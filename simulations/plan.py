"""What an experiment will spend, said before it runs: epsilon, bytes, memory and time.

Time and memory are measured, not guessed: one client's step on held-out text, and one evaluation, on this machine.
"""

import resource
import statistics
import time
from contextlib import closing
from dataclasses import replace
from secrets import randbits

import numpy as np

from fedlr.experiment import Experiment
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds import RoundTask, sample_cohort
from fedlr.wire import num_bytes
from simulations.federation import Federation, assemble
from simulations.progress import alone_rounds
from simulations.simulate import Evaluator, make_pool

MEGABYTE = 1e6


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
    for round_index in range(e.num_rounds):
        cohort = sample_cohort(
            seed=federation.seed,
            round_index=round_index,
            num_clients=e.num_clients,
            cohort_size=e.cohort_size,
            max_participations=e.max_participations,
        )
        participations[list(cohort)] += 1
    event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier)

    def spent(rounds: int) -> float:
        steps = [(event, rounds * federation.training.num_steps)] if rounds else []
        return epsilon(steps, budget.delta, accountant=e.privacy.accountant)

    expected = round(e.num_rounds * e.cohort_size / e.num_clients)
    most = int(participations.max())
    return [
        f"noise       multiplier {mechanism.noise_multiplier:g}, clip {mechanism.max_grad_norm:g}, "
        f"sample rate {mechanism.sample_rate:g}, {federation.training.num_steps} steps a round",
        f"epsilon     {spent(expected):.3f} for a client in {expected} rounds (expected participation)",
        f"            {spent(most):.3f} for the busiest client of this seed's draw, in {most} rounds",
        f"            {spent(e.max_participations):.3f} in {e.max_participations} rounds (worst case); "
        f"budget {budget.epsilon:g} at delta {budget.delta:g}",
    ]


def traffic_lines(federation: Federation) -> list[str]:
    """Say what each client sends and receives in the first round, and all of them in the run."""
    e, adapter = federation.experiment, federation.start.adapter
    block = federation.block(0)
    up = num_bytes(adapter.select(block).values())
    down = num_bytes(federation.method.broadcast(adapter, block).values())
    asked = e.num_rounds * e.cohort_size
    return [
        f"bytes       {up / 1e3:.1f} kB up and {down / 1e3:.1f} kB down a client and round; "
        f"{asked * up / MEGABYTE:.1f} MB and {asked * down / MEGABYTE:.1f} MB in all",
        f"adapter     {federation.num_trained_values:,} trained values, rank {e.adapter.rank}",
    ]


def cost_lines(federation: Federation) -> list[str]:
    """Measure a step and an evaluation, and say what the run costs in time and memory."""
    e = federation.experiment
    step_s = measure_step(federation)
    _, evaluate_s = Evaluator(federation).score(federation.start)
    client_rounds = e.num_rounds * e.cohort_size
    arms = 1 + int(e.tracking.run_no_privacy and federation.mechanism is not None)
    alone = e.num_clients * alone_rounds(e) if e.tracking.run_alone else 0
    evaluations = arms * (e.num_rounds + 1) + (e.num_clients if e.tracking.run_alone else 0)
    steps = (arms * client_rounds + alone) * federation.training.num_steps
    total = steps * step_s / e.runtime.num_workers + evaluations * evaluate_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
    return [
        f"time        about {total / 60:.1f} minutes here: {steps} steps of {step_s:.2f} s in {e.runtime.num_workers} "
        f"workers, {evaluations} evaluations of {evaluate_s:.1f} s",
        f"memory      {peak:,.0f} MB at its peak while this plan was measured",
    ]


def measure_step(federation: Federation) -> float:
    """Return the seconds of one private step of an average client, on held-out text: no client's data are read."""
    expected = (
        statistics.fmean(len(client) for client in federation.clients) * federation.experiment.trainer.sample_rate
    )
    rows = np.arange(max(1, round(expected))) % len(federation.test)
    everything = replace(federation.training, num_steps=1, sampler=PoissonSampler(1.0))
    probe = replace(
        federation.without_privacy(),
        clients=(federation.test.subset(rows),),
        training=everything,
        weights=(1.0,),
    )
    block = federation.block(0)
    task = RoundTask(0, federation.method.broadcast(federation.start.adapter, block), block)
    with closing(make_pool(probe, None)) as pool:
        list(pool.train(task, [0]))  # the first step pays for what later ones find ready
        started = time.perf_counter()
        list(pool.train(task, [0]))
        return time.perf_counter() - started
