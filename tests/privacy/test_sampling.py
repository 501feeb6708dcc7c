"""Poisson sampling is Bernoulli for each example alone, and the sampler names the event it is (R-P6, R-A5).

Mutants this file kills, all through `check_poisson`: a batch capped near its expected size and at twice of it, an empty
batch drawn again, a shuffled batch of fixed size, one uniform number for a pair of examples, a rate 2 % off, indices
with repetitions.
"""

from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from scipy.stats import binom

from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.sampling import PoissonSampler, ShuffledSampler, UnsupportedSampling
from fedlr.streams import SeededRandomness

NUM_BATCHES, NUM_EXAMPLES, RATE = 20_000, 100, 0.05
Draw = Callable[[int, np.random.Generator], np.ndarray]


def check_poisson(draw: Draw, *, rate: float = RATE) -> None:
    """Fail unless 20,000 batches look like independent draws at this rate, everything within 5 sigma."""
    randomness = SeededRandomness(20)
    joins = np.zeros((NUM_BATCHES, NUM_EXAMPLES), dtype=np.float64)
    for step in range(NUM_BATCHES):
        batch = draw(NUM_EXAMPLES, randomness.sampling(client=1, round_index=2, step=step))
        assert batch.dtype == np.int64 and np.all(np.diff(batch) > 0), "indices must ascend without repetition"
        joins[step, batch] = 1
    variance = rate * (1 - rate)
    within(joins.mean(axis=0), rate, np.sqrt(variance / NUM_BATCHES), "marginal")
    within(joins.mean(), rate, np.sqrt(variance / joins.size), "overall rate")
    covariance = (joins - rate).T @ (joins - rate) / NUM_BATCHES
    pairs = covariance[np.triu_indices(NUM_EXAMPLES, k=1)]
    within(pairs, 0.0, variance / np.sqrt(NUM_BATCHES), "pairwise covariance")
    empty = (1 - rate) ** NUM_EXAMPLES
    found = np.mean(joins.sum(axis=1) == 0)
    within(found, empty, np.sqrt(empty * (1 - empty) / NUM_BATCHES), "frequency of empty batches")
    for size in range(NUM_EXAMPLES):
        larger = binom.sf(size, NUM_EXAMPLES, rate)
        if larger * NUM_BATCHES < 100:
            break
        sigma = np.sqrt(larger * (1 - larger) / NUM_BATCHES)
        within(np.mean(joins.sum(axis=1) > size), larger, sigma, f"frequency of batches above {size}")


def within(values: np.ndarray, expected: float, sigma: float, name: str) -> None:
    worst = np.max(np.abs(values - expected)) / sigma
    assert worst < 5, f"{name} is {worst:.1f} sigma off"


def capped(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return PoissonSampler(RATE).draw(num_examples, generator)[:8]


def capped_at_twice_its_expectation(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return PoissonSampler(RATE).draw(num_examples, generator)[: round(2 * RATE * num_examples)]


def never_empty(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    while not len(batch := PoissonSampler(RATE).draw(num_examples, generator)):
        pass
    return batch


def shuffled(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return ShuffledSampler(batch_size=round(RATE * num_examples)).draw(num_examples, generator)


def one_number_for_a_pair(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return np.flatnonzero(np.repeat(generator.random(num_examples // 2), 2) < RATE)


def higher_rate(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return PoissonSampler(1.02 * RATE).draw(num_examples, generator)


def with_repetition(num_examples: int, generator: np.random.Generator) -> np.ndarray:
    return np.sort(generator.integers(num_examples, size=generator.binomial(num_examples, RATE)))


def test_poisson_batches_are_independent_bernoulli_draws() -> None:
    check_poisson(PoissonSampler(RATE).draw)


MUTANTS = (
    *(capped, capped_at_twice_its_expectation, never_empty, shuffled),
    *(one_number_for_a_pair, higher_rate, with_repetition),
)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_poisson_check_kills_every_other_way_to_sample(mutant: Draw) -> None:
    with pytest.raises(AssertionError):
        check_poisson(mutant)


@pytest.mark.parametrize("num_examples", [0, 1, 7])
def test_a_rate_of_one_takes_everything_and_no_examples_give_an_empty_batch(num_examples: int) -> None:
    generator = np.random.default_rng(0)
    assert PoissonSampler(1.0).draw(num_examples, generator).tolist() == list(range(num_examples))


def test_poisson_sampler_emits_the_event_that_is_accounted() -> None:
    expected = dp_accounting.PoissonSampledDpEvent(0.032, dp_accounting.GaussianDpEvent(1.1))
    assert PoissonSampler(0.032).dp_event(1.1) == expected


def test_shuffled_batches_have_no_event() -> None:
    with pytest.raises(UnsupportedSampling, match="Poisson"):
        ShuffledSampler(batch_size=32).dp_event(1.0)


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.SampledWithoutReplacementDpEvent(1000, 32, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.SampledWithReplacementDpEvent(1000, 32, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.UnsupportedDpEvent(),
    ],
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_events_without_a_known_epsilon_are_refused(event: dp_accounting.DpEvent, accountant: str) -> None:
    with pytest.raises(InputError, match="add/remove"):
        epsilon([(event, 1)], 1e-5, accountant=accountant)  # type: ignore[arg-type]


def test_shuffled_batches_take_each_example_once_and_at_most_all() -> None:
    generator = np.random.default_rng(0)
    assert ShuffledSampler(batch_size=9).draw(5, generator).tolist() == [0, 1, 2, 3, 4]
    assert len(set(ShuffledSampler(batch_size=3).draw(5, generator).tolist())) == 3


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan"), True, "0.1", None])
def test_a_rate_outside_its_range_is_refused_by_value(rate: object) -> None:
    with pytest.raises(InputError, match=r"Expected sample_rate in \(0, 1\], got"):
        PoissonSampler(rate)  # type: ignore[arg-type]
