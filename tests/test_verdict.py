"""The verdict on a run is right as often as it says: intervals cover, and what ignores the text has not learned.

Mutants this file kills: a normal interval where an exact one is due; a bar at chance where one label is common; rows of
labels that never occur counted in the mean recall; a start that was good already and passes for learning.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedlr.runs.recorder import held_out_labels, recipe_of
from fedlr.runs.verdict import (
    CANNOT_BE_TOLD,
    DID_NOT_LEARN,
    LEARNED,
    HeldOut,
    Recipe,
    Result,
    advice,
    binomial_interval,
    enough_rows,
    judge,
    least_told,
    verdict_lines,
)
from tests.simulations.small_runs import experiment

EVEN, SKEWED = HeldOut({"bad": 500, "good": 500}), HeldOut({"ham": 900, "spam": 100})
FINE = Recipe(has_random_head=False, num_rounds=20)


def outcome(final: float, *, start: float = 0.5, **changes: object) -> Result:
    return replace(Result(start, final, 0.69, 0.6), **changes)


def binomials(num_rows: int, share: float, *, draws: int = 20_000) -> np.ndarray:
    return np.random.default_rng(0).binomial(num_rows, share, draws)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.93])
@pytest.mark.parametrize("num_rows", [12, 120])
def test_the_interval_covers_at_least_95_percent(num_rows: int, share: float) -> None:
    ends = {hits: binomial_interval(hits, num_rows) for hits in range(num_rows + 1)}
    covered = np.mean([ends[hits][0] <= share <= ends[hits][1] for hits in binomials(num_rows, share)])
    assert covered >= 0.95 - 0.005  # three standard deviations of 20,000 draws


def test_published_intervals() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 5.
    for hits, rows, low, high in ((81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684)):
        assert binomial_interval(hits, rows) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("rows", "found", "word"),
    [
        (EVEN, outcome(0.80), LEARNED),
        (EVEN, outcome(0.475), DID_NOT_LEARN),
        (EVEN, outcome(0.53), CANNOT_BE_TOLD),
        (HeldOut({"bad": 60, "good": 60}), outcome(0.475), CANNOT_BE_TOLD),
        (SKEWED, outcome(0.89), DID_NOT_LEARN),  # 39 points above chance, and below always answering ham
        (SKEWED, outcome(0.95), LEARNED),
        (EVEN, outcome(0.80, start=0.80), DID_NOT_LEARN),  # nothing was learned: it was there
        (EVEN, outcome(0.80, start=0.70), LEARNED),
        (EVEN, outcome(0.99, problem="no usable update"), DID_NOT_LEARN),
        (EVEN, outcome(1.0), LEARNED),
        (HeldOut({"only": 30, "never": 0}), outcome(1.0, start=1.0), DID_NOT_LEARN),
    ],
)
def test_words(rows: HeldOut, found: Result, word: str) -> None:
    assert judge(rows, found, FINE).word == word


def test_rare_labels_that_are_found_count_although_accuracy_falls() -> None:
    found = outcome(0.80, confusion=((720, 180), (20, 80)))
    verdict = judge(SKEWED, found, FINE)
    assert (verdict.word, "no oftener right" in verdict.why) == (LEARNED, True)
    assert judge(SKEWED, replace(found, confusion=((900, 0), (100, 0)), final_accuracy=0.9), FINE).word != LEARNED


@pytest.mark.parametrize("counts", [(60, 60), (108, 12), (40, 40, 40), (70, 30, 15, 5, 0)])
def test_answers_that_ignore_the_text_pass_for_learning_in_at_most_5_percent(counts: tuple[int, ...]) -> None:
    generator, rows = np.random.default_rng(1), HeldOut({str(k): n for k, n in enumerate(counts)})
    num_learned, num_draws = 0, 1_000
    for _ in range(num_draws):
        shares = generator.dirichlet(np.full(len(counts), 0.5))
        confusion = [generator.multinomial(n, shares).tolist() for n in counts]
        accuracy = sum(line[k] for k, line in enumerate(confusion)) / sum(counts)
        found = outcome(accuracy, start=1 / len(counts), confusion=confusion)
        num_learned += judge(rows, found, FINE).word == LEARNED
    assert num_learned <= 0.05 * num_draws + 3 * np.sqrt(0.05 * 0.95 * num_draws)


def test_the_least_accuracy_that_is_told_is_the_least() -> None:
    for rows in (EVEN, SKEWED, HeldOut({"a": 70, "b": 30})):
        least = least_told(rows)
        assert least is not None and judge(rows, outcome(least), FINE).word == LEARNED
        assert judge(rows, outcome(least - 1 / rows.num_rows), FINE).word != LEARNED
    assert least_told(HeldOut({"a": 3, "b": 0})) is None


def test_advice_comes_in_the_order_of_what_is_likeliest() -> None:
    small = HeldOut({"ham": 90, "spam": 10})
    bad = Recipe(has_random_head=True, pooling="the first token", num_rounds=3, lr=2.0)
    found = outcome(0.9, final_loss=0.69, noise_to_signal=0.97, confusion=((90, 0), (10, 0)))
    told = judge(small, found, bad).advice
    keys = (*("train_head", "pooling", "optimizer.lr", "cohort_size", "num_rounds", "label_weights", "num_test"),)
    assert [key in text for key, text in zip(keys, told, strict=True)] == [True] * 7
    assert "nearly every answer is one label" in told[5]
    assert advice(SKEWED, replace(FINE, has_label_weights=True)) == ()
    assert judge(EVEN, outcome(0.8), bad).advice == ()


def test_the_rate_is_judged_by_the_loss_and_by_the_noise_that_gathers() -> None:
    def about(noise: float | None, final_loss: float) -> tuple[str, ...]:
        return advice(EVEN, replace(FINE, gathered_noise=noise, lr=10.0), outcome(0.5, final_loss=final_loss))

    assert "lower trainer.optimizer.lr to about 2" in about(4.0, 0.6)[0]
    assert "rose" in about(0.5, 0.9)[0]
    assert "raise trainer.optimizer.lr" in about(0.1, 0.69)[0]
    assert "raise trainer.optimizer.lr (" not in about(1.5, 0.69)[0]  # more noise would gather
    assert "num_rounds" in about(None, 0.5)[0]


def test_enough_rows_are_enough() -> None:
    for bar in (0.5, 0.9, 0.98):
        rows = enough_rows(bar)
        low, high = binomial_interval(bar * rows, rows)
        assert (high - low) / 2 <= 1.25 * min(0.05, (1 - bar) / 2)
    assert enough_rows(1.0) == 0


def test_a_record_is_json_and_makes_the_lines() -> None:
    record = judge(EVEN, outcome(0.475), FINE).record()
    assert json.loads(json.dumps(record)) == record
    first, seen, *more = verdict_lines(record)
    assert first.startswith("\ndid it learn? did not learn: ") and "47.5 % of 1,000" in seen
    assert more and more[0].startswith("  first: ")


def test_settings_are_those_of_the_configuration() -> None:
    frozen = recipe_of(experiment("adapter.train_head=false"), head_is_drawn=True, noise_sd=0.3)
    assert (frozen.has_random_head, frozen.pooling, frozen.num_rounds) == (True, None, 2)
    assert frozen.gathered_noise == pytest.approx(0.3 * (2 / 3) ** 0.5)
    with_momentum = recipe_of(experiment("server_momentum=0.5"), head_is_drawn=True, noise_sd=0.3)
    assert with_momentum.gathered_noise == pytest.approx(0.3 * (3.25 / 3) ** 0.5)
    assert not recipe_of(experiment("adapter.train_head=true"), head_is_drawn=True).has_random_head
    assert not recipe_of(experiment("adapter.train_head=false"), head_is_drawn=False).has_random_head


def test_labels_are_counted_in_the_order_of_their_names() -> None:
    found = held_out_labels(np.array([2, 0, 2]), ("a", "b", "c"))
    assert (found.label_counts, found.majority_label, found.chance) == ({"a": 1, "b": 0, "c": 2}, "c", 1 / 3)
