"""Cohorts are a pure, uniform, capped draw that everybody can repeat.

Mutants killed: a cap that does not count, or that forgets earlier rounds; a draw with replacement; a favourite.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlr.rounds.cohorts
from fedlr.rounds.cohorts import sample_cohort
from tests.training.small_models import mutant


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_clients=st.integers(1, 12),
    share=st.floats(0, 1),
    max_participations=st.integers(1, 5),
    num_rounds=st.integers(1, 8),
)
def test_cohorts_are_distinct_capped_and_as_large_as_they_can_be(
    seed: int, num_clients: int, share: float, max_participations: int, num_rounds: int
) -> None:
    size = max(1, round(share * num_clients))
    capped(fedlr.rounds.cohorts, seed, num_clients, size, max_participations, num_rounds)


def capped(module: ModuleType, seed: int, num_clients: int, size: int, most: int, num_rounds: int) -> None:
    asked = np.zeros(num_clients, dtype=int)
    for index in range(num_rounds):
        arguments = {"seed": seed, "num_clients": num_clients, "cohort_size": size, "max_participations": most}
        cohort = module.sample_cohort(round_index=index, **arguments)
        assert list(cohort) == sorted(set(cohort))
        assert len(cohort) == min(size, int((asked < most).sum()))
        assert set(cohort) <= set(range(num_clients))
        asked[list(cohort)] += 1
        assert asked.max() <= most
        assert cohort == module.sample_cohort(round_index=index, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        ("drawn[cohort] += 1", "pass"),
        ("in count():", "in count():\n        drawn[:] = 0"),
        ("replace=False", "replace=True"),
    ],
    ids=["no count", "no memory of earlier rounds", "with replacement"],
)
def test_cohorts_without_a_cap_or_with_repetition_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        capped(mutant(fedlr.rounds.cohorts, change), 3, 6, 4, 2, 4)


def uniform(draw: Callable[..., Sequence[int]]) -> None:
    """Every client, and every pair of clients, is asked equally often: six standard deviations off is an error."""
    num_rounds, alone, pairs = 3000, np.zeros(5), np.zeros((5, 5))
    for index in range(num_rounds):
        cohort = list(draw(seed=index // 3, round_index=index % 3, num_clients=5, cohort_size=2, max_participations=9))
        alone[cohort] += 1
        pairs[cohort[0], cohort[1]] += 1
    for counts, p in ((alone, 2 / 5), (pairs[np.triu_indices(5, 1)], 1 / 10)):
        assert np.abs(counts - num_rounds * p).max() < 6 * np.sqrt(num_rounds * p * (1 - p))


def test_cohorts_are_uniform() -> None:
    uniform(sample_cohort)


def test_cohorts_that_favour_someone_are_seen() -> None:
    def favours(**arguments: int) -> Sequence[int]:
        cohort = sample_cohort(**arguments)
        return (0, *cohort[1:]) if arguments["seed"] % 5 == 0 and 0 not in cohort else cohort

    with pytest.raises(AssertionError):
        uniform(favours)


def test_cohorts_follow_the_seed_and_the_round() -> None:
    arguments = {"num_clients": 50, "cohort_size": 10, "max_participations": 99}
    drawn = {sample_cohort(seed=s, round_index=r, **arguments) for s in range(5) for r in range(5)}
    assert len(drawn) == 25
