"""`fedlr tune` with privacy.trials: the best of a random number of private trials, charged for before the first.

A trial is one point of the grid, drawn at random, trained with a seed of its own. How many there are is drawn first,
from a law that reads no data (`fedlr.privacy.trials`). selection.json, on the disk before the first trial, says what
trials and choice cost together; it also holds what was drawn, so that the same command goes on where it was cut off,
and is for nobody else's eyes. The best run stays; the others are deleted, and none of their scores is told.
"""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_bytes
from typing import Any

from fedlr.config.auto_rates import noise_multiplier_of
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import NotWritten, create_whole, make_folder, sync_folder, write_whole
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.trials import MEANS, Trials
from fedlr.privacy.units import rounded_up
from fedlr.runs.commands import ready
from fedlr.runs.directory import FINISHED, BeingWritten, sole_writer, summary_so_far
from fedlr.runs.report.run_files import read_run
from fedlr.runs.units import client_mechanism, most_participations
from fedlr.simulations.federation import assemble
from fedlr.simulations.sweep import run_job
from fedlr.simulations.tune import ON_VALIDATION
from fedlr.streams import Draws, Keystream, Purpose, stream
from fedlr.training.threads import torch_threads

SELECTION, TRIALS, CHOSEN = "selection.json", "trials", "chosen"
NONE_CAME_OUT = "none_came_out"  # the mark of a selection without a chosen run: that is an outcome, and over
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """What decides the epsilon of a trial, the same for every point, and the epsilon with the choice."""

    law: str
    mean: float
    sample_rate: float
    noise_multiplier: float
    num_steps: int
    delta: float
    epsilon: float


@dataclass(frozen=True)
class Trial:
    """One trial: its name, which says nothing of its number, its point of the grid, and its seed."""

    name: str
    point: int
    seed: int | None


def choose_privately(points: Sequence[Sequence[str]], *, command: Sequence[str], say: Say) -> Path:
    """Run trials and return the directory of the best, the only one that stays.

    Args:
        points: the words of a run at each point of the grid.
        command: the words that were typed.
        say: told what it costs, and what was chosen; nothing of single trials.

    Raises:
        InputError: before anything is charged: points of different cost, more than privacy.trials_epsilon, a folder
            of another selection, or of one that is over. After it: no trial came out, or the disk is full.
    """
    experiments = [ready([*words, *ON_VALIDATION]) for words in points]
    first = experiments[0]
    cost = cost_of(experiments)
    folder = Path(first.tracking.output_dir) / f"{first.name}-selection"
    over = next((path for path in (folder / CHOSEN, folder / NONE_CAME_OUT) if path.exists()), None)
    if over is not None and not (folder / TRIALS).exists():
        raise InputError(
            f"Expected a selection that is not done, got {over}: the same again would cost as much again on "
            "the same rows; with name=... it may"
        )
    if not (folder / SELECTION).exists():  # what cannot be run must not be charged
        with torch_threads(1):
            for experiment in experiments:
                assemble(experiment, seed=experiment.seed or 0)
    say(_told_cost(cost, len(points)))
    make_folder(folder, mode=0o700)
    with sole_writer(folder):
        trials = charged(folder, cost, experiments, command=command)
        say(f"charged in {folder / SELECTION}, before the first trial; how many there are is a secret, and so are they")
        return _best_alone(folder, trials, points, say=say)


def cost_of(experiments: Sequence[Experiment]) -> Cost:
    """Return what trials and choice cost.

    Raises:
        InputError: points of the grid differ in noise, sampling or steps; or it is more than the budget.
    """
    found = {_one_of(experiment) for experiment in experiments}
    if len(found) > 1:
        raise InputError(
            f"Expected a --grid of points with the same noise, sample rate and number of steps, got {len(found)} "
            "kinds: the bound is of one mechanism, repeated; choose these by public data, and tune the rest"
        )
    rate, noise, num_steps, delta = found.pop()
    privacy = experiments[0].privacy
    assert privacy.trials is not None
    trials = Trials(privacy.trials, privacy.trials_law or "geometric")
    spent = trials.epsilon([(PoissonSampler(rate).dp_event(noise), num_steps)], delta)
    if privacy.trials_epsilon is not None and spent > privacy.trials_epsilon:
        raise InputError(
            f"Expected trials and their choice to stay within privacy.trials_epsilon={privacy.trials_epsilon:g}, got "
            f"{rounded_up(spent)}: lower the budget of one trial or privacy.trials; nothing was charged or trained"
        )
    return Cost(trials.law, trials.mean, rate, noise, num_steps, delta, spent)


def _one_of(experiment: Experiment) -> tuple[float, float, int, float]:
    """Return sample rate, noise multiplier, steps and delta of a trial."""
    budget, mechanism = client_mechanism(experiment)
    if budget is not None and mechanism is not None:
        return mechanism.sample_rate, mechanism.noise_multiplier, most_participations(experiment), budget.delta
    noise = noise_multiplier_of(experiment)
    assert noise is not None  # `fedlr.config.trials_rules` refuses runs without a budget
    trainer = experiment.trainer
    num_steps = experiment.max_participations * trainer.num_steps
    return trainer.sample_rate, noise, num_steps, experiment.privacy.delta


def _told_cost(cost: Cost, num_points: int) -> str:
    event = PoissonSampler(cost.sample_rate).dp_event(cost.noise_multiplier)
    alone = epsilon([(event, cost.num_steps)], cost.delta, accountant="rdp")
    many = epsilon([(event, cost.num_steps * math.ceil(cost.mean))], cost.delta, accountant="rdp")
    return (
        f"a random number of trials ({cost.law}, mean {cost.mean:g}) of {num_points} settings, of which the best is "
        f"released: epsilon {rounded_up(cost.epsilon)} at delta {cost.delta:.3g} (one trial {rounded_up(alone)}; "
        f"{math.ceil(cost.mean)} trials that are all shown {rounded_up(many)}; Renyi bounds)"
    )


