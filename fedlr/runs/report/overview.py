"""The part that everybody reads: one sentence, one card, and one table beside the two baselines."""

from statistics import fmean, quantiles

from fedlr.runs.report.layout import details, paragraph, table, tiles
from fedlr.runs.report.picture import MOST_CLIENTS
from fedlr.runs.report.privacy_text import headline
from fedlr.runs.report.released import released_by
from fedlr.runs.report.run_files import Alone, Run
from fedlr.runs.report.wording import (
    bytes_text,
    count,
    epsilon_text,
    score_change,
    score_text,
    seconds_text,
    seed_text,
)
from fedlr.tasks.evaluation import ACCURACY, Metric


def sentence(run: Run) -> str:
    """Return the run in one sentence."""
    summary, rounds = run.summary, run.states[-1].rounds_completed
    start, final = (score_text(summary.metric, score) for score in (summary.start_score, summary.final_score))
    difference = summary.final_score - summary.start_score
    moved = "rose" if difference > 0 else "fell"
    change = f"{moved} from {start} to {final}" if difference else f"stayed at {final}"
    return (
        f"{count(summary.num_clients, 'client')} trained one shared adapter with {summary.method} over "
        f"{count(rounds, 'round')}; {summary.metric.name} {change}."
    )


def headline_card(run: Run) -> str:
    """Return the HTML of the headline card."""
    summary = run.summary
    privacy, remark = headline(run)
    metric = summary.metric
    change = score_change(metric, summary.final_score - summary.start_score)
    start = f"start {score_text(metric, summary.start_score)} ({change})"
    rounds = run.states[-1].rounds_completed
    return tiles(
        [
            (f"Final {metric.name}", score_text(metric, summary.final_score), start),
            ("Privacy", privacy, remark),
            ("Method", summary.method, f"seed {seed_text(summary.seed)}"),
            ("Clients", f"{summary.num_clients:,}", f"{summary.cohort_size:,} asked in each round"),
            ("Rounds", f"{rounds:,}", f"of {summary.num_rounds:,} planned"),
            ("Parameters trained", f"{summary.num_trained_parameters:,}", "all others are fixed"),
            (
                "Traffic",
                f"{bytes_text(summary.bytes_up)} up",
                f"{bytes_text(summary.bytes_down)} down, all clients",
            ),
            (
                "Adapter SHA-256",
                summary.adapter_sha256[:12],
                f"whole below; made in {seconds_text(summary.seconds)}",
            ),
        ]
    )


def worth(run: Run) -> list[str]:
    """Return the HTML that puts the run beside its start and what was trained for comparison."""
    summary = run.summary
    rows = [
        _row(run, "Start, before any training", summary.start_score, "nothing spent"),
        [f"This run ({summary.method})", headline(run)[0], score_text(summary.metric, summary.final_score), ""],
    ]
    if run.no_privacy:
        rows.append(
            _row(run, "The same without privacy", released_by(run, run.no_privacy).score, "no differential privacy")
        )
    if run.centralised:
        rows.append(
            _row(run, "All rows at one place", released_by(run, run.centralised).score, "no differential privacy")
        )
    parts = [
        table(
            ["Training", "Privacy", summary.metric.heading, "Beside this run"],
            rows + _alone_rows(run),
            text_columns=2,
            strong_row=1,
        )
    ]
    if not run.no_privacy:
        parts.append(paragraph("There is no run without privacy to compare with (baselines/no_privacy).", kind="muted"))
    return parts + (_each_alone(run) if run.alone else [_NO_ALONE])


_NO_ALONE = paragraph("There are no clients trained alone to compare with (baselines/alone.json).", kind="muted")


def _alone_rows(run: Run) -> list[list[str]]:
    if not run.alone:
        return []
    scores = [one.score for one in run.alone]
    spent = [one.epsilon for one in run.alone if one.epsilon is not None]
    unstated = "no differential privacy" if run.alone_privacy == "none" else "not stated"
    privacy = f"ε = {epsilon_text(max(spent))}, max over clients" if spent else unstated
    return [
        _row(run, f"Each client alone, mean of {len(scores)}", fmean(scores), privacy),
        _row(run, "Each client alone, lowest", min(scores), ""),
        _row(run, "Each client alone, highest", max(scores), ""),
    ]


def _each_alone(run: Run) -> list[str]:
    final, metric = run.summary.final_score, run.summary.metric
    beaten = sum(one.score < final if metric.higher_is_better else one.score > final for one in run.alone)
    told = f"The shared adapter is {_better(metric)} than {beaten:,} of {count(len(run.alone), 'client')} alone"
    told += " (trained with privacy too)." if run.alone_privacy != "none" else " (trained without privacy)."
    header = f"{metric.heading} alone"
    if len(run.alone) > MOST_CLIENTS:
        tenths = quantiles([one.score for one in run.alone], n=10, method="inclusive")
        rows = [
            [f"{n} of 10", score_text(metric, tenth), score_change(metric, tenth - final)]
            for n, tenth in enumerate(tenths, start=1)
        ]
        shown = table(["Clients below", header, "Beside this run"], rows)
        return [paragraph(told), details(f"{count(len(run.alone), 'client')} alone, by tenths", [shown])]
    rows = [
        [str(o.client_id), score_text(metric, o.score), score_change(metric, o.score - final), _spent(o)]
        for o in run.alone
    ]
    shown = table(["Client", header, "Beside this run", "Epsilon"], rows)
    return [paragraph(told), details(f"{count(len(run.alone), 'client')} alone, one by one", [shown])]


def _better(metric: Metric) -> str:
    return "more accurate" if metric == ACCURACY else "better"


def _row(run: Run, name: str, score: float, privacy: str) -> list[str]:
    metric = run.summary.metric
    return [name, privacy, score_text(metric, score), score_change(metric, score - run.summary.final_score)]


def _spent(one: Alone) -> str:
    return epsilon_text(one.epsilon)
