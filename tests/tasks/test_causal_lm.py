"""How good a language model is: perplexity over tokens, loss over rows, groups that count the same, and one verdict."""

import math

import numpy as np
import pytest
import torch

from fedlr.data.conversations import ASSISTANT, USER, Conversations, Turn
from fedlr.errors import InputError
from fedlr.models.causal import tiny_random_causal
from fedlr.rounds import evaluate as evaluation_of_rounds
from fedlr.rounds.evaluate import evaluate
from fedlr.runs.loss_verdict import judge_loss
from fedlr.runs.verdict import HeldOut, Recipe, Result
from fedlr.tasks.causal_lm import PERPLEXITY, CausalLM, TextAnswers, text_evaluation
from fedlr.tasks.losses import IGNORED_LABEL
from fedlr.tasks.losses import causal_lm as plain
from fedlr.tasks.synthetic import synthetic_text
from fedlr.tasks.synthetic_chat import WORDS, synthetic_chat


def test_perplexity_is_of_tokens_and_the_loss_is_of_rows() -> None:
    found = [
        TextAnswers(np.array([2.0, 0.0]), np.array([1, 0]), np.array([1, 0])),
        TextAnswers(np.array([3.0]), np.array([2]), np.array([3])),
    ]
    told = text_evaluation(found)
    assert told.measures["perplexity"] == pytest.approx(math.exp(5 / 4))
    assert told.loss == pytest.approx((2 + 1) / 2) and told.accuracy == 3 / 4
    assert told.measures["loss_error"] == pytest.approx(np.std([2, 1], ddof=1) / math.sqrt(2))
    with pytest.raises(InputError, match="held-out rows with a token of an answer"):
        text_evaluation([TextAnswers(np.zeros(1), np.zeros(1), np.zeros(1))])


def test_an_evaluation_is_that_of_the_logits_and_groups_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base, task, data = tiny_random_causal(seed=2), CausalLM(), synthetic_chat(60, 3)
    task.check(base, data, max_length=40)
    examples = task.encode(base, data, max_length=40)
    told = evaluate(base.network, examples, task=task, token_budget=256)
    batch = examples.batch(range(60))
    with torch.no_grad():
        losses = plain(base.network(**batch.inputs).logits, batch.targets)
    assert told.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert told.measures["perplexity"] == pytest.approx(
        math.exp(float(losses.double().numpy() @ examples.num_scored / examples.num_scored.sum())), rel=1e-5
    )
    groups = [told.measures[f"perplexity of {name}"] for name in sorted(set(data.groups or ()))]
    assert len(groups) == 4
    assert told.measures["macro_perplexity"] == pytest.approx(math.prod(groups) ** 0.25)
    monkeypatch.setattr(evaluation_of_rounds, "MOST_GROUPS", 3)
    whole = evaluate(base.network, examples, task=task).measures
    assert {name for name in whole if not name.startswith("nats of ")} == {"perplexity", "loss_error"}
    with torch.no_grad():
        nats = -base.network(**batch.inputs).logits[:, :-1].log_softmax(-1)
    wanted = batch.targets[:, 1:]
    first = (wanted != IGNORED_LABEL).int().argmax(dim=1)
    rows = torch.arange(60)
    assert whole["nats of token 1"] == pytest.approx(float(nats[rows, first, wanted[rows, first]].mean()), rel=1e-5)
    ends = wanted == base.tokenizer.eos_token_id
    at_end = nats[..., base.tokenizer.eos_token_id][ends].mean()
    assert whole["nats of the end mark"] == pytest.approx(float(at_end), rel=1e-5)


def test_a_probe_has_a_loss_with_a_gradient() -> None:
    base, task = tiny_random_causal(seed=2), CausalLM()
    batch = task.probe(base.network)
    assert (task.losses(base.network, batch) > math.log(len(base.tokenizer))).all()


def test_made_up_questions_are_the_same_for_a_seed_and_all_their_words_are_known() -> None:
    data = synthetic_chat(40, 5)
    assert data.turns == synthetic_chat(40, 5).turns != synthetic_chat(40, 6).turns
    assert {word for row in data.turns for turn in row for word in turn.text.split()} <= set(WORDS)


def test_rows_of_another_task_are_refused() -> None:
    with pytest.raises(InputError, match="Expected conversations for task=causal_lm"):
        CausalLM().check(tiny_random_causal(seed=1), synthetic_text(10, 1), max_length=20)


def test_a_row_without_a_scored_token_has_no_loss_and_no_gradient() -> None:
    base, task = tiny_random_causal(seed=1, words=["w"]), CausalLM()
    rows = tuple((Turn(USER, "w " * 9), Turn(ASSISTANT, "w")) for _ in range(2))
    examples = task.encode(base, Conversations(rows, np.arange(2), None, "long"), max_length=8)
    assert examples.num_truncated == 2 and not examples.num_scored.any()
    assert task.losses(base.network, examples.batch([0, 1])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("losses", "error", "word"),
    [
        ((4.0, 3.0), 0.1, "learned"),
        ((4.0, 3.9), 0.1, "cannot be told"),
        ((4.0, 4.5), 0.1, "did not learn"),
        ((4.0, None), None, "cannot be told"),
    ],
)
def test_a_verdict_is_of_the_interval_of_the_loss(losses, error, word: str) -> None:
    start, final = losses
    told = judge_loss(
        HeldOut({}, 50),
        Result(0.1, 0.2, start, final),
        Recipe(False),
        metric=PERPLEXITY,
        first={},
        last={"loss_error": error},
    )
    assert told.word == word and told.num_rows == 50
    assert bool(told.advice) == (word != "learned")


@pytest.mark.parametrize(("final", "word"), [(3.0, "did not learn"), (1.9, "cannot be told"), (1.7, "learned")])
def test_a_model_that_learned_is_better_than_one_answer_for_all_rows(final: float, word: str) -> None:
    last = {"loss_error": 0.1, "loss_of_one_answer": 2.0}
    result = Result(0.1, 0.2, 4.0, final)
    told = judge_loss(HeldOut({}, 50), result, Recipe(False), metric=PERPLEXITY, first={}, last=last)
    assert told.word == word and "one answer for all rows" in told.why
