"""Did it learn? The rule for tasks without classes, whose rows have no right answer to count.

*Learned*: the 95 % interval of the final mean loss of held-out rows lies below the loss at the start. *Did not learn*:
nothing of the run counted, or it lies above. *Cannot be told*: all else, and where rows have any of several labels and
micro-F1 fell: to answer "no label" more often lowers that loss too, whatever a text says. The interval is that of a
mean over independent rows (normal approximation), and does not use that both losses are of the same rows: it says less
often that a model learned than a paired one would.
"""

from collections.abc import Mapping

from fedlr.runs.verdict import (
    CANNOT_BE_TOLD,
    DID_NOT_LEARN,
    LEARNED,
    HeldOut,
    Recipe,
    Result,
    Verdict,
    rate_and_noise_advice,
)
from fedlr.tasks.evaluation import MICRO_F1, Metric

DEVIATIONS = 1.96  # of a standard normal variable, in 95 of 100 cases


def judge_loss(
    held_out: HeldOut,
    outcome: Result,
    recipe: Recipe,
    *,
    metric: Metric,
    first: Mapping[str, float | None],
    last: Mapping[str, float | None],
) -> Verdict:
    """Say whether a run learned, by the rule above; `first` and `last` are the measures of its start and its end, the
    last of them with `loss_error`, the standard error of the mean loss.

    >>> from fedlr.tasks.evaluation import ACCURACY
    >>> result = Result(0.2, 0.3, 4.0, 3.0)
    >>> judge_loss(HeldOut({}, 100), result, Recipe(False), metric=ACCURACY, first={}, last={"loss_error": 0.1}).word
    'learned'
    """
    start, final, error = outcome.start_loss, outcome.final_loss, last.get("loss_error")
    low, high = 0.0, 0.0
    if outcome.problem is not None:
        word, why = DID_NOT_LEARN, "nothing of the run counted"
    elif start is None or final is None or error is None:
        word, why = CANNOT_BE_TOLD, "its losses are not finite"
    else:
        low, high = final - DEVIATIONS * error, final + DEVIATIONS * error
        if high < start and metric == MICRO_F1 and _fell(first.get(metric.name), last.get(metric.name)):
            word, why = CANNOT_BE_TOLD, "its loss on held-out rows is below that of the start, and so is its micro-F1"
        elif high < start:
            word, why = LEARNED, "its loss on held-out rows is below that of the start"
        elif low >= start:
            word, why = DID_NOT_LEARN, "its loss on held-out rows is not below that of the start"
        else:
            word, why = CANNOT_BE_TOLD, f"{held_out.num_rows} held-out rows do not tell it from the start"
    return Verdict(
        word=word,
        why=why,
        seen=_seen(held_out, outcome, metric, first, last),
        advice=() if word == LEARNED else rate_and_noise_advice(recipe, outcome),
        interval=(low, high),
        num_rows=held_out.num_rows,
        majority_label="",
        majority_share=0.0,
        chance=0.0,
        start_loss=start,
        final_loss=final,
        noise_to_signal=outcome.noise_to_signal,
    )


def _fell(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before


def _seen(
    held_out: HeldOut,
    outcome: Result,
    metric: Metric,
    first: Mapping[str, float | None],
    last: Mapping[str, float | None],
) -> str:
    told = f"over {held_out.num_rows:,} held-out rows {metric.name} {_moved(metric, metric.name, first, last)}"
    if f"macro_{metric.name}" in last:
        told += f" (mean of the groups {_moved(metric, f'macro_{metric.name}', first, last)})"
    losses = [f"{loss:.3f}" if loss is not None else "not finite" for loss in (outcome.start_loss, outcome.final_loss)]
    told += f"; the loss moved from {losses[0]} to {losses[1]}"
    if outcome.noise_to_signal is None:
        return told
    return f"{told}; the noise is {100 * outcome.noise_to_signal:.1f} % of a round's mean update"


def _moved(metric: Metric, name: str, first: Mapping[str, float | None], last: Mapping[str, float | None]) -> str:
    start, final = ("not finite" if (x := m.get(name)) is None else metric.text(x) for m in (first, last))
    return f"moved from {start} to {final}"
