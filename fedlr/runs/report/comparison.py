"""`comparison.html` and its plain-text tables: several runs side by side, over seeds, with what they do not share."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.runs.report.comparison_arms import Arm, arms_of, group_name, interval_text
from fedlr.runs.report.comparison_forest import forest
from fedlr.runs.report.comparison_metric import measured_by, metric_of, title_of
from fedlr.runs.report.comparison_pairs import PairedArm, paired_arms
from fedlr.runs.report.comparison_pictures import costs, final_scores, scores_of_each_run
from fedlr.runs.report.layout import gallery, page, paragraph, section, table
from fedlr.runs.report.picture import Picture
from fedlr.runs.report.run_files import Run, read_run
from fedlr.runs.report.wording import (
    bytes_text,
    epsilon_text,
    score_change,
    score_text,
    seconds_text,
    seed_text,
    short,
    signed,
)
from fedlr.tasks.evaluation import Metric

HEADER = (
    "method",
    "privacy",
    "seed",
    "start",
    "final",
    "ε max",
    "sent up",
    "sent down",
    "aggr. error",
    "time",
    "trained",
)
ARM_HEADER = (
    "over seeds",
    "privacy",
    "seeds",
    "final {}",
    "ε max",
    "sent up",
    "sent down",
    "aggr. error",
    "time",
)
TEXT_COLUMNS = 2


def write_comparison(
    run_dirs: Sequence[Path], out: Path, *, against: str | None = None, metric: str | None = None
) -> Path:
    """Write a page that compares runs, from the files of their directories alone, and return its path.

    With a method to compare `against`, its runs are paired by seed with those of every other arm. `metric` is one of
    `fedlr.runs.report.comparison_metric.TITLES`; None: what their task puts first.

    Raises:
        InputError: no directory is given, a required file is missing or broken, a run has no such metric, or a pair is
            incomplete; the message names it.
    """
    runs, by = read_runs(run_dirs, metric)
    name = title_of(by)
    pairs = [] if against is None else paired_arms(runs, against=against)
    arms = arms_of(runs)
    over_seeds = table(_named(_LONG_ARM_HEADER, name), [_arm_row(arm, by) for arm in arms], text_columns=TEXT_COLUMNS)
    body = [
        f"<header>\n<h1>{len(runs)} runs compared</h1>\n{paragraph(_scope(runs), kind='lead')}\n</header>",
        *(paragraph(text, kind="warning") for text in (*_for_nothing(runs), *differences(runs))),
        *([_paired_section(pairs, against, by)] if against is not None else []),
        section("Pictures", [gallery(pictures(arms, by))]),
        *(
            [section("Over seeds", [over_seeds, paragraph(_OVER.format(name), kind="muted")])]
            if _has_seeds(arms)
            else []
        ),
        section(
            "All runs",
            [table(_named(_LONG_HEADER, name), [_row(run, by) for run in runs], text_columns=TEXT_COLUMNS), _NOTE],
        ),
    ]
    out = Path(out)
    write_whole(out, page(f"{len(runs)} runs compared", body))
    return out


def pictures(arms: Sequence[Arm], metric: Metric) -> list[Picture]:
    """Return the pictures of a comparison, but for that of the pairs."""
    return [final_scores(arms, metric), scores_of_each_run(arms, metric), costs(arms)]


def _for_nothing(runs: Sequence[Run]) -> list[str]:
    """Name the runs that trained for nothing: what they show is the model they started from."""
    idle = [run.summary for run in runs if run.summary.problem]
    return [f"Nothing was learnt by {one.method}, seed {seed_text(one.seed)}: {one.problem}." for one in idle]


def comparison_table(run_dirs: Sequence[Path], *, against: str | None = None, metric: str | None = None) -> str:
    """Return the same tables as aligned plain text: one run a line, and one arm a line where any has several seeds.

    With a method to compare `against`, a last table has the paired differences.
    """
    runs, by = read_runs(run_dirs, metric)
    tables = [_aligned([_start_and_final(by), *(_row(run, by) for run in runs)])]
    if _has_seeds(arms := arms_of(runs)):
        tables.append(_aligned([_named(ARM_HEADER, title_of(by)), *(_arm_row(arm, by) for arm in arms)]))
    if against is not None:
        pairs = paired_arms(runs, against=against)
        tables.append(_aligned([_paired_header(against), *(_paired_row(arm, by) for arm in pairs)], text_columns=3))
    return "\n\n".join(tables)


def differences(runs: Sequence[Run]) -> list[str]:
    """Return one sentence for each size or version in which the runs differ."""
    found = []
    for name in ("num_rounds", "num_clients", "cohort_size", "delta"):
        values = {getattr(run.summary, name) for run in runs} - {None}
        if len(values) > 1:
            told = ", ".join(short(float(value)) for value in sorted(values))
            found.append(f"These runs do not share {name}: {told}. Compare them with care.")
    for name in sorted({name for run in runs for name in run.versions}):
        versions = sorted({str(run.versions.get(name, "none")) for run in runs})
        if len(versions) > 1:
            found.append(f"These runs do not share the version of {name}: {', '.join(versions)}.")
    return found


_LONG_HEADER = (
    "Method",
    "Privacy",
    "Seed",
    "Start {}",
    "Final {}",
    "ε, max over clients",
    "Sent up",
    "Sent down",
    "Aggregation error, last round",
    "Time",
    "Parameters trained",
)
_LONG_ARM_HEADER = (
    "Method",
    "Privacy",
    "Seeds",
    "Final {}",
    "ε, max over clients and seeds",
    "Sent up",
    "Sent down",
    "Aggregation error, last round",
    "Time",
)
_OVER = (
    "One row is an arm: runs that differ in nothing but seed and place; a seed that was run twice counts once. Means "
    "over seeds, of {} with the 95\u00a0% confidence interval of that mean (Student's t); of one seed there is "
    "none. It says how sure the mean of one arm is: intervals that overlap do not show that two arms are alike."
)
_PAIRED = (
    "A pair shares seed, data, clients, cohorts, starting weights and budget; arms differ in the method and in what "
    "their label tells. The difference of final {} is {}, its 95\u00a0% interval is Student's "
    "t over the pairs. Intervals are not corrected for their number: of twenty rows without effect one excludes zero."
)
_NOTE = paragraph("Epsilon is rounded up. Bytes are of all clients together.", kind="muted")


def _paired_header(against: str) -> list[str]:
    return [f"against {against}", "task", "privacy", "pairs", against, "arm", "difference", "95 % interval"]


def _paired_row(arm: PairedArm, metric: Metric) -> list[str]:
    """Return means over the pairs; shares in percent and in percentage points."""
    interval = arm.interval
    low, high = interval.ends
    return [
        arm.label,
        arm.task or "same",
        arm.privacy,
        str(interval.num_values),
        score_text(metric, fmean(arm.reference)),
        score_text(metric, fmean(arm.own)),
        _change(metric, interval.mean),
        "none" if interval.half_width is None else f"{_change(metric, low)} to {_change(metric, high)}",
    ]


def _change(metric: Metric, difference: float) -> str:
    """Return a difference with its sign, and no unit."""
    return signed(difference) if metric.is_share else score_change(metric, difference)


def _start_and_final(metric: Metric) -> list[str]:
    """Return the header of a table of runs; what is no accuracy is named in it."""
    if metric.name == "accuracy":
        return list(HEADER)
    return [f"{title} {title_of(metric)}" if title in ("start", "final") else title for title in HEADER]


def _named(header: Sequence[str], name: str) -> list[str]:
    """Write the metric's name where a header has room for it."""
    return [title.replace("{}", name) for title in header]


