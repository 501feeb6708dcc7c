"""Numbers as people read them. Epsilon is rounded up: a report must not flatter a guarantee."""

import math
from decimal import ROUND_CEILING, Decimal

from fedlr.tasks.evaluation import Metric

PERCENT = "\u00a0%"


def percent(share: float) -> str:
    r"""Return a share in percent, one decimal.

    >>> percent(0.8125)
    '81.2\xa0%'
    """
    return f"{100 * share:.1f}{PERCENT}" if math.isfinite(share) else "not a number"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign.

    >>> points(-0.051)
    '−5.1 points'
    """
    return f"{signed(difference)} points" if math.isfinite(difference) else "not a number"


def signed(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign and without the unit.

    >>> signed(-0.0512), signed(0.1)
    ('−5.1', '+10.0')
    """
    return f"{100 * difference:+.1f}".replace("-", "−") if math.isfinite(difference) else "not a number"


def score_text(metric: Metric, value: float) -> str:
    r"""Return a score as its metric is written: a share in percent, any other with one decimal.

    >>> from fedlr.tasks.evaluation import ACCURACY
    >>> score_text(ACCURACY, 0.8125)
    '81.2\xa0%'
    >>> score_text(Metric("perplexity", higher_is_better=False, is_share=False), 62.41)
    '62.4'
    """
    if metric.is_share or not math.isfinite(value):
        return percent(value)
    return metric.text(value)


def score_change(metric: Metric, difference: float) -> str:
    """Return a difference of two scores, with its sign.

    >>> from fedlr.tasks.evaluation import ACCURACY
    >>> score_change(ACCURACY, -0.051)
    '−5.1 points'
    >>> score_change(Metric("perplexity", higher_is_better=False, is_share=False), -22.6)
    '−22.6'
    """
    if metric.is_share or not math.isfinite(difference):
        return points(difference)
    sign = "−" if difference < 0 else "+"
    return f"{sign}{metric.text(abs(difference))}"


def count(number: int, noun: str) -> str:
    """Return a number of things.

    >>> count(1, "round"), count(1200, "round")
    ('1 round', '1,200 rounds')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def seed_text(seed: int | None) -> str:
    """Return a seed, or `none` for a run that nobody can repeat."""
    return "none" if seed is None else str(seed)


def epsilon_text(epsilon: float | None) -> str:
    """Return an epsilon with three decimals, rounded up, as the privacy statement has it: the one way to write it.

    >>> epsilon_text(5.9311), epsilon_text(5.9), epsilon_text(None)
    ('5.932', '5.900', 'no DP')
    """
    if epsilon is None:
        return "no DP"
    if not math.isfinite(epsilon):
        return "infinite"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.001"), rounding=ROUND_CEILING))


def short(value: float) -> str:
    """Return a number with three significant digits and a tidy exponent.

    >>> short(1e-05), short(0.25), short(1234.5)
    ('1e-5', '0.25', '1,230')
    """
    if abs(value) >= 1000 and math.isfinite(value) and abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    mantissa, mark, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


def digits_up(value: float) -> str:
    """Return an upper bound with four significant digits, rounded up.

    >>> digits_up(1.23444), digits_up(0.353554), digits_up(12345.6)
    ('1.235', '0.3536', '12350')
    """
    number = Decimal(repr(float(value)))
    last = Decimal(1).scaleb(number.adjusted() - 3)
    return f"{number.quantize(last, rounding=ROUND_CEILING):f}"


def bytes_text(num_bytes: float) -> str:
    """Return a number of bytes in decimal units.

    >>> bytes_text(1_474_560), bytes_text(12)
    ('1.47 MB', '12 B')
    """
    divisor, unit = byte_unit(num_bytes)
    return f"{num_bytes / divisor:.3g} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Return the divisor and the name of the decimal unit that suits the largest value shown."""
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, unit
    return 1.0, "B"


def seconds_text(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    >>> seconds_text(4.21), seconds_text(754), seconds_text(7300)
    ('4.2 s', '12 min 34 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def power_of_ten(value: float) -> str:
    """Return a tick label of a logarithmic axis in plain text.

    >>> power_of_ten(1e-6)
    '10⁻⁶'
    """
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
