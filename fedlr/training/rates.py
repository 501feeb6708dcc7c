r"""The learning rate that public numbers choose: one that fixes the noise which adds up in a weight.

What is fixed. In a step a client adds N(0, (sigma C)^2) to the clipped sum of every weight and divides by D, so a step
of plain SGD at rate lr puts lr sigma C / D of noise into it. Noise is independent in steps, clients and rounds, so
variances add up:

- S steps of a round, fresh state: times s = S; with momentum mu at the client times
  s = sum_{k=1..S} ((1 - mu^k) / (1 - mu))^2, what later steps repeat of the noise of the step that is k from the end
  (with Nesterov's form k + 1 in place of k).
- the uniform mean of m clients: divided by m. Who of the n enrolled clients they are changes nothing here; how often
  one may take part is in sigma.
- R rounds: times h = R; with momentum b at the server (v <- b v + mean update, w <- w + v) times
  h = sum_{k=1..R} ((1 - b^k) / (1 - b))^2.

After all rounds a weight of the mean model therefore carries noise of standard deviation

    N = lr (sigma C / D) sqrt(s h / m),          so          lr = N D / (sigma C sqrt(s h / m)).

Why this is the right thing to fix. The update is lr sum(clip(g, C)) / D, so with this rate it is
N sum(clip(g, C) / C) / (sigma sqrt(s h / m)): D cancels, and C too as long as it clips. Multiplying the loss and C by a
constant divides lr by it: the run is the same to rounding. What is left is N, in units of the weights themselves. 0.8
was found by experiment on a zero-initialised head over features of length 1: there 0.3 to 0.8 stay within 0.017
accuracy at every epsilon from 1 to 6 on two data sets, with sample rates from 0.04 to 1.

What it is not. What noise does to later gradients is left out, and so are dropped updates (fewer than m) and weights by
size (their mean carries more noise). No number here is computed from data: guarantees nothing, spends nothing.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedlr.methods.rate_schedule import RateSchedule, scheduled_accumulation

ACCUMULATED_NOISE = 0.8  # N
LARGEST_RATE = 128.0
LARGEST_RATE_OF_SHARES = 64.0  # of text_regression, whose losses do not flatten out (docs/log.md)
RATE_WITHOUT_NOISE = 64.0  # for gradients of a norm near 1, as those of a head over features of length 1
ROWS_OF_A_CLIENT = 256  # where nobody declares how many: D only matters where the largest rate is reached


@dataclass(frozen=True)
class Schedule:
    """How the noise of single steps adds up to that of the last model.

    Args:
        num_rounds: R, of the run.
        cohort_size: m, whose updates a round averages uniformly.
        num_steps: S, of a client in a round.
        momentum: mu, of the client's SGD, whose state is new in every round.
        nesterov: whether that is Nesterov's.
        server_momentum: b.
        server_lr: what the server multiplies its step with.
        client_rates: what the rate is multiplied with in each round: h sums the kicks of rounds at their own rates.
        server_rates: the same of the server's step.
    """

    num_rounds: int
    cohort_size: int
    num_steps: int
    momentum: float = 0.0
    nesterov: bool = False
    server_momentum: float = 0.0
    server_lr: float = 1.0
    client_rates: RateSchedule = RateSchedule()
    server_rates: RateSchedule = RateSchedule()

    def gain(self) -> float:
        """Return sqrt(s h / m): the noise of a weight of the last model, per noise of a client's step.

        >>> Schedule(num_rounds=20, cohort_size=5, num_steps=1).gain()
        2.0
        """
        steps = accumulation(self.momentum, self.num_steps, ahead=int(self.nesterov))
        rounds = self.accumulated_rounds()
        return self.server_lr * math.sqrt(steps * rounds / self.cohort_size)

    def accumulated_rounds(self) -> float:
        """Return h.

        >>> rates = RateSchedule("linear", num_rounds=4)
        >>> Schedule(num_rounds=4, cohort_size=1, num_steps=1, client_rates=rates).accumulated_rounds()
        1.875
        """
        if self.client_rates.is_constant and self.server_rates.is_constant:
            return accumulation(self.server_momentum, self.num_rounds)
        rates = (rates.over(self.num_rounds).factors() for rates in (self.client_rates, self.server_rates))
        return scheduled_accumulation(self.server_momentum, *rates)


def accumulation(momentum: float, count: int, *, ahead: int = 0) -> float:
    """Return sum over k = 1..count of ((1 - b^k) / (1 - b))^2, b the momentum: the variance that `count` independent
    kicks of variance 1 leave in a value that moves by v <- b v + kick.

    `ahead` is added to every k: 1 is Nesterov's momentum, whose steps are one ahead.

    >>> accumulation(0.0, 20), accumulation(0.5, 2)
    (20.0, 3.25)
    """
    k = np.arange(1 + ahead, count + 1 + ahead, dtype=np.float64)
    return float((((1.0 - momentum**k) / (1.0 - momentum)) ** 2).sum())


def accumulated_noise(
    lr: float, schedule: Schedule, *, noise_multiplier: float, max_grad_norm: float, divisor: float
) -> float:
    """Return N, the standard deviation of the noise in a weight of the last model.

    >>> schedule = Schedule(num_rounds=20, cohort_size=5, num_steps=1)
    >>> accumulated_noise(4.0, schedule, noise_multiplier=2.0, max_grad_norm=0.5, divisor=8.0)
    1.0
    """
    return lr * noise_multiplier * max_grad_norm / divisor * schedule.gain()


def learning_rate(
    schedule: Schedule,
    *,
    noise_multiplier: float | None,
    max_grad_norm: float,
    divisor: float,
    largest: float = LARGEST_RATE,
) -> float:
    """Return the rate at which a weight gathers `ACCUMULATED_NOISE`, at most `largest`, to four digits.

    Without noise (None, or 0) there is nothing to derive it from: it is `RATE_WITHOUT_NOISE`.

    >>> schedule = Schedule(num_rounds=20, cohort_size=5, num_steps=1)
    >>> learning_rate(schedule, noise_multiplier=2.0, max_grad_norm=0.5, divisor=8.0)
    3.2
    """
    if not noise_multiplier:
        return RATE_WITHOUT_NOISE
    per_lr = accumulated_noise(
        1.0, schedule, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, divisor=divisor
    )
    return rounded(min(largest, ACCUMULATED_NOISE / per_lr))


def rounded(value: float) -> float:
    """Return a number to four digits: the same on machines whose last bits differ, and readable.

    >>> rounded(61.82957)
    61.83
    """
    return float(f"{value:.4g}")
