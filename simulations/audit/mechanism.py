"""The mechanism audit: noise, clip and draws of a federation's own training path, against what is accounted.

Every number comes from releases of real pools (`fedlr.simulations.audit.probe`): of clients without rows, whose noised
sums are noise alone; of clients with whole batches, less the same without noise; of neighbouring clients, which differ
by one row; and of clients whose rows are one row many times over, so that the norm of a sum counts the batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fedlr.adapters.state import Slot
from fedlr.privacy.audit.draws import independence_p_value, sizes_p_value
from fedlr.privacy.audit.finding import Finding, statistical, worst_of
from fedlr.privacy.audit.noise import (
    largest_correlation,
    normal_p_value,
    root_mean_square,
    scale_p_value,
    shared_part_p_value,
)
from fedlr.privacy.mechanism import Mechanism
from fedlr.simulations.audit.probe import Answer, Probe, Step, noiseless, vectors
from fedlr.simulations.federation import Federation
from fedlr.tasks.examples import Share

LEAST_CLIENTS, MOST_CLIENTS = 4, 48  # that a probe watches
MOST_ROUNDS, LEAST_ROUNDS = 500, 3
# Factors of the loss: far above the bound; so far that gradients overflow float32, which must count as nothing.
FAR_ABOVE, BEYOND = 1e6, 1e38
NUM_NEIGHBOURS, NUM_OTHERS = 18, 12  # rows that are added, one by one, to so many others
NUM_COUNTED = 400  # batches whose rows are counted
MOST_COUNTED = 2_000  # rows of each of their clients
NUM_DRAWS, NUM_DRAWN_FROM = 600, 150  # of the sampler by itself
SUM_TOLERANCE = 1e-4  # of C: what the order of float32 sums moves
HALVED_TOLERANCE = 0.1  # of C: over a bfloat16 base, where one example can change how others round
MU_TOLERANCE = 0.04

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Noise that clients released: of each set of tensors that trains together, one vector a client, round and step."""

    vectors: dict[tuple[Slot, ...], Floats]  # (K, V)
    sizes: dict[Slot, int]

    def by_slot(self) -> Iterator[Floats]:
        """Yield the noise of each tensor, (K, values), of every set of tensors it trains in."""
        for slots, rows in self.vectors.items():
            yield from np.split(rows, np.cumsum([self.sizes[slot] for slot in slots])[:-1], axis=1)

    def all_values(self) -> Floats:
        """Return all numbers."""
        return np.concatenate([rows.ravel() for rows in self.vectors.values()])


def mechanism_audit(f: Federation, *, accounted: Mechanism, num_draws: int) -> list[Finding]:
    """Return the findings on noise, sensitivity and draws.

    Args:
        f: the federation under audit, of few rows.
        accounted: what its ledger is told of a step.
        num_draws: of noise, at least.

    Privacy: everything is computed from rows in the clear. Nothing of it may be shown of rows that are not public.
    """
    noise = gather_noise(f, num_draws=num_draws)
    moves = [*sensitivities(f)]
    sd = root_mean_square(noise.all_values()) / accounted.max_grad_norm
    return [
        *noise_findings(noise, std=accounted.noise_multiplier * accounted.max_grad_norm),
        *sensitivity_findings(f, moves, accounted=accounted),
        mu_finding(max(moves), sd, accounted=accounted),
        sent_finding(f, accounted=accounted),
        *draw_findings(f, accounted=accounted),
    ]


