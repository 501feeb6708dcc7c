"""What a benchmark gives back: measures with their spread, checks that came before any timing, every raw number."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.runs.directory import write_json
from fedlr.simulations.bench.goals import BY_KEY, Goal

Size = Literal["tiny", "quick", "full"]


class BenchmarkFailed(Exception):
    """Nothing was measured, or nothing that may be believed: contestants disagree, or one of them crashed."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the turns of a benchmark."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Measure:
    """One figure: a value a turn, in the order of the turns. `key` is that of its goal, where it has one."""

    key: str
    text: str
    values: tuple[float, ...]
    unit: str = ""
    note: str = ""

    @property
    def goal(self) -> Goal | None:
        """Return the goal of this measure."""
        return BY_KEY.get(self.key)

    @property
    def spread(self) -> Spread:
        """Return the median and the quartiles."""
        return spread(self.values)

    @property
    def reached(self) -> bool | None:
        """Return whether the median reaches the goal; None without one."""
        return None if self.goal is None else self.goal.reached(self.spread.median)


@dataclass(frozen=True)
class Check:
    """Two contestants, the largest difference of what they computed, and what was allowed."""

    text: str
    difference: float
    tolerance: float


@dataclass(frozen=True)
class Outcome:
    """One benchmark's results. `not_run` says why there are none."""

    name: str
    measures: tuple[Measure, ...] = ()
    checks: tuple[Check, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)  # sizes, threads: what was measured
    raw: Mapping[str, Any] = field(default_factory=dict)  # every time, in seconds, by contestant
    not_run: str = ""


def spread(values: Sequence[float]) -> Spread:
    """Return median, lower and upper quartile (inclusive method); one value is all three.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, lower=2.0, upper=4.0)
    """
    if len(values) < 2:
        (only,) = values
        return Spread(only, only, only)
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), lower, upper)


def check_equal(
    text: str, ours: Mapping[Slot, Tensor], theirs: Mapping[Slot, Tensor], *, unit: float, tolerance: float
) -> Check:
    """Compare two sets of tensors: the joint L2 norm of their difference, in units of `unit`.

    Raises:
        BenchmarkFailed: they have other slots or shapes, the difference is beyond the tolerance or not a number, or
            both are zero: contestants that do nothing agree, too.
    """
    if ours.keys() != theirs.keys() or any(ours[slot].shape != theirs[slot].shape for slot in ours):
        raise BenchmarkFailed(f"Expected the same tensors ({text}), got {len(ours)} and {len(theirs)}, or other shapes")
    difference = joint_norm({slot: ours[slot].double() - theirs[slot].double() for slot in ours}) / unit
    if not difference <= tolerance:
        raise BenchmarkFailed(
            f"Expected the same numbers ({text}) within {tolerance:g}, got a difference of {difference:.3g}: no time "
            "of theirs counts"
        )
    if joint_norm(ours) == 0:
        raise BenchmarkFailed(f"Expected numbers to compare ({text}), got zeros only: no time of theirs counts")
    return Check(text, difference, tolerance)


def joint_norm(tensors: Mapping[Slot, Tensor]) -> float:
    """Return the L2 norm of all tensors together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def write_outcome(folder: Path, outcome: Outcome, *, about: Mapping[str, Any]) -> Path:
    """Write `NAME.json`: the figures, their spread, all raw values, and what `about` says of the machine."""
    measures = [
        {**asdict(m), "spread": asdict(m.spread), "goal": m.goal and asdict(m.goal), "reached": m.reached}
        for m in outcome.measures
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.name}.json"
    write_json(path, {**about, **asdict(outcome), "measures": measures})
    return path


def read_outcome(path: Path) -> tuple[Outcome, dict[str, Any]]:
    """Read what `write_outcome` wrote: the outcome, and what it says of the machine.

    Raises:
        InputError: if the file is missing or is no outcome.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        measures = tuple(
            Measure(m["key"], m["text"], tuple(m["values"]), m["unit"], m["note"]) for m in tree.pop("measures")
        )
        checks = tuple(Check(**check) for check in tree.pop("checks"))
        own = {key: tree.pop(key) for key in ("name", "setting", "raw", "not_run")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected a result of `fedlr bench`, got {path} ({error!r})") from error
    return Outcome(measures=measures, checks=checks, **own), tree