def charged(folder: Path, cost: Cost, experiments: Sequence[Experiment], *, command: Sequence[str]) -> list[Trial]:
    """Write what a selection costs and what was drawn for it, before the first trial; return the trials, or those of
    the same command that was cut off.

    Raises:
        InputError: the folder is another selection's.
    """
    path = folder / SELECTION
    typed = shlex.join(["fedlr", "tune", *command])
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            trials = [Trial(**one) for one in kept["trials"]]
            same = (kept["command"], kept["cost"]) == (typed, asdict(cost))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"Expected what a selection costs in {path}, got {error!r:.200}") from error
        if not same:
            raise InputError(f"Expected another name than that of the selection in {folder}, whose command was another")
        return trials
    trials = drawn(experiments[0], len(experiments))
    make_folder(folder, mode=0o700)
    create_whole(
        path,
        json.dumps(
            {"command": typed, "cost": asdict(cost), "means": MEANS, "trials": [asdict(trial) for trial in trials]},
            indent=1,
        ),
        mode=0o600,
    )
    sync_folder(folder)
    sync_folder(folder.parent)
    return trials


def drawn(experiment: Experiment, num_points: int) -> list[Trial]:
    """Draw how many trials there are, and for each its point of the grid, a name and a seed; from no data."""
    privacy, seed = experiment.privacy, experiment.seed
    assert privacy.trials is not None
    # As `simulate` has it: with a seed all can be drawn again, without one nothing.
    draws: Draws = stream(seed, Purpose.TRIALS) if seed is not None else Keystream(token_bytes(32))
    number = Trials(privacy.trials, privacy.trials_law or "geometric").draw(draws)
    uniform: Sequence[float] = draws.random(number).tolist() if number else []
    points = [min(num_points - 1, int(one * num_points)) for one in uniform]
    names = [draws.bytes(16).hex() for _ in points]
    seeds = [int.from_bytes(draws.bytes(4), "little") if seed is not None else None for _ in points]
    return [Trial(*one) for one in zip(names, points, seeds, strict=True)]


def _best_alone(folder: Path, trials: Sequence[Trial], points: Sequence[Sequence[str]], *, say: Say) -> Path:
    chosen, nothing, all_trials = folder / CHOSEN, folder / NONE_CAME_OUT, folder / TRIALS
    if not chosen.exists() and not nothing.exists():
        make_folder(all_trials)
        found = {trial: _done(trial, points[trial.point], all_trials) for trial in trials}
        scores = {trial: _score(run_dir) for trial, run_dir in found.items() if run_dir is not None}
        best = _best(scores)
        run_dir = None if best is None else found[best]
        if run_dir is None:
            write_whole(nothing, "")
        else:
            os.rename(run_dir, chosen)
        sync_folder(folder)
    shutil.rmtree(all_trials)
    if nothing.exists():
        raise InputError("Expected a trial that came out, got none; what was charged stays charged")
    say(f"chosen: {_settings(chosen, points)}, scored {_score(chosen)[1]:.4f} on validation rows")
    return chosen


def _done(trial: Trial, words: Sequence[str], folder: Path) -> Path | None:
    """Run a trial, go on with one that was cut off, or find it done; None of one that failed.

    Raises:
        InputError: what has nothing to do with the trial: the disk is full, or another process is at it.
    """
    typed = [word for word in words if word.partition("=")[0] not in ("name", "seed", "tracking.output_dir")]
    seed = "null" if trial.seed is None else str(trial.seed)
    overrides = [*typed, *ON_VALIDATION, f"name={trial.name}", f"seed={seed}", f"tracking.output_dir={folder}"]
    unfinished = None
    for run_dir in sorted((folder / trial.name).glob("*")):
        summary = summary_so_far(run_dir)
        if summary is not None and summary[FINISHED]:
            return None if summary.get("problem") else run_dir  # as where nothing was cut off
        unfinished = run_dir
    try:
        return run_job(ready(overrides), unfinished, say=_nothing, is_trial=True)
    except InputError as error:
        if isinstance(error, NotWritten | BeingWritten) or error.exit_code != InputError.exit_code:
            raise  # a full disk and the like say nothing of a trial: the same command goes on from here
        print(f"a trial failed, which is for your eyes only: {error}", file=sys.stderr, flush=True)
        return None


def _score(run_dir: Path) -> tuple[bool, float]:
    """Return whether higher is better, and the score on the validation rows."""
    summary = read_run(run_dir).summary
    return summary.metric.higher_is_better, summary.final_score


def _best(scores: Mapping[Trial, tuple[bool, float]]) -> Trial | None:
    """Return the trial with the best finite score, of equals the first; None without one."""
    finite = {trial: (score if is_higher else -score) for trial, (is_higher, score) in scores.items()}
    finite = {trial: score for trial, score in finite.items() if math.isfinite(score)}
    return max(finite, key=lambda trial: finite[trial], default=None)


def _settings(chosen: Path, points: Sequence[Sequence[str]]) -> str:
    """Return the words of the grid that the chosen run had."""
    from fedlr.runs.asked import ASKED
    from fedlr.runs.directory import recorded_tree

    tree: Any = recorded_tree(chosen / ASKED)
    differ = [
        word for word in dict.fromkeys(w for words in points for w in words) if not all(word in p for p in points)
    ]
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+") for word in differ)
    return ", ".join(f"{key}={_at(tree, key)}" for key in keys) or "the only settings"


def _at(tree: Any, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _nothing(line: str) -> None:
    """Say nothing: what a trial says is not released."""
