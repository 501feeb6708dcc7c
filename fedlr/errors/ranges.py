"""The ranges in which the numbers of a private run mean what is said of them; loads nothing heavy."""

from collections.abc import Iterator
from typing import Literal, get_args

from fedlr.errors import InputError

AccountantName = Literal["pld", "rdp"]
UnitName = Literal["example", "person", "client"]  # of privacy (`fedlr.privacy.units`)

# Below, the rounding of the Fourier transform is as large as what it adds up, and epsilon is no upper bound any more:
# at 1e-14 28.670 for an exact 28.686, from 1e-9 right to 1e-5 (measured).
LEAST_DELTA = {"pld": 1e-10, "rdp": 1e-300}
MOST_STEPS = 10_000_000  # a Renyi divergence is right to 1e-16 a step (float64), so that a sum of these is to 1e-9

# Below about 1e-152 the Renyi accountant of dp-accounting 0.6 overflows to nan and answers 0 (measured): no noise would
# be stated as perfect privacy. Nothing useful lies below 0.001, where one step costs an epsilon of 500,000. Far above
# 1e6 one step's Renyi divergence is lost in the rounding of float64.
LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 1e-3, 1e6

# Gradients, their sum and its noise are float32. Below 1e-6 noise and clipped gradients fall under its least numbers:
# at 1e-45 68 % of the noise was exactly 0, at 1e-10 a gradient of 9e34 passed at 1.26 of the bound (measured). Above
# 1e6 noise of the largest scale would have squares that it cannot hold.
LEAST_GRAD_NORM, LARGEST_GRAD_NORM = 1e-6, 1e6
LEAST_DIVISOR, LARGEST_DIVISOR = 1e-6, 1e12  # the step on the noisy sum is float32 too

MOST_ROWS = 64  # of one person that are trained on; beyond, the epsilon of a person says nothing
MAX_UPDATE_RATIO = 50.0  # of an update beside the others of its round (`fedlr.rounds.outlying`)


def require_accountant(name: str) -> None:
    """Raise InputError unless the accountant is one of those above."""
    if name not in get_args(AccountantName):
        raise InputError(f"Expected an accountant of {list(get_args(AccountantName))}, got {name!r}")


def require_delta(delta: float, accountant: str) -> None:
    """Raise InputError unless the accountant is known, and delta where its epsilon is an upper bound."""
    require_accountant(accountant)
    for sentence in delta_refusals(delta, accountant):
        raise InputError(sentence)


def delta_refusals(delta: float, accountant: str) -> Iterator[str]:
    """Yield a sentence where a delta is out of the range in which the accountant's epsilon is an upper bound."""
    least = LEAST_DELTA[accountant]
    if not least <= delta < 1:
        way = "; set a larger one, or privacy.accountant=rdp" if accountant == "pld" and 0 < delta < least else ""
        yield f"Expected privacy.delta in [{least:g}, 1) with privacy.accountant={accountant}, got {delta:g}{way}"
