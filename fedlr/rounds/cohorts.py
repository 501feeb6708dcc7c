"""Which clients a round asks: a pure function of (seed, round), so a run can go on from any state.

A cohort of a fixed size is public. No privacy amplification is claimed from it, because the server that draws it is one
of the adversaries. A Poisson cohort (`poisson_cohort`) may be claimed for the client unit, whose server is trusted, and
only while who was drawn is told to nobody.
"""

from collections.abc import Collection, Iterator
from itertools import count, islice

import numpy as np

from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import Draws, Purpose, stream


def sample_cohort(
    *, seed: int, round_index: int, num_clients: int, cohort_size: int, max_participations: int
) -> tuple[int, ...]:
    """Draw the clients of one round, uniformly among those with participations left.

    Args:
        seed: public seed of the run.
        round_index: which round, from 0.
        num_clients: enrolled clients, numbered from 0.
        cohort_size: clients to draw; fewer when fewer have participations left.
        max_participations: rounds that any client may be drawn for over the whole run.

    Returns:
        Client ids in ascending order: the same for every process that knows the arguments.

    >>> sample_cohort(seed=1, round_index=0, num_clients=4, cohort_size=4, max_participations=1)
    (0, 1, 2, 3)
    >>> sample_cohort(seed=1, round_index=1, num_clients=4, cohort_size=4, max_participations=1)
    ()
    """
    draws = cohorts(seed=seed, num_clients=num_clients, cohort_size=cohort_size, max_participations=max_participations)
    return next(islice(draws, round_index, None))


def sample_among(members: Collection[int], *, seed: int, round_index: int, cohort_size: int) -> tuple[int, ...]:
    """Draw the clients of one round among those that may be asked now; the same as `sample_cohort` among the same.

    >>> sample_among({0, 2, 5}, seed=1, round_index=0, cohort_size=3)
    (0, 2, 5)
    """
    generator = stream(seed, Purpose.COHORT, round_index=round_index)
    drawn = generator.choice(
        np.array(sorted(members), dtype=np.int64), size=min(cohort_size, len(members)), replace=False
    )
    return tuple(np.sort(drawn).tolist())


def cohorts(*, seed: int, num_clients: int, cohort_size: int, max_participations: int) -> Iterator[tuple[int, ...]]:
    """Yield the cohorts of round 0, 1, ...: what `sample_cohort` returns for each, and none is drawn twice."""
    drawn = np.zeros(num_clients, dtype=np.int64)
    for round_index in count():
        eligible = np.flatnonzero(drawn < max_participations)
        cohort = list(sample_among(eligible.tolist(), seed=seed, round_index=round_index, cohort_size=cohort_size))
        drawn[cohort] += 1
        yield tuple(cohort)


def cyclic_cohort(round_index: int, *, num_clients: int, cohort_size: int) -> tuple[int, ...]:
    """Return the clients of a round in a fixed, public order: each once in ceil(num_clients / cohort_size) rounds.

    Guarantees: exactly so many rounds lie between two participations of a client, and no cohort is larger than said.

    >>> [cyclic_cohort(t, num_clients=5, cohort_size=2) for t in range(4)]
    [(0, 3), (1, 4), (2,), (0, 3)]
    """
    num_groups = -(-num_clients // cohort_size)
    return tuple(range(round_index % num_groups, num_clients, num_groups))


def poisson_cohort(generator: Draws, *, num_clients: int, sample_rate: float) -> tuple[int, ...]:
    """Draw every client of a fixed population with the same probability, whatever the others are and were.

    Guarantees: never capped, filled up or drawn again; it may be empty. The sampler is the one whose event is
    accounted.

    >>> poisson_cohort(np.random.default_rng(0), num_clients=3, sample_rate=1.0)
    (0, 1, 2)
    """
    return tuple(PoissonSampler(sample_rate).draw(num_clients, generator).tolist())
