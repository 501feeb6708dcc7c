"""`fedlr tune`: choose settings on validation rows, as many tries for every arm, and say what was chosen on what.

The grid is run for every arm (every combination of the other swept keys but the seed) and every seed, all scored on the
validation rows alone. The best mean over the seeds is chosen for each arm by itself; of equals the first.
"""

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedlr.config.schema import AUTO, parse_overrides
from fedlr.config.validation_rules import WAYS
from fedlr.errors import InputError
from fedlr.runs.directory import recorded_tree
from fedlr.runs.report.comparison_pairs import ARM_KEYS
from fedlr.runs.report.run_files import Run, read_run
from fedlr.runs.tuned import Tuned, TunedArm

FOUND = ("trainer.divisor", "trainer.optimizer.lr")  # numbers that may be auto, which the chosen run found
MAY_BE_CHOSEN = ("method", "adapter", "trainer")  # sections; what else is chosen would make another task
# Of every run of a grid: what a figure is told of is not computed.
ON_VALIDATION = (
    "tracking.evaluate_on=validation",
    "tracking.run_no_privacy=false",
    "tracking.run_alone=false",
    "tracking.client_accuracy=false",
)


@dataclass(frozen=True)
class Grid:
    """What `fedlr tune` was asked to choose among, and for which arms."""

    points: tuple[str, ...]  # KEY=V1,V2
    arms: tuple[str, ...]  # swept keys that make the arms

    def arm_of(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """Return the words of a run that make its arm."""
        return tuple(word for word in overrides if key_of(word) in self.arms)

    def point_of(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """Return the words of a run that are its point of the grid."""
        keys = set(map(key_of, self.points))
        return tuple(word for word in overrides if key_of(word) in keys)


def key_of(word: str) -> str:
    """Return the key of KEY=VALUE."""
    return word.partition("=")[0].lstrip("+")


def grid_of(words: Sequence[str], points: Sequence[str]) -> Grid:
    """Sort the words of a command.

    Raises:
        InputError: there is no grid, one of its keys has one value or is typed twice, or is what may not be chosen.
    """
    if not points:
        raise InputError("Expected --grid KEY=VALUE,VALUE, got none: say which settings are to be chosen among")
    typed = {override.key_or_group: override for override in parse_overrides(words)}
    for point in parse_overrides(points):
        key = point.key_or_group
        if not point.is_sweep_override():
            raise InputError(f"Expected several values in --grid {point.input_line}, got one: fix it without --grid")
        if key in typed or [key_of(one) for one in points].count(key) > 1:
            raise InputError(f"Expected --grid {key} once and nowhere else, got it again")
        if key == "method" or not (key.partition(".")[0] in MAY_BE_CHOSEN or key in ARM_KEYS):
            raise InputError(
                f"Expected --grid to name keys of {', '.join(MAY_BE_CHOSEN)}, or {', '.join(ARM_KEYS)}, got {key}: it "
                "makes the task or the arm that is tuned; sweep it with -m"
            )
    for key in ("tracking.evaluate_on", "tracking.tuned"):
        if key in typed:
            raise InputError(f"Expected no {key} beside --on validation, got {typed[key].input_line}")
    arms = [key for key, override in typed.items() if override.is_sweep_override() and key != "seed"]
    return Grid(tuple(points), tuple(arms))


def check_on(on: str | None) -> None:
    """Refuse to choose on other rows than the validation rows."""
    if on != "validation":
        raise InputError(
            f"Expected --on validation, got {'none' if on is None else on}: settings are chosen on rows that are in no "
            "training and in no test figure (data.num_validation, data.validation_path)"
        )


def runs_of(jobs: Sequence[Sequence[str]], *, name: str) -> list[list[str]]:
    """Return the words of every run of a grid, which lie in a folder beside those of the experiment's name."""
    return [[*overrides, *ON_VALIDATION, f"name={name}-tune"] for overrides in jobs]


def chosen(
    grid: Grid, jobs: Sequence[Sequence[str]], run_dirs: Sequence[Path | None], *, command: Sequence[str]
) -> Tuned:
    """Return the best settings of each arm.

    Args:
        grid: what was asked.
        jobs: the words of each run.
        run_dirs: the directory of each; None of one that failed.
        command: the words that were typed.

    Raises:
        InputError: no point of an arm came out at every seed.
    """
    tries = [_Try(grid.arm_of(job), grid.point_of(job), found) for job, found in zip(jobs, run_dirs, strict=True)]
    runs = {one: read_run(one.run_dir) for one in tries if one.run_dir is not None}
    if not runs:
        raise InputError("Expected a run of the grid that came out, got none; the reasons are above")
    first, run = next(iter(runs.items()))
    assert first.run_dir is not None
    data = recorded_tree(first.run_dir / "config.yaml")["data"]
    seeds = sorted({run.summary.seed for run in runs.values() if run.summary.seed is not None})
    arms = dict.fromkeys(one.arm for one in tries)
    return Tuned(
        command=shlex.join(["fedlr", "tune", *command]),
        rows=rows_of(run, data),
        beside=tuple(f"data.{key}={data[key]}" for key in WAYS if data.get(key) is not None),
        metric=run.summary.metric.name,
        seeds=tuple(map(str, seeds)),
        num_points=len({one.point for one in tries}),
        arms=tuple(_best(arm, [one for one in tries if one.arm == arm], runs) for arm in arms),
    )


@dataclass(frozen=True)
class _Try:
    """One run of a grid."""

    arm: tuple[str, ...]
    point: tuple[str, ...]
    run_dir: Path | None  # None: it failed


def _best(arm: tuple[str, ...], tries: Sequence[_Try], runs: Mapping[_Try, Run]) -> TunedArm:
    """Return the point with the best mean of those that came out, with a finite score, at every seed."""
    scores: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in tries:
        scores[one.point].append(runs[one].summary.final_score if one in runs else math.nan)
    means = {point: fmean(found) for point, found in scores.items() if all(map(math.isfinite, found))}
    if not means:
        told = " ".join(arm) or "the experiment"
        raise InputError(f"Expected a point of the grid that came out at every seed for {told}, got none")
    is_higher = next(iter(runs.values())).summary.metric.higher_is_better
    best = max(means, key=lambda point: means[point] if is_higher else -means[point])  # of equals the first
    run_dir = next(one.run_dir for one in tries if one.point == best)
    assert run_dir is not None
    by_words = {" ".join(point): mean for point, mean in means.items()}
    return TunedArm(arm, (*best, *_found(run_dir, best)), means[best], by_words)


def _found(run_dir: Path, point: Sequence[str]) -> list[str]:
    """Return the numbers that a run found where it was asked for auto: a run on other rows would find others."""
    asked, config = recorded_tree(run_dir / "asked.yaml"), recorded_tree(run_dir / "config.yaml")
    return [f"{key}={_at(config, key)}" for key in FOUND if _at(asked, key) == AUTO and key not in map(key_of, point)]


def _at(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def rows_of(run: Run, data: dict[str, object]) -> str:
    """Say on which rows a run of a grid was scored."""
    number = f"{run.summary.verdict.num_rows:,} " if run.summary.verdict else ""
    way = next(f"data.{key}={data[key]}" for key in WAYS if data.get(key) is not None)
    return f"{number}validation rows ({way}) that are in no training and no test figure"


def told(tuned: Tuned) -> str:
    """Return what was chosen, a line an arm."""
    lines = [f"chosen by {tuned.metric} on {tuned.rows}, {tuned.num_points} tries for every arm:"]
    for arm in tuned.arms:
        tried = ", ".join(f"{words} {score:.4f}" for words, score in arm.scores.items())
        lines.append(f"  {' '.join(arm.arm) or 'the experiment'}: {' '.join(arm.chosen)} ({tried})")
    return "\n".join(lines)