def _paired_section(pairs: Sequence[PairedArm], against: str, metric: Metric) -> str:
    rows = [_paired_row(arm, metric) for arm in pairs]
    shown = table(_paired_header(against), rows, text_columns=3)
    note = paragraph(
        _PAIRED.format(title_of(metric), "in percentage points" if metric.is_share else "in its own unit"), kind="muted"
    )
    return section(f"Against {against}, pair by pair", [gallery([forest(pairs, metric, against=against)]), shown, note])


def _has_seeds(arms: Sequence[Arm]) -> bool:
    return any(arm.num_seeds > 1 for arm in arms)


def read_runs(run_dirs: Sequence[Path], metric: str | None = None) -> tuple[list[Run], Metric]:
    """Return the runs of directories, by privacy, method and seed, and what they are compared by.

    Raises:
        InputError: no directory is given, a file is missing or broken, or a run has no such metric.
    """
    if not run_dirs:
        raise InputError("Expected at least one run directory to compare, got none")
    found = [read_run(Path(run_dir)) for run_dir in run_dirs]
    by = metric_of(found, metric)
    runs = [measured_by(run, by, Path(run_dir)) for run, run_dir in zip(found, run_dirs, strict=True)]
    return sorted(runs, key=_order), by


def _order(run: Run) -> tuple[str, str, int, str]:
    summary = run.summary
    seed = -1 if summary.seed is None else summary.seed
    return group_name(run), summary.method, seed, summary.adapter_sha256


def _row(run: Run, metric: Metric) -> list[str]:
    summary, error = run.summary, run.states[-1].aggregation_error
    return [
        summary.method,
        group_name(run),
        seed_text(summary.seed),
        score_text(metric, summary.start_score),
        score_text(metric, summary.final_score),
        epsilon_text(summary.epsilon_max),
        bytes_text(summary.bytes_up),
        bytes_text(summary.bytes_down),
        "none" if error is None else short(error),
        seconds_text(summary.seconds),
        f"{summary.num_trained_parameters:,}",
    ]


def _arm_row(arm: Arm, metric: Metric) -> list[str]:
    """Return means over seeds; of epsilon the largest, as it is a bound."""
    spent = [run.summary.epsilon_max for run in arm.runs]
    errors = [run.states[-1].aggregation_error for run in arm.runs]
    return [
        arm.label,
        arm.privacy,
        str(arm.num_seeds),
        interval_text(metric, arm.interval(lambda run: run.summary.final_score)),
        epsilon_text(None if None in spent else max(one for one in spent if one is not None)),
        bytes_text(arm.interval(lambda run: run.summary.bytes_up).mean),
        bytes_text(arm.interval(lambda run: run.summary.bytes_down).mean),
        "none" if None in errors else short(arm.interval(lambda run: run.states[-1].aggregation_error or 0.0).mean),
        seconds_text(arm.interval(lambda run: run.summary.seconds).mean),
    ]


def _aligned(rows: Sequence[Sequence[str]], *, text_columns: int = TEXT_COLUMNS) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_cells(row, widths, text_columns)).rstrip() for row in rows)


def _cells(row: Sequence[str], widths: Sequence[int], text_columns: int) -> list[str]:
    pairs = list(zip(row, widths, strict=True))
    return [c.ljust(w) for c, w in pairs[:text_columns]] + [c.rjust(w) for c, w in pairs[text_columns:]]


def _scope(runs: Sequence[Run]) -> str:
    methods = sorted({run.summary.method for run in runs})
    seeds = list(dict.fromkeys(seed_text(run.summary.seed) for run in sorted(runs, key=lambda run: _order(run)[2])))
    return f"Methods: {', '.join(methods)}. Seeds: {', '.join(seeds)}."
