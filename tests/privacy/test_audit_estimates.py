"""Checks of noise and draws raise no false alarm, and find what is slightly wrong (R-A1, R-P5, R-P6, R-P7).

Mutants this file kills: noise of 0.97 of its scale, uniform noise, a vector that comes twice, a twentieth of the
variance shared by all, batches capped, never empty, of a fixed size, rows that join in pairs, a draw used twice.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fedlr.privacy.audit.draws import independence_p_value, sizes_p_value
from fedlr.privacy.audit.finding import FALSE_ALARM, LEVEL, MOST_BOUNDS, MOST_CHECKS, NUM_RUNS, statistical, worst_of
from fedlr.privacy.audit.noise import largest_correlation, normal_p_value, scale_p_value, shared_part_p_value

NUM_SEEDS = 200
Generator = np.random.Generator


def vectors(generator: Generator) -> np.ndarray:
    return generator.standard_normal((20, 200))


def coins(generator: Generator) -> np.ndarray:
    return generator.random((80, 40)) < 0.2


CHECKS: dict[str, Callable[[Generator], float]] = {
    "scale": lambda g: scale_p_value(2 * vectors(g), std=2.0),
    "shape": lambda g: normal_p_value(2 * vectors(g), std=2.0),
    "correlation": lambda g: largest_correlation(vectors(g))[1],
    "shared": lambda g: shared_part_p_value(vectors(g), std=1.0),
    "sizes": lambda g: sizes_p_value(coins(g).sum(axis=1), num_rows=40, sample_rate=0.2),
    "independence": lambda g: independence_p_value(coins(g), sample_rate=0.2),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_right_has_small_p_values_no_more_often_than_they_say(name: str) -> None:
    """Fails by chance once in 10,000 seeds of a p-value that is exact; these seeds are fixed."""
    found = np.array([CHECKS[name](np.random.default_rng([7, seed])) for seed in range(NUM_SEEDS)])
    for level in (0.3, 0.05):
        assert (found < level).sum() <= stats.binom.ppf(1 - 5e-5, NUM_SEEDS, level), name


def paired(generator: Generator) -> np.ndarray:
    return np.repeat(generator.random((600, 30)) < 0.2, 2, axis=1)


def draw_used_twice(generator: Generator) -> np.ndarray:
    return np.repeat(generator.random((100, 150)) < 0.2, 2, axis=0)


def never_empty(generator: Generator) -> np.ndarray:
    sizes = generator.binomial(20, 0.1, 2000)
    return sizes[sizes > 0][:500]


MUTANTS: dict[str, Callable[[Generator], float]] = {
    "0.97 of its scale": lambda g: scale_p_value(0.97 * g.standard_normal(40_000), std=1.0),
    "uniform": lambda g: normal_p_value(g.uniform(-(3**0.5), 3**0.5, 40_000), std=1.0),
    "none": lambda g: scale_p_value(np.zeros(10), std=1.0),
    "once more": lambda g: largest_correlation(np.vstack([own := vectors(g), -own[3:4]]))[1],
    "partly shared": lambda g: shared_part_p_value(
        g.standard_normal((200, 500)) + 0.22 * g.standard_normal(500), std=(1 + 0.22**2) ** 0.5
    ),
    "capped": lambda g: sizes_p_value(np.minimum(g.binomial(60, 0.2, 500), 14), num_rows=60, sample_rate=0.2),
    "never empty": lambda g: sizes_p_value(never_empty(g), num_rows=20, sample_rate=0.1),
    "of a fixed size": lambda g: sizes_p_value(np.full(500, 12), num_rows=60, sample_rate=0.2),
    "larger than all": lambda g: sizes_p_value(np.array([60, 61]), num_rows=60, sample_rate=1.0),
    "in pairs": lambda g: independence_p_value(paired(g), sample_rate=0.2),
    "a draw used twice": lambda g: independence_p_value(draw_used_twice(g), sample_rate=0.2),
    "0.19 for 0.2": lambda g: independence_p_value(g.random((600, 150)) < 0.19, sample_rate=0.2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_is_found(name: str) -> None:
    assert MUTANTS[name](np.random.default_rng(11)) < LEVEL


def test_no_noise_and_no_direction_are_no_error() -> None:
    assert scale_p_value(np.zeros(4), std=0.0) == normal_p_value(np.zeros(4), std=0.0) == 1.0
    assert scale_p_value(np.ones(4), std=0.0) == 0.0
    assert largest_correlation(np.zeros((3, 5))) == (0.0, 1.0)
    assert largest_correlation(np.ones((1, 5))) == (0.0, 1.0)


def test_whole_batches_are_draws_too() -> None:
    assert sizes_p_value(np.full(30, 8), num_rows=8, sample_rate=1.0) == 1.0
    assert sizes_p_value(np.array([8, 7]), num_rows=8, sample_rate=1.0) == 0.0
    assert independence_p_value(np.ones((30, 8), dtype=bool), sample_rate=1.0) == 1.0


def test_the_false_alarm_rate_is_that_of_all_checks_together() -> None:
    assert MOST_CHECKS * LEVEL + MOST_BOUNDS * 0.05**NUM_RUNS <= FALSE_ALARM <= 1e-6
    finding = statistical("a", "b", measured=1.0, expected=1.0, p_value=LEVEL, num_draws=1)
    assert finding.holds and worst_of([0.5] * 3) == 1.0
