"""What an experiment will spend, said before it runs: epsilon, bytes, memory and time.

Epsilon and bytes are the run's own. Time and memory are an estimate, from a few texts that are measured here
(simulations/costs.py).
"""

import math
import statistics
from itertools import islice
from secrets import randbits

import numpy as np

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import SHIPPED, num_bytes, num_values, roles_of
from fedlr.config.language_rules import CAUSAL_LM
from fedlr.config.schema import Experiment
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.correlated import sum_noise
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.cohorts import cohorts
from fedlr.runs.recorder import held_out_labels, recipe_of
from fedlr.runs.report.wording import epsilon_text
from fedlr.runs.units import most_participations
from fedlr.runs.verdict import advice, least_told
from fedlr.simulations.client_unit import noise_as_of_one
from fedlr.simulations.costs import (
    Costs,
    cohort_bytes,
    measure,
    num_evaluations,
    num_passes,
    num_steps,
    num_texts,
    num_threads,
    readings,
    state_places,
)
from fedlr.simulations.federation import Federation, prepare
from fedlr.simulations.suggestion import rate_lines, suggestion_lines
from fedlr.training.threads import torch_threads


def make_plan(experiment: Experiment) -> str:
    """Return the plan as text; nothing is written and no budget is spent.

    Raises:
        InputError: for an experiment that cannot run.
    """
    with torch_threads(1):  # as in the run, whose start must be the same
        federation = prepare(experiment, seed=randbits(32) if experiment.seed is None else experiment.seed)
    e = federation.experiment
    title = (
        f"{e.name}: {federation.method.name}, {e.num_rounds} rounds, {e.cohort_size} of {e.num_clients} clients each"
    )
    return "\n".join(
        [
            title,
            *federation.notes,
            *learning_lines(federation),
            *privacy_lines(federation),
            *rate_lines(experiment, federation),
            *suggestion_lines(federation),
            *traffic_lines(federation),
            *cost_lines(federation),
        ]
    )


def learning_lines(federation: Federation) -> list[str]:
    """Say what would have to come out for the run to have learned, and what stands in its way already."""
    held_out = held_out_labels(federation.test.labels, federation.label_names)
    noise_sd = noise_as_of_one(federation)
    recipe = recipe_of(federation.experiment, head_is_drawn=federation.base.head_is_drawn, noise_sd=noise_sd)
    if not held_out.label_counts:
        return [
            f"learning    {held_out.num_rows:,} held-out rows, whose loss at the end must be below that at the start; "
            f"the score is {federation.task.metric.name}"
        ]
    least = least_told(held_out)
    told = "no accuracy would tell" if least is None else f"from {100 * least:.1f} % right on one can tell"
    lines = [
        f'learning    {held_out.num_rows:,} held-out rows, "{held_out.majority_label}" is '
        f"{100 * held_out.majority_share:.1f} % of them, a guess {100 * held_out.chance:.1f} %: {told} that it learned"
    ]
    return [*lines, *(f"            change first: {text}" for text in advice(held_out, recipe))]


def privacy_lines(federation: Federation) -> list[str]:
    """Say what the clients spend if they take part as drawn, and if they take part as often as they may."""
    mechanism, budget, e = federation.mechanism, federation.budget, federation.experiment
    of_clients = client_unit_lines(federation)
    if mechanism is None or budget is None:
        return of_clients or ["privacy     none: epsilon is infinite"]
    participations = np.zeros(e.num_clients, dtype=int)
    draws = cohorts(
        seed=federation.seed,
        num_clients=e.num_clients,
        cohort_size=e.cohort_size,
        max_participations=e.max_participations,
    )
    for cohort in islice(draws, e.num_rounds):
        participations[list(cohort)] += 1
    event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier, rows=e.privacy.rows_of_unit)

    def spent(rounds: int) -> float:
        steps = [(event, rounds * federation.training.num_steps)] if rounds else []
        return epsilon(steps, budget.delta, accountant=e.privacy.accountant)

    expected = math.ceil(e.num_rounds * e.cohort_size / e.num_clients)
    busiest = int(participations.max())
    whose = "a draw of cohorts" if e.seed is None else f"the cohorts of seed {e.seed}"
    lines = [
        f"noise       multiplier {mechanism.noise_multiplier:g}, clip {mechanism.max_grad_norm:g}, "
        f"sample rate {mechanism.sample_rate:g}, {federation.training.num_steps} steps a round",
        *(
            [f"unit        one person, of whom at most {e.privacy.rows_of_unit} rows are trained on"]
            if e.privacy.unit == "person"
            else []
        ),
        f"epsilon     {epsilon_text(spent(expected))} expected: a client trains in about {expected} of "
        f"{e.num_rounds} rounds",
        f"            {epsilon_text(spent(busiest))} for the busiest client in {whose}: {busiest} rounds",
        f"            {epsilon_text(spent(e.max_participations))} worst case: {e.max_participations} rounds, the "
        f"most that one client may train in; budget {budget.epsilon:g} at delta {budget.delta:g}",
    ]
    if spent(e.max_participations) > budget.epsilon:
        lasting = max(n for n in range(e.max_participations) if spent(n) <= budget.epsilon)
        lines.append(f"            the budget lasts for {lasting} rounds of a client; after them it refuses to train")
    return [*lines, *of_clients]


