"""One line of an audit: what was measured, what it should be, and how the two are compared.

A statistical check fails where its p-value is below `LEVEL`; a bound that holds with 95 % confidence fails where
`NUM_RUNS` independent runs in a row exceed what is accounted. With at most `MOST_CHECKS` of the one and `MOST_BOUNDS`
of the other, a mechanism that is right fails an audit with probability at most `FALSE_ALARM` (Bonferroni). Where
several p-values belong to one check, `worst_of` has multiplied the smallest by their number already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FALSE_ALARM = 1e-6  # of a whole audit
MOST_CHECKS = 7
LEVEL = 5e-8
NUM_RUNS, MOST_BOUNDS = 5, 2
assert MOST_CHECKS * LEVEL + MOST_BOUNDS * 0.05**NUM_RUNS <= FALSE_ALARM


@dataclass(frozen=True)
class Finding:
    """What came of one check.

    `p_value` is None where nothing is left to chance: then `holds` compares the two numbers.
    """

    check: str  # its name, as in audit.json
    what: str  # in words, with the unit
    measured: float
    expected: float
    holds: bool
    p_value: float | None = None
    num_draws: int | None = None  # that the p-value is of


def statistical(check: str, what: str, *, measured: float, expected: float, p_value: float, num_draws: int) -> Finding:
    """Return a finding that holds unless chance alone explains it with less than `LEVEL`.

    >>> statistical("noise", "in sigma C", measured=0.9, expected=1.0, p_value=1e-30, num_draws=40_000).holds
    False
    """
    return Finding(check, what, measured, expected, p_value >= LEVEL, p_value, num_draws)


def worst_of(p_values: Sequence[float]) -> float:
    """Return the p-value of several tests together: the smallest, times their number (Bonferroni).

    >>> worst_of([0.5, 0.01, 0.3]), worst_of([])
    (0.03, 1.0)
    """
    return min(1.0, len(p_values) * min(p_values)) if p_values else 1.0
