"""Did it learn? One rule for every place that says so: the terminal, summary.json, the report, and a run's plan.

The rule, on held-out rows that the server may read (`fedlr.rounds.evaluate`):

- *learned*: the exact 95 % interval of the final accuracy (Clopper and Pearson 1934) lies above what always answering
  the commonest label reaches; and above the start, where the start was above that already. Or the mean share of each
  class that is found is above chance beyond doubt: the mean of the lower ends of the intervals of all classes, at
  0.05 / K each, exceeds 1 / K, which no answer that ignores the text does.
- *did not learn*: nothing of the run counted, or the interval's upper end is less than a useful gain above that bar:
  5 points, or half of what is left to 100 % where that is less.
- *cannot be told*: all else. More held-out rows would tell.

Epsilon does not cover held-out rows and does not need to: nothing here is computed from a row that a client trains on,
but through released updates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from scipy.special import betaincinv

LEARNED, DID_NOT_LEARN, CANNOT_BE_TOLD = "learned", "did not learn", "cannot be told"
CONFIDENCE = 0.95
USEFUL_GAIN = 0.05
MOSTLY_NOISE = 0.9  # of noise_to_signal
# Gathered in one trained number. Of a head on features of length 1, from 0.3 to 0.8 was near the best (docs/log.md).
ENOUGH_NOISE, LARGE_NOISE = 0.8, 2.0
HARDLY_MOVED, ROSE = 0.01, 0.02  # of the loss at the start
FEW_ROUNDS = 10
SKEWED = 0.75  # share of the commonest label


@dataclass(frozen=True)
class HeldOut:
    """How often each label occurs in the held-out rows, in the order of the label indices."""

    label_counts: Mapping[str, int]
    num_unlabelled: int = 0  # rows of a task without classes

    @property
    def num_rows(self) -> int:
        """All rows."""
        return sum(self.label_counts.values()) + self.num_unlabelled

    @property
    def majority_label(self) -> str:
        """The commonest label, the first of several."""
        return max(self.label_counts, key=lambda label: self.label_counts[label])

    @property
    def majority_share(self) -> float:
        """What always answering it reaches."""
        return self.label_counts[self.majority_label] / self.num_rows

    @property
    def chance(self) -> float:
        """What guessing among all labels reaches."""
        return 1 / len(self.label_counts)


@dataclass(frozen=True)
class Recipe:
    """What of a configuration decides whether a run can learn; None: not known."""

    has_random_head: bool  # that stays as it was drawn
    pooling: str | None = None  # what the classifier reads, where it is not the mean over the tokens
    num_rounds: int = 0
    lr: float | None = None
    gathered_noise: float | None = None
    has_label_weights: bool = False
    of_clients: bool = False  # the noise hides whole clients, and the server adds it


@dataclass(frozen=True)
class Result:
    """What the metrics of a run say of its start and its end; of each class how often it occurs and is found."""

    start_accuracy: float
    final_accuracy: float
    start_loss: float | None
    final_loss: float | None
    noise_to_signal: float | None = None
    confusion: Sequence[Sequence[int]] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a run learned, why one says so, and what to change first where it did not."""

    word: str
    why: str
    seen: str  # the numbers behind it, as a sentence
    advice: tuple[str, ...]
    interval: tuple[float, float]
    num_rows: int
    majority_label: str
    majority_share: float
    chance: float
    start_loss: float | None
    final_loss: float | None
    noise_to_signal: float | None

    def record(self) -> dict[str, Any]:
        """Return the verdict as JSON can hold it."""
        return {**asdict(self), "advice": list(self.advice), "interval": list(self.interval)}