def client_unit_lines(federation: Federation) -> list[str]:
    """Say what the run spends of the server's budget for whole clients, and whom that trusts; nothing without one."""
    m, budget, e = federation.client_mechanism, federation.client_budget, federation.experiment
    if m is None or budget is None:
        return []
    event = PoissonSampler(m.sample_rate).dp_event(m.noise_multiplier)
    spent = epsilon([(event, most_participations(e))], budget.delta, accountant=e.privacy.accountant)
    drawn = f"each client joins by chance {m.sample_rate:g}" if m.sample_rate < 1 else "no amplification by sampling"
    if m.separation > 1:
        drawn += f"; each client joins once in {m.separation} rounds"
    if m.bands > 1:
        less = sum_noise(1, e.num_rounds) / sum_noise(m.bands, e.num_rounds)
        drawn += f"; noise of {m.bands} rounds is correlated, and {less:.2f} times smaller in the sum of rounds"
    then = f" at first, then to about the {m.clip_quantile:g} quantile of the norms" if m.clip_quantile else ""
    return [
        f"unit        one client: an update is clipped to {m.max_grad_norm:g}{then}, noise multiplier "
        f"{m.noise_multiplier:g} on the sum, divided by {m.divisor:g}; {drawn}",
        f"epsilon     {epsilon_text(spent)} of one client after {e.num_rounds} rounds; budget {budget.epsilon:g} at "
        f"delta {budget.delta:.3g}; the server is trusted, and sees updates in the clear",
    ]


def traffic_lines(federation: Federation) -> list[str]:
    """Say what each client sends and receives in the first round, and all of them in the run."""
    e, adapter = federation.experiment, federation.start.adapter
    task = federation.request()
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
    blocks = ", ".join(sorted(roles_of(federation.request().block)))
    shipped = num_values(adapter.select(frozenset({SHIPPED})).values())
    return f"{blocks}, and {shipped:,} frozen ones that each client is given once"


def cost_lines(federation: Federation) -> list[str]:
    """Measure a few texts, and say what the run costs in time and memory: an estimate."""
    e, costs = federation.experiment, measure(federation)
    threads, steps, evaluations = num_threads(federation), num_steps(federation), num_evaluations(federation)
    passes = num_passes(federation)
    prefix_s = passes * costs.prefix.of_the_run / threads if costs.prefix else 0.0
    steps_s, evaluations_s = steps * costs.step.of_the_run / threads, evaluations * costs.evaluation.of_the_run
    lines = [
        f"time        about {duration(prefix_s + steps_s + evaluations_s)} here, an estimate from "
        f"{costs.num_texts} held-out texts ({costs.num_tokens:,} tokens) that were measured"
    ]
    if costs.prefix:
        stored = ", less those that lie in runtime.cache_dir already" if e.runtime.cache_dir else ""
        times = "once" if passes == 1 else f"{passes} times, once in each process"
        lines.append(
            f"            {duration(prefix_s)}: {num_texts(federation):,} rows pass the frozen layers {times}{stored}"
        )
    return [
        *lines,
        f"            {duration(steps_s)}: {steps:,} steps of {duration(costs.step.of_the_run)} in {threads} threads",
        f"            {duration(evaluations_s)}: {evaluations} evaluations of {duration(costs.evaluation.of_the_run)}",
        *prefix_lines(federation),
        *memory_lines(federation, costs),
    ]


def prefix_lines(federation: Federation) -> list[str]:
    """Say whether keeping the states of a language model's frozen layers would pay; nothing where they are kept."""
    e, often = federation.experiment, readings(federation)
    if e.runtime.cache_prefix or e.task.target != CAUSAL_LM or not e.adapter.layers or 0 in e.adapter.layers:
        return []
    pays = "is worth it" if often > 1 else "is not worth it, unless runtime.cache_dir serves several runs"
    return [f"            a row is read about {often:.2g} times: runtime.cache_prefix=true, one pass of each, {pays}"]


def memory_lines(federation: Federation, costs: Costs) -> list[str]:
    """Say what the run takes of memory, and of a disk while it lasts."""
    processes = federation.experiment.runtime.num_processes
    states, on_disk = state_places(federation, costs)
    cohort = cohort_bytes(federation)
    each = f" in each of {1 + processes} processes" if processes > 1 else ""
    of_states = f", {size(states)} for states of the frozen layers" if states else ""
    lines = [
        f"memory      about {size(costs.peak_bytes + states + cohort)}{each}, an estimate: {size(costs.peak_bytes)} at "
        f"the peak of this process{of_states}, {size(cohort)} for clients that train at once"
    ]
    if on_disk:
        folder = federation.experiment.runtime.cache_dir or "a temporary file"
        lines.append(f"disk        {size(on_disk)} for states of the frozen layers, in {folder}")
    return lines


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
