"""Whether the run learned, what else is told of its answers, and which labels it mixes up."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedlr.runs.report.layout import bullets, gallery, paragraph, table
from fedlr.runs.report.picture import Picture, clipped, drawn
from fedlr.runs.report.released import released, released_by
from fedlr.runs.report.run_files import Run, State
from fedlr.runs.report.svg import colour
from fedlr.runs.report.wording import count, percent
from fedlr.runs.verdict import LEARNED, Verdict

MOST_NUMBERED = 12  # classes, beyond which the counts would not be readable in their cells
MOST_NAMED = 30  # classes, beyond which only every so many is named
DARKEST = 0.6  # opacity of a cell with all examples of its row: ink stays readable on it


def did_it_learn(run: Run) -> list[str]:
    """Return the HTML of the section; empty where the files say nothing of it."""
    verdict, last = run.summary.verdict, released(run)
    parts = _verdict(verdict) if verdict else []
    if last.scores:
        parts.append(_scores(run))
        parts.append(paragraph(_note(run, verdict), kind="muted"))
    if last.confusion:
        parts.append(gallery([confusion(last.confusion, run.summary.label_names)]))
    return parts


def confusion(counts: Sequence[Sequence[int]], label_names: Sequence[str]) -> Picture:
    """Return the confusion matrix as a picture: true labels are rows, answers are columns."""
    names = list(label_names) if len(label_names) == len(counts) else [str(k) for k in range(len(counts))]
    is_wide = len(counts) > MOST_NUMBERED
    height_in = min(9.0, 1.3 + (0.25 if is_wide else 0.5) * len(counts))
    caption = (
        "A row is a true label, a column an answer, a number counts examples; the stronger its colour, the larger its "
        "share of the row. Right answers lie on the diagonal"
    )
    return drawn(
        "confusion",
        "Which labels are taken for which",
        caption + ("." if not is_wide else "; counts are in metrics.jsonl."),
        lambda figure: _paint(figure, counts, names),
        is_wide=is_wide,
        height_in=height_in,
    )


def _verdict(verdict: Verdict) -> list[str]:
    kind = "verdict" if verdict.word == LEARNED else "warning"
    parts = [
        paragraph(f"{verdict.word[0].upper()}{verdict.word[1:]}: {verdict.why}.", kind=kind),
        paragraph(f"{verdict.seen[0].upper()}{verdict.seen[1:]}."),
    ]
    if verdict.advice:
        parts += [paragraph("What to change, the likeliest first:"), bullets(verdict.advice)]
    return parts


def _scores(run: Run) -> str:
    arms = [run.states[0], released(run), *([released_by(run, run.no_privacy)] if run.no_privacy else [])]
    verdict, accuracy = run.summary.verdict, [percent(arm.accuracy) for arm in arms]
    if verdict:
        low, high = verdict.interval
        accuracy[1] += f" ({100 * low:.1f} to {percent(high)})"
    rows = [
        ["Accuracy, with its 95\u00a0% interval at the end" if verdict else "Accuracy", *accuracy],
        ["Balanced accuracy (mean recall)", *_shares(arms, "balanced_accuracy")],
        ["Macro-F1", *_numbers(arms, "macro_f1")],
        ["Matthews correlation", *_numbers(arms, "mcc")],
        ["Area under the ROC curve", *_numbers(arms, "auc")],
        ["Expected calibration error (15 bins)", *_shares(arms, "ece")],
        ["Mean loss (nats)", *("not finite" if arm.loss is None else f"{arm.loss:.3f}" for arm in arms)],
    ]
    header = ["Held-out rows", "Start", "This run", *(["Without privacy"] if run.no_privacy else [])]
    return table(header, rows)


def _note(run: Run, verdict: Verdict | None) -> str:
    rows = count(verdict.num_rows, "held-out row") if verdict else "held-out rows"
    told = (
        f"All of it is of the {rows}, which no client trains on. They are evaluated without noise: holding them out "
        "declares that the server may read them"
    )
    if run.summary.is_private:
        told += ", and epsilon, which is of the rows that clients train on, does not cover them"
    several = "" if len(run.summary.label_names) <= 2 else " The area is the mean of each class against the rest."
    return f"{told}. Shares of labels are of these rows alone.{several}"


def _shares(arms: Sequence[State], name: str) -> list[str]:
    return [percent(arm.scores[name]) if name in arm.scores else "none" for arm in arms]


def _numbers(arms: Sequence[State], name: str) -> list[str]:
    told = [f"{arm.scores[name]:.3f}" if name in arm.scores else "none" for arm in arms]
    return [text.replace("-", "−") for text in told]


def _paint(figure: Figure, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    axes, num_classes = figure.subplots(), len(counts)
    for row, line in enumerate(counts):
        for column, number in enumerate(line):
            if number:  # of many classes most cells are empty
                opacity = DARKEST * number / sum(line)
                look = colour("blue" if row == column else "orange")
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=look, alpha=opacity))
            if num_classes <= MOST_NUMBERED:
                axes.text(column, row, f"{number:,}", ha="center", va="center", fontsize=9)
    every = -(-num_classes // MOST_NAMED)
    shown = range(0, num_classes, every)
    is_crowded = num_classes > 4 or max(map(len, names)) > 12
    axes.set_xticks(shown, [clipped(names[k]) for k in shown], rotation=45 if is_crowded else 0)
    if is_crowded:
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
    axes.set_yticks(shown, [clipped(names[k]) for k in shown])
    axes.grid(False)
    edges = [k - 0.5 for k in range(num_classes + 1)] if num_classes <= MOST_NAMED else [-0.5, num_classes - 0.5]
    for draw in (axes.hlines, axes.vlines):
        draw(edges, -0.5, num_classes - 0.5, color=colour("grid"), linewidth=0.8)
    axes.set_xlim(-0.5, num_classes - 0.5)
    axes.set_ylim(num_classes - 0.5, -0.5)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("Answer")
    axes.set_ylabel("True label")