def gather_noise(f: Federation, *, num_draws: int) -> Noise:
    """Release at least so many numbers of noise, of clients without rows; and some more of whole batches."""
    assert f.mechanism is not None
    table = f.clients[0].table
    per_client = LEAST_ROUNDS * f.training.num_steps * f.num_trained_values
    num_clients = min(MOST_CLIENTS, max(LEAST_CLIENTS, math.ceil(num_draws / per_client)))
    num_rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, math.ceil(num_draws * LEAST_ROUNDS / (per_client * num_clients))))
    empty = [Share(table, np.empty(0, dtype=np.int64))] * num_clients
    full = [Share(table, f.clients[client % len(f.clients)].rows[:3]) for client in range(num_clients)]
    steps: list[Step] = []
    with Probe(f, empty, mechanism=f.mechanism) as probe:
        for round_index in range(num_rounds):
            steps += probe.train(round_index).steps
    with (
        Probe(f, full, mechanism=f.mechanism, whole_batches=True) as noised,
        Probe(f, full, mechanism=noiseless(f.mechanism), whole_batches=True) as bare,
    ):
        for round_index in range(num_rounds, num_rounds + max(1, num_rounds // 4)):
            pair = [probe.train(round_index).steps[0] for probe in (noised, bare)]
            steps.append({slot: pair[0][slot].double() - pair[1][slot].double() for slot in pair[0]})
    groups: dict[tuple[Slot, ...], list[Floats]] = {}
    for step in steps:
        groups.setdefault(tuple(step), []).append(vectors(step))
    sizes = {slot: tensor[0].numel() for step in steps for slot, tensor in step.items()}
    return Noise({slots: np.concatenate(rows) for slots, rows in groups.items()}, sizes)


def noise_findings(noise: Noise, *, std: float) -> list[Finding]:
    """Return whether it is Gaussian noise of this standard deviation in every part, and drawn anew for each."""
    values, whole = noise.all_values(), [*noise.vectors.values()]
    parts = [scale_p_value(row, std=std) for rows in whole for row in rows]
    tensors = [scale_p_value(rows, std=std) for rows in noise.by_slot()]
    cosines = [largest_correlation(rows) for rows in whole]
    shared = [shared_part_p_value(rows, std=std) for rows in whole]
    layers = [largest_correlation(rows) for slots in noise.vectors for rows in [prefixes(noise, slots)]]
    ratio = root_mean_square(values) / std if std else math.inf
    extreme = max((root_mean_square(rows) / std for rows in noise.by_slot()), key=lambda sd: abs(sd - 1))

    def told(check: str, what: str, measured: float, expected: float, p_value: float) -> Finding:
        return statistical(check, what, measured=measured, expected=expected, p_value=p_value, num_draws=values.size)

    return [
        told("noise_scale", "standard deviation of the noise, in sigma C", ratio, 1.0, scale_p_value(values, std=std)),
        told("noise_shape", "the same, and Gaussian", ratio, 1.0, normal_p_value(values, std=std)),
        told(
            "noise_everywhere",
            "the same of the tensor, client, round or step furthest off",
            extreme,
            1.0,
            worst_of([worst_of(parts), worst_of(tensors)]),
        ),
        told(
            "noise_fresh",
            "largest correlation over clients, rounds and steps",
            max(rho for rho, _ in cosines),
            0.0,
            worst_of([worst_of([p for _, p in cosines]), worst_of(shared)]),
        ),
        told(
            "noise_layers",
            "largest correlation over tensors",
            max(rho for rho, _ in layers),
            0.0,
            worst_of([p for _, p in layers]),
        ),
    ]


def prefixes(noise: Noise, slots: Sequence[Slot]) -> Floats:
    """Return the first numbers of each tensor, as many as the smallest has, over all draws: (tensors, numbers)."""
    ends = np.cumsum([0, *(noise.sizes[slot] for slot in slots)])
    least = min(noise.sizes[slot] for slot in slots)
    rows = noise.vectors[tuple(slots)]
    return np.stack([rows[:, start : start + least].ravel() for start in ends[:-1]])


def worst_rows(f: Federation) -> NDArray[np.int64]:
    """Return the longest and the shortest rows, and some between."""
    rows = np.concatenate([client.rows for client in f.clients])
    order = rows[np.argsort(f.clients[0].table.lengths[rows], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(len(order), NUM_NEIGHBOURS)).astype(np.int64)
    return order[places]


def sensitivities(f: Federation) -> Iterator[float]:
    """Yield how far one row moves a clipped sum, over neighbouring clients, sizes of the loss, and starting models.

    Each client is the others, with or without one more row: of its own, a copy of one of the others, or the row alone.
    """
    assert f.mechanism is not None
    table, rows = f.clients[0].table, worst_rows(f)
    others = np.sort(rows[np.linspace(0, len(rows) - 1, min(len(rows), NUM_OTHERS)).astype(np.int64)])
    shares = [others, *(np.append(others, row) for row in rows), others[:0], *rows[:, None]]
    clients = [Share(table, np.sort(own)) for own in shares]
    bare = noiseless(f.mechanism)
    for start in (f, moved(f)):
        factors = [1.0]
        while factors:
            with Probe(start, clients, mechanism=bare, whole_batches=True, magnify=factors[0]) as probe:
                sums = vectors(probe.train().steps[0])
            together, alone = np.split(sums, 2)
            found = [np.linalg.norm(part[1:] - part[0], axis=1) for part in (together, alone)]
            yield from (float(d) if math.isfinite(d) else math.inf for d in np.concatenate(found))
            factors = [*factors[1:], *(magnified(found[1], bare.max_grad_norm) if factors == [1.0] else [])]


def magnified(norms: Floats, bound: float) -> list[float]:
    """Return factors of the loss: those at which rows of these norms would show whether they meet, and two far above.

    Just below the bound, and just below it where the loss is divided by their number, another row rescales them.
    """
    typical = float(np.median(norms))
    near = [bound / typical / 2, bound / typical * NUM_OTHERS] if typical > 0 else []
    return [*near, FAR_ABOVE, BEYOND]


def moved(f: Federation) -> Federation:
    """Return the federation at another start, where no trained tensor is zero, as after some rounds."""
    generator = np.random.default_rng(0)
    adapter = f.start.adapter
    trained = adapter.select(f.request().block)
    tensors = {
        slot: tensor + tensor.new_tensor(0.1 * generator.standard_normal(tensor.shape))
        for slot, tensor in trained.items()
    }
    return replace(f, start=replace(f.start, adapter=adapter.with_tensors({**adapter.tensors, **tensors})))


def tolerance(f: Federation) -> float:
    """Return how far rounding may move a sum, in C."""
    return HALVED_TOLERANCE if f.experiment.runtime.base_dtype == "bfloat16" else SUM_TOLERANCE


def sensitivity_findings(f: Federation, moves: Sequence[float], *, accounted: Mechanism) -> list[Finding]:
    """Return whether one row moves a sum by at most C."""
    largest = max(moves) / accounted.max_grad_norm
    what = f"largest move of a clipped sum by one row, of {len(moves)}, in C"
    return [Finding("sensitivity", what, largest, 1.0, largest <= 1 + tolerance(f))]


def mu_finding(largest: float, sd: float, *, accounted: Mechanism) -> Finding:
    """Return mu of the Gaussian mechanism that was measured, sensitivity over noise, beside what is accounted."""
    expected = 1 / accounted.noise_multiplier if accounted.noise_multiplier else math.inf
    measured = largest / accounted.max_grad_norm / sd if sd else math.inf
    return Finding(
        "mu", "mu of a step over a whole batch", measured, expected, measured <= expected * (1 + MU_TOLERANCE)
    )


def sent_finding(f: Federation, *, accounted: Mechanism) -> Finding:
    """Return whether clients send what plain SGD makes of their noised sums, and nothing else."""
    assert f.mechanism is not None
    lr = 1.0
    with Probe(f, f.clients[:LEAST_CLIENTS], mechanism=f.mechanism, lr=lr) as probe:
        off = max(chain([0.0], unexplained(f, probe.train(), lr=lr)))
    std = accounted.noise_multiplier * accounted.max_grad_norm / f.training.divisor
    measured = off / std if std else off
    return Finding("sent", "what is sent beside the noised steps, in their noise", measured, 0.0, measured <= 1e-2)


def unexplained(f: Federation, answer: Answer, *, lr: float) -> Iterator[float]:
    """Yield of each tensor that a client sent the largest difference from its start less its noised steps."""
    start = f.start.adapter.tensors
    for client, sent in enumerate(answer.sent):
        for slot, tensor in sent.items():
            steps = [step[slot][client].double() for step in answer.steps if slot in step]
            expected = start[slot].double() - lr / f.training.divisor * sum(steps)
            yield float((tensor.double() - expected).abs().max())


def draw_findings(f: Federation, *, accounted: Mechanism) -> list[Finding]:
    """Return whether batches are drawn as accounted: those that reach the sums, and those of the sampler."""
    rate = accounted.sample_rate
    num_rows = min(MOST_COUNTED, max(8, math.ceil(2 / rate)))  # few, so that empty batches occur
    sizes = batch_sizes(f, num_rows)
    joined = sampler_draws(f)
    found = [
        statistical(
            "independent_draws",
            "mean share of rows that the sampler draws; over rows, their pairs, clients, rounds and steps",
            measured=float(joined.mean()),
            expected=rate,
            p_value=independence_p_value(joined, sample_rate=rate),
            num_draws=joined.size,
        )
    ]
    if sizes.size:
        p_value = sizes_p_value(sizes, num_rows=num_rows, sample_rate=rate)
        what = f"mean number of {num_rows} rows in a step's sum"
        found.append(
            statistical(
                "batch_sizes",
                what,
                measured=float(sizes.mean()),
                expected=rate * num_rows,
                p_value=p_value,
                num_draws=sizes.size,
            )
        )
    return found


def batch_sizes(f: Federation, num_rows: int) -> NDArray[np.int64]:
    """Return how many rows were in each step's sum, of clients that hold one row many times; empty without gradient."""
    assert f.mechanism is not None
    bare, magnify, table = noiseless(f.mechanism), FAR_ABOVE, f.clients[0].table
    row = worst_rows(f)[:1]
    num_clients = MOST_CLIENTS if f.mechanism.sample_rate < 1 else LEAST_CLIENTS
    num_rounds = math.ceil(NUM_COUNTED / (MOST_CLIENTS * f.training.num_steps))
    clients = [Share(table, np.repeat(row, num_rows))] * num_clients
    found, start = [], moved(f)  # where every tensor has a gradient
    with (
        Probe(start, clients, mechanism=bare, magnify=magnify) as probe,
        Probe(start, [Share(table, row)], mechanism=bare, magnify=magnify, whole_batches=True) as one,
    ):
        for round_index in range(num_rounds):
            norm = float(np.linalg.norm(vectors(one.train(round_index).steps[0])))
            if norm > 0:
                steps = probe.train(round_index).steps
                found += [np.linalg.norm(vectors(step), axis=1) / norm for step in steps]
    return np.rint(np.concatenate(found)).astype(np.int64) if found else np.empty(0, dtype=np.int64)


def sampler_draws(f: Federation) -> NDArray[np.bool_]:
    """Return which rows the sampler draws, (draws, rows), with the streams of clients, rounds and steps."""
    joined = np.zeros((NUM_DRAWS, NUM_DRAWN_FROM), dtype=bool)
    for number in range(NUM_DRAWS):
        rest, client = divmod(number, MOST_CLIENTS)
        round_index, step = divmod(rest, f.training.num_steps)
        generator = f.randomness.sampling(client=client, round_index=round_index, step=step)
        joined[number, f.training.sampler.draw(NUM_DRAWN_FROM, generator)] = True
    return joined
