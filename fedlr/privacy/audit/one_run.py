"""A lower bound on epsilon from one run of training (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Each of m canaries is put in by a fair coin of its own. The auditor sees what was released, guesses r of the coins and
abstains from the others; v guesses are right. If training is (epsilon, delta)-DP for adding or removing one row, so
many right guesses have a probability that theorem 5.2 bounds: the largest epsilon for which it is below 1 - confidence
is refuted. How the guesses are made is free, so a poor attack only makes the bound low, never wrong.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedlr.errors import InputError

LARGEST = 64.0  # epsilon above which no audit of fewer than e^40 canaries can say anything


def p_value(num_correct: int, *, num_guesses: int, num_canaries: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many right guesses under (epsilon, delta)-DP (theorem 5.2).

    f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i, where f(v) is the probability that of r coins, each heads
    with probability e^epsilon / (1 + e^epsilon), at least v are.

    Raises:
        InputError: not 0 <= num_correct <= num_guesses <= num_canaries.

    >>> p_value(10, num_guesses=10, num_canaries=10, epsilon=0.0, delta=0.0) == 2**-10
    True
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise InputError(
            f"Expected right guesses <= guesses <= canaries, got {num_correct}, {num_guesses} and {num_canaries}"
        )
    chance = 1 / (1 + math.exp(-epsilon))
    # f(v), f(v - 1), ..., f(0)
    at_least = stats.binom.sf(np.arange(num_correct, -1, -1) - 1, num_guesses, chance)
    gain = np.max((at_least[1:] - at_least[0]) / np.arange(1, num_correct + 1), initial=0.0)
    return float(min(1.0, at_least[0] + 2 * num_canaries * delta * gain))


def epsilon_lower_bound(
    num_correct: int, *, num_guesses: int, num_canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the epsilon that so many right guesses refute with this confidence; 0.0 where they refute none.

    With probability at least `confidence` over the run, a mechanism that is (epsilon, delta)-DP gets no more than its
    epsilon here.

    >>> round(epsilon_lower_bound(100, num_guesses=100, num_canaries=1000, delta=0.0), 3)
    3.493
    >>> epsilon_lower_bound(50, num_guesses=100, num_canaries=1000, delta=1e-5)
    0.0
    """

    def refutes(epsilon: float) -> bool:
        found = p_value(num_correct, num_guesses=num_guesses, num_canaries=num_canaries, epsilon=epsilon, delta=delta)
        return found <= 1 - confidence

    if not refutes(0.0):
        return 0.0
    low, high = 0.0, LARGEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return low


def num_correct(scores: NDArray[np.float64], included: NDArray[np.bool_], *, num_in: int, num_out: int) -> int:
    """Return how many guesses are right, of "in" for the highest scores and "out" for the lowest.

    Which canaries are guessed is fixed by the scores and the two numbers, never by the coins.

    Args:
        scores: (m,), high where the auditor believes that a canary was in.
        included: (m,), the coins.

    >>> num_correct(np.array([3.0, -1.0, 0.1, -2.0]), np.array([True, False, False, True]), num_in=1, num_out=1)
    1
    """
    order = np.argsort(scores, kind="stable")
    return int(included[order[len(order) - num_in :]].sum() + (~included[order[:num_out]]).sum())
