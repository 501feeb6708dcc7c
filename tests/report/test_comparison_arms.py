"""The interval of a mean over seeds is Student's: the same as SciPy's, and it covers the mean as often as it says.

Mutants this file kills, each of which misses the coverage: the normal quantile in place of Student's, the standard
deviation in place of that of the mean, the standard deviation of a population, one degree of freedom too many.
"""

import math

import numpy as np
import pytest
from scipy import stats

from fedlr.runs.report.comparison_arms import CONFIDENCE, Interval, interval_text, mean_interval, t_quantile
from fedlr.tasks.evaluation import ACCURACY

WRONG = {
    "the normal quantile": lambda x: stats.norm.ppf(0.975) * x.std(ddof=1, axis=1) / math.sqrt(x.shape[1]),
    "no root of n": lambda x: stats.t.ppf(0.975, x.shape[1] - 1) * x.std(ddof=1, axis=1),
    "the deviation of a population": lambda x: stats.t.ppf(0.975, x.shape[1] - 1) * x.std(axis=1) / x.shape[1] ** 0.5,
    "n degrees of freedom": lambda x: stats.t.ppf(0.975, x.shape[1]) * x.std(ddof=1, axis=1) / x.shape[1] ** 0.5,
}
NUM_TRIALS = 20_000
# Five standard deviations of a share of 20,000 trials: a false alarm in two million.
TOLERANCE = 5 * math.sqrt(0.95 * 0.05 / NUM_TRIALS)


def drawn(num_seeds: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_TRIALS, num_seeds))


@pytest.mark.parametrize("degrees", [*range(1, 41), 99, 1000])
def test_the_quantile_is_that_of_student(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
    assert t_quantile(degrees, 0.5) == pytest.approx(stats.t.ppf(0.75, degrees), rel=1e-12)


def test_the_interval_is_scipys() -> None:
    values = [0.81, 0.84, 0.80, 0.86]
    ours = mean_interval(values)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert ours.ends == pytest.approx((low, high), rel=1e-12) and ours.num_values == 4


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_the_interval_covers_the_mean_as_often_as_it_says_and_the_mutants_do_not(num_seeds: int) -> None:
    trials = drawn(num_seeds)
    mean = trials.mean(axis=1)
    half = t_quantile(num_seeds - 1) * trials.std(ddof=1, axis=1) / math.sqrt(num_seeds)
    assert half[0] == pytest.approx(mean_interval(trials[0].tolist()).half_width)
    assert abs((abs(mean) <= half).mean() - CONFIDENCE) < TOLERANCE
    for name, wrong in WRONG.items():
        assert abs((abs(mean) <= wrong(trials)).mean() - CONFIDENCE) > TOLERANCE, name


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.5]) == Interval(0.5, None, 1)
    assert mean_interval([0.5]).ends == (0.5, 0.5)
    assert "±" not in interval_text(ACCURACY, mean_interval([0.5])) and "±" in interval_text(
        ACCURACY, mean_interval([0.5, 0.6])
    )
