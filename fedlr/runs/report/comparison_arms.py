"""Runs that differ in nothing but the seed are one arm: what it reached on average, and how sure that is."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean, stdev

import yaml

from fedlr.runs.asked import CHANGE_NOTHING
from fedlr.runs.report.run_files import Run
from fedlr.runs.report.wording import PERCENT, score_text, short
from fedlr.tasks.evaluation import Metric

CONFIDENCE = 0.95
NOT_PART_OF_AN_ARM = ("seed", "name", "tracking")  # chance, and where a run is written
CHANGES_NOTHING = frozenset(f"{section}.{key}" for section, keys in CHANGE_NOTHING.items() for key in keys)
MOST_SETTINGS = 3  # told in a label


@dataclass(frozen=True)
class Interval:
    """The mean of `num_values` independent values and half the width of its confidence interval; None: of one value."""

    mean: float
    half_width: float | None
    num_values: int

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends; of one value the value itself."""
        return self.mean - (self.half_width or 0.0), self.mean + (self.half_width or 0.0)


@dataclass(frozen=True)
class Arm:
    """Runs of one configuration over seeds. `label` names the method, and what sets it apart from its namesakes."""

    label: str
    privacy: str
    runs: Sequence[Run]

    def values(self, value: Callable[[Run], float]) -> list[float]:
        """Return one value a seed: a run that was only repeated tells nothing new, so it counts with its first in one
        mean. Every run without a seed counts."""
        by_seed: dict[object, list[float]] = defaultdict(list)
        for number, run in enumerate(self.runs):
            seed = run.summary.seed
            by_seed[("run", number) if seed is None else seed].append(value(run))
        return [fmean(values) for values in by_seed.values()]

    def interval(self, value: Callable[[Run], float]) -> Interval:
        """Return the mean over seeds with its confidence interval."""
        return mean_interval(self.values(value))

    @property
    def num_seeds(self) -> int:
        """How many independent runs there are."""
        return len(self.values(lambda run: 0.0))


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Return the arms, sorted by privacy and label, their runs in the order given."""
    grouped: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    settings: dict[tuple[str, str, str], Mapping[str, str]] = {}
    for run in runs:
        told = settings_of(run)
        key = (group_name(run), run.summary.method, repr(sorted(told.items())))
        grouped[key].append(run)
        settings[key] = told
    arms = []
    for key in sorted(grouped):
        group, method, _ = key
        namesakes = [told for other, told in settings.items() if other[:2] == key[:2]]
        arms.append(Arm(_label(method, settings[key], namesakes), group, grouped[key]))
    return arms


def group_name(run: Run) -> str:
    """Return the privacy of a run, with the budget if it is known: one group is comparable."""
    budget = run.budget_epsilon
    if not run.summary.is_private or budget is None:
        return run.summary.privacy
    return f"{run.summary.privacy}, ε ≤ {short(budget)}"


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean and its confidence interval by Student's t: of few values it is as wide as it has to be.

    >>> mean_interval([0.80, 0.82, 0.84])
    Interval(mean=0.82, half_width=0.0496..., num_values=3)
    """
    if len(values) < 2:
        return Interval(fmean(values), None, len(values))
    return Interval(
        fmean(values), t_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values)), len(values)
    )


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return t with P(|T| <= t) = `confidence` for Student's T of so many degrees of freedom, by bisection.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: finite sums of powers of cos(arctan(t / sqrt(degrees))).

    >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
    (4.303, 2.262)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _probability(angle: float, degrees: int) -> float:
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for power in range(2 + is_odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def interval_text(metric: Metric, interval: Interval) -> str:
    r"""Return a score with its interval; a share in percent.

    >>> from fedlr.tasks.evaluation import ACCURACY
    >>> interval_text(ACCURACY, Interval(0.8125, 0.0312, 5)), interval_text(ACCURACY, Interval(0.8125, None, 1))
    ('81.2 ± 3.1\xa0%', '81.2\xa0%')
    """
    mean = score_text(metric, interval.mean)
    if interval.half_width is None:
        return mean
    return f"{mean.removesuffix(PERCENT)} ± {score_text(metric, interval.half_width)}"


def settings_of(run: Run) -> dict[str, str]:
    """Return what makes a run but chance and place: the configuration as it was asked for, flat, and the size of the
    federation. A rate that was found for each budget, or on each split, is one and the same `auto`."""
    summary = run.summary
    told = {name: str(getattr(summary, name)) for name in ("num_rounds", "num_clients", "cohort_size")}
    parsed = yaml.safe_load(run.asked_config or run.config)
    kept = {k: v for k, v in parsed.items() if k not in NOT_PART_OF_AN_ARM} if isinstance(parsed, dict) else {}
    return {key: value for key, value in _flat(kept).items() if key not in CHANGES_NOTHING} | told


def _flat(tree: Mapping[object, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _label(method: str, settings: Mapping[str, str], namesakes: Sequence[Mapping[str, str]]) -> str:
    keys = sorted({key for told in namesakes for key in told})
    return label_of(method, settings, [key for key in keys if len({told.get(key) for told in namesakes}) > 1])


def label_of(method: str, settings: Mapping[str, str], apart: Sequence[str]) -> str:
    """Return a method with the settings that set it apart; other data are told by the name of their file.

    >>> label_of("fedsvd", {"data.path": ".assets/mail.csv", "seed": "1"}, ["data.labels", "data.path", "seed"])
    'fedsvd (data=mail, seed=1)'
    """
    is_other_file = "data.path" in apart and "data.path" in settings
    file = [f"data={PurePath(settings['data.path']).stem}"] if is_other_file else []
    rest = [key for key in apart if not (file and key.startswith("data.")) or key == "data.label_column"]
    told = [*file, *(f"{key}={settings.get(key, 'absent')}" for key in rest)]
    more = [f"{len(told) - MOST_SETTINGS} more"] if len(told) > MOST_SETTINGS else []
    return f"{method} ({', '.join([*told[:MOST_SETTINGS], *more])})" if told else method