def binomial_interval(hits: float, num_rows: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact confidence interval of a share (Clopper and Pearson 1934): it never covers less than it says.

    `hits` may be a mean over several models, whose share varies less over rows than one model's.

    >>> [round(end, 4) for end in binomial_interval(57, 120)]
    [0.3831, 0.5682]
    >>> binomial_interval(0, 10)[0], binomial_interval(10, 10)[1]
    (0.0, 1.0)
    """
    tail = (1 - confidence) / 2
    misses = num_rows - hits
    low = float(betaincinv(hits, misses + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, misses, 1 - tail)) if misses > 0 else 1.0
    return low, high


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the record of a verdict as lines for a terminal."""
    firsts = ["  first: ", *["  then:  "] * len(record["advice"])]
    return [
        f"\ndid it learn? {record['word']}: {record['why']}",
        f"  {record['seen']}",
        *(f"{first}{text}" for first, text in zip(firsts, record["advice"], strict=False)),
    ]


def useful_gain(bar: float) -> float:
    """Return how many points above a bar are worth a run.

    >>> useful_gain(0.5), round(useful_gain(0.98), 3)
    (0.05, 0.01)
    """
    return min(USEFUL_GAIN, (1 - bar) / 2)


def least_told(held_out: HeldOut) -> float | None:
    """Return the least accuracy at which these rows tell that a model learned; None: no accuracy does.

    >>> least_told(HeldOut({"ham": 60, "spam": 60}))
    0.6
    """
    num_rows, share = held_out.num_rows, held_out.majority_share
    told = (n for n in range(math.ceil(share * num_rows), num_rows + 1) if binomial_interval(n, num_rows)[0] > share)
    return next((hits / num_rows for hits in told), None)


def enough_rows(bar: float) -> int:
    """Return about how many held-out rows tell a useful gain above a bar from none.

    >>> enough_rows(0.5), enough_rows(0.9)
    (400, 140)
    """
    gain = useful_gain(bar)
    return 0 if gain <= 0 else math.ceil((1.96 / gain) ** 2 * bar * (1 - bar) / 20) * 20


def gathered_noise(noise_sd: float | None, *, rounds: float, cohort_size: int) -> float | None:
    """Return the standard deviation of all noise in one trained number after the run, of a plain mean of clients.

    Public: constants of the configuration alone. None where that of one update is not known.

    `rounds` is h of `fedlr.training.rates`: how many rounds' noise there is, each at its own rate.

    >>> gathered_noise(0.2, rounds=20, cohort_size=5)
    0.4
    """
    if noise_sd is None:
        return None
    return noise_sd * math.sqrt(rounds / cohort_size)


def judge(held_out: HeldOut, outcome: Result, recipe: Recipe) -> Verdict:
    """Say whether a run learned, by the rule above.

    >>> chance = Result(0.5, 0.475, 0.7, 0.71)
    >>> judge(HeldOut({"bad": 500, "good": 500}), chance, Recipe(has_random_head=True)).word
    'did not learn'
    >>> judge(HeldOut({"bad": 60, "good": 60}), chance, Recipe(has_random_head=True)).word
    'cannot be told'
    >>> judge(HeldOut({"bad": 60, "good": 60}), Result(0.5, 0.9, 0.7, 0.3), Recipe(has_random_head=True)).word
    'learned'
    """
    num_rows = held_out.num_rows
    interval = binomial_interval(outcome.final_accuracy * num_rows, num_rows)
    word, why = _word(held_out, outcome, interval)
    return Verdict(
        word=word,
        why=why,
        seen=_seen(held_out, outcome, interval),
        advice=() if word == LEARNED else advice(held_out, recipe, outcome),
        interval=interval,
        num_rows=num_rows,
        majority_label=held_out.majority_label,
        majority_share=held_out.majority_share,
        chance=held_out.chance,
        start_loss=outcome.start_loss,
        final_loss=outcome.final_loss,
        noise_to_signal=outcome.noise_to_signal,
    )


def advice(held_out: HeldOut, recipe: Recipe, outcome: Result | None = None) -> tuple[str, ...]:
    """Return what to change, the likeliest first; without an outcome what can be known before a run.

    >>> advice(HeldOut({"bad": 500, "good": 500}), Recipe(has_random_head=True, num_rounds=20))
    ('the classification head is random and stays so: set adapter.train_head=true',)
    """
    found = []
    if recipe.has_random_head:
        found.append("the classification head is random and stays so: set adapter.train_head=true")
    if recipe.pooling is not None:
        found.append(f"the classifier reads {recipe.pooling}: set model.pooling=mean_normalised")
    found += _about_rate(recipe, outcome)
    found += _about_noise(recipe, outcome)
    found += _about_labels(held_out, recipe, outcome)
    if (wanted := enough_rows(held_out.majority_share)) > held_out.num_rows:
        told = f"{held_out.num_rows} held-out rows tell no small gain: hold out about {wanted:,} (data.num_test)"
        found.append(told)
    if outcome is not None and not found:
        found.append("raise num_rounds, or try other values of trainer.optimizer.lr")
    return tuple(found)


def rate_and_noise_advice(recipe: Recipe, outcome: Result) -> tuple[str, ...]:
    """Return what to change of rate, noise and rounds, the likeliest first."""
    found = [*_about_rate(recipe, outcome), *_about_noise(recipe, outcome)]
    return tuple(found or ["raise num_rounds, or try other values of trainer.optimizer.lr"])


def noise_of_rounds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median over rounds of `noise_to_signal`, from the lines of metrics.jsonl; None where none has it.

    >>> noise_of_rounds([{"noise_to_signal": None}, {"noise_to_signal": 0.5}, {"noise_to_signal": 0.9}])
    0.7
    """
    known = [row["noise_to_signal"] for row in rows if row.get("noise_to_signal") is not None]
    return median(known) if known else None


def _word(held_out: HeldOut, outcome: Result, interval: tuple[float, float]) -> tuple[str, str]:
    label, share = held_out.majority_label, held_out.majority_share
    if outcome.problem is not None:
        return DID_NOT_LEARN, "nothing of the run counted"
    always = f'always answering "{label}"'
    start = binomial_interval(outcome.start_accuracy * held_out.num_rows, held_out.num_rows)
    bar, rival = (outcome.start_accuracy, "the start") if start[0] > share else (share, always)
    if interval[0] > bar:
        return LEARNED, f"it is better than {rival}"
    if rival == always and _finds_classes(outcome.confusion):
        return LEARNED, f"it finds labels better than by chance, though it is no oftener right than {always}"
    if interval[1] <= bar + useful_gain(bar):
        return DID_NOT_LEARN, f"it is no better than {rival}, or by less than {_points(useful_gain(bar))}"
    return CANNOT_BE_TOLD, f"{held_out.num_rows} held-out rows do not tell it from {rival}"


def _finds_classes(confusion: Sequence[Sequence[int]] | None) -> bool:
    """Whether recalls are above chance: their lower ends hold together with 97.5 %, by Bonferroni's inequality."""
    rows = [(row[k], sum(row)) for k, row in enumerate(confusion or ()) if sum(row)]
    if len(rows) < 2:
        return False
    each = 1 - (1 - CONFIDENCE) / len(rows)
    lows = [binomial_interval(hits, total, confidence=each)[0] for hits, total in rows]
    return sum(lows) / len(lows) > 1 / len(lows)


def _seen(held_out: HeldOut, outcome: Result, interval: tuple[float, float]) -> str:
    low, high = interval
    losses = [f"{loss:.3f}" if loss is not None else "not finite" for loss in (outcome.start_loss, outcome.final_loss)]
    told = (
        f"{_percent(outcome.final_accuracy)} of {held_out.num_rows:,} held-out rows are right (95 % interval "
        f'{100 * low:.1f} to {_percent(high)}), "{held_out.majority_label}" alone would be in '
        f"{_percent(held_out.majority_share)} and a guess in {_percent(held_out.chance)}; the loss moved from "
        f"{losses[0]} to {losses[1]}"
    )
    if outcome.noise_to_signal is None:
        return told
    return f"{told}; the noise is {_percent(outcome.noise_to_signal)} of a round's mean update"


def _about_rate(recipe: Recipe, outcome: Result | None) -> list[str]:
    noise, lr = recipe.gathered_noise, recipe.lr
    if noise is not None and noise > LARGE_NOISE:
        to = "" if lr is None else f" to about {lr * ENOUGH_NOISE / noise:.2g}"
        return [f"noise of {noise:.2g} gathers in each trained number: lower trainer.optimizer.lr{to}"]
    if outcome is None or outcome.start_loss is None or outcome.final_loss is None:
        return []
    moved = (outcome.final_loss - outcome.start_loss) / max(outcome.start_loss, 1e-9)
    gathered = "" if noise is None else f" (noise of {noise:.2g} gathers in each trained number)"
    if moved > ROSE:
        return [f"the loss rose: lower trainer.optimizer.lr{gathered}"]
    if abs(moved) < HARDLY_MOVED and (noise is None or noise < ENOUGH_NOISE):
        return [f"the loss hardly moved: raise trainer.optimizer.lr{gathered}"]
    return []


def _about_noise(recipe: Recipe, outcome: Result | None) -> list[str]:
    found = []
    if outcome is not None and (outcome.noise_to_signal or 0) > MOSTLY_NOISE:
        rows = "" if recipe.of_clients else "more rows (trainer.sample_rate, more data), "
        found.append(
            f"a round's update is mostly noise: take {rows}more clients a round (cohort_size), fewer trained numbers "
            "(adapter.rank, adapter.layers), or a larger "
            + ("privacy.client_epsilon" if recipe.of_clients else "privacy.epsilon")
        )
    if recipe.num_rounds < FEW_ROUNDS:
        found.append(f"{recipe.num_rounds} rounds are few: raise num_rounds")
    return found


def _about_labels(held_out: HeldOut, recipe: Recipe, outcome: Result | None) -> list[str]:
    named = [sum(column) for column in zip(*(outcome.confusion or ()), strict=True)] if outcome else []
    is_constant = bool(named) and max(named) >= CONFIDENCE * sum(named)
    is_skewed = held_out.majority_share >= SKEWED
    if recipe.has_label_weights or not is_skewed:
        return []
    always = ", and nearly every answer is one label" if is_constant else ""
    return [
        f'"{held_out.majority_label}" is {_percent(held_out.majority_share)} of the held-out rows{always}: declare '
        "data.label_weights, more for the rare labels"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
