"""`fedlr audit`: what was measured, what was accounted, and whether the two agree."""

import math
from collections.abc import Sequence
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Any

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.runs.commands import ready
from fedlr.simulations.cli import command, existing_run, only_one, say

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment
    from fedlr.privacy.audit.finding import Finding
    from fedlr.simulations.audit.audit import Audit, Bound

HEADER = ("measured through the run's own training path", "measured", "accounted", "verdict")


@command
def audit(arguments: list[str]) -> None:
    """Measure whether a federation is as private as is accounted: fedlr audit experiment=NAME [KEY=VALUE ...]

    Noise, sensitivity and batches of the configuration's own training path; a lower bound on epsilon from rows that are
    put in by coins and guessed from what clients release; and five faults, planted to be found. fedlr audit RUN_DIR
    audits the configuration of a run, and its report then shows the result. More: audit.canaries=N (1000),
    audit.draws=N (40000), audit.rounds=N (all), audit.guesses=SHARE (0.1), audit.planted=false.
    """
    from fedlr.simulations.audit.options import split_options

    options, words = split_options(arguments)
    run_dir = existing_run(only_one(words)) if words and not any("=" in word for word in words) else None
    if run_dir is None:
        experiment, seed = ready(words), None
    else:
        experiment, seed = of_run(run_dir)
    from fedlr.simulations.audit.audit import OF_AN_AUDIT
    from fedlr.simulations.audit.audit import audit as measure
    from fedlr.training.threads import torch_threads

    OF_AN_AUDIT.check(experiment)
    seed = next(seed for seed in (seed, experiment.seed, randbits(32)) if seed is not None)
    with torch_threads(1):
        found = measure(experiment, options, seed=seed, say=say)
    say("\n" + "\n".join(table(found)))
    say(f"\n{conclusion(found)}\naudit in {write(found, run_dir)}")
    if not found.holds or found.missed:
        raise InputError(f"Expected an audit that holds and finds every planted fault, got: {conclusion(found)}")


def of_run(run_dir: Path) -> tuple["Experiment", int | None]:
    """Return the configuration of a finished run, and the seed that was drawn for it if one was."""
    from fedlr.runs.directory import SUMMARY, read_json, recorded_experiment

    experiment = recorded_experiment(run_dir)
    go_offline(experiment.runtime.offline)
    seed = read_json(run_dir / SUMMARY).get("seed")
    return experiment, seed if type(seed) is int and 0 <= seed < 2**32 else None


def write(found: "Audit", run_dir: Path | None) -> Path:
    """Write audit.json into the run's folder, whose report is drawn again, or into a new one; return its path."""
    from fedlr.runs.directory import AUDIT, create_run_dir, sole_writer, write_json, write_origin
    from fedlr.runs.report import write_report

    if run_dir is None:
        folder = create_run_dir(found.federation.experiment)
        write_origin(folder, found.federation.experiment)
    else:
        folder = run_dir
    with sole_writer(folder):
        write_json(folder / AUDIT, as_json(found))
        if run_dir is not None:
            write_report(folder)
    return folder / AUDIT


def as_json(found: "Audit") -> dict[str, Any]:
    """Return audit.json."""
    from fedlr.privacy.audit.finding import FALSE_ALARM
    from fedlr.simulations.audit.audit import SMALL_EPSILON

    assert found.federation.mechanism is not None
    mechanism = found.federation.mechanism
    return {
        "holds": found.holds,
        "conclusion": conclusion(found),
        "false_alarm": FALSE_ALARM,
        "seed": found.federation.seed,
        "options": found.options.model_dump(),
        "mechanism": {
            "noise_multiplier": mechanism.noise_multiplier,
            "max_grad_norm": mechanism.max_grad_norm,
            "sample_rate": mechanism.sample_rate,
            "num_steps": found.federation.training.num_steps,
        },
        "findings": [finding_record(one) for one in found.findings],
        "one_run": [bound_record(one) for one in found.bounds],
        "small_epsilon": SMALL_EPSILON,
        "planted": [{"fault": one.fault, "found_by": list(one.found_by)} for one in found.planted],
    }


def finding_record(one: "Finding") -> dict[str, Any]:
    """Return what audit.json says of one check."""
    return {
        "check": one.check,
        "what": one.what,
        "measured": number(one.measured),
        "accounted": number(one.expected),
        "p_value": one.p_value,
        "num_draws": one.num_draws,
        "holds": one.holds,
    }


def bound_record(one: "Bound") -> dict[str, Any]:
    """Return what audit.json says of one lower bound on epsilon."""
    return {
        "check": one.check,
        "what": one.what,
        "epsilon_lower_bound": one.run.lower_bound,
        "epsilon": number(one.run.epsilon),
        "delta": one.run.delta,
        "confidence": 0.95,
        "most": one.run.most,
        "num_canaries": one.run.num_canaries,
        "num_guesses": one.run.num_guesses,
        "num_correct": one.run.num_correct,
        "num_rounds": one.run.num_rounds,
        "num_runs": one.num_runs,
        "holds": one.holds,
    }


def table(found: "Audit") -> list[str]:
    """Return the lines of the table: what was measured, what was accounted, and the verdict."""
    rows = [HEADER]
    rows += [
        (one.what, figure(one.measured), figure(one.expected), "holds" if one.holds else "FAILS")
        for one in found.findings
    ]
    for bound in found.bounds:
        verdict = "holds" if bound.holds else "FAILS"
        rows.append((bound.what, figure(bound.run.lower_bound), figure(bound.run.epsilon), verdict))
        told = f"  {bound.run.num_correct} of {bound.run.num_guesses} guesses right; all right would show"
        rows.append((told, figure(bound.run.most), "", "" if bound.can_fail else "cannot fail"))
    for planted in found.planted:
        by = ", ".join(planted.found_by)
        rows.append((f"planted: {planted.fault}", "", "", f"found: {by}" if by else "MISSED"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]


def conclusion(found: "Audit") -> str:
    """Return the result in one sentence."""
    first = found.bounds[0].run
    if found.failed:
        text = f"not as accounted: {listed(found.failed)}"
    else:
        text = (
            f"as accounted: epsilon is at least {first.lower_bound:.2f} (95 %, one run) and at most "
            f"{first.epsilon:.2f} (accounted)"
        )
    if found.missed:
        return f"{text}; planted and not found: {listed(found.missed)}"
    return f"{text}; {len(found.planted)} of {len(found.planted)} planted faults were found" if found.planted else text


def listed(names: Sequence[str]) -> str:
    """Return names with commas."""
    return ", ".join(names)


def figure(value: float) -> str:
    """Return a number in four digits."""
    return f"{value:.4g}"


def number(value: float) -> float | str:
    """Return a number as JSON has it."""
    return value if math.isfinite(value) else "inf"
