"""Did it learn? The rule for tasks without classes, whose rows have no right answer to count.

*Learned*: the 95 % interval of the final mean loss of held-out rows lies below the loss at the start, and below that of
the best answer that is the same for all rows, where the task has one. *Did not learn*: nothing of the run counted, or
it lies above. *Cannot be told*: all else. The interval is that of a mean over independent rows (normal approximation),
and does not use that both losses are of the same rows: it says less often that a model learned than a paired one would.
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
from fedlr.tasks.evaluation import Metric

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
    last of them with `loss_error`, the standard error of the mean loss, and where targets are few numbers with
    `loss_of_one_answer`, the mean loss of the best answer that is the same for all rows.

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
        bar, whose = min((start, "the start"), (last.get("loss_of_one_answer") or start, "one answer for all rows"))
        if high < bar:
            word, why = LEARNED, f"its loss on held-out rows is below that of {whose}"
        elif low >= bar:
            word, why = DID_NOT_LEARN, f"its loss on held-out rows is not below that of {whose}"
        else:
            word, why = CANNOT_BE_TOLD, f"{held_out.num_rows} held-out rows do not tell it from {whose}"
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
