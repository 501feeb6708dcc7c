"""Greedy answers: those of plain generation one by one, whatever else is asked, and where they end."""

import pytest
import torch

from fedlr.data.conversations import ASSISTANT, SYSTEM, USER, Turn
from fedlr.errors import InputError
from fedlr.models.causal import tiny_random_causal
from fedlr.tasks.greedy import AnswerScores, answer_scores, end_tokens, greedy_answers, prompts_of
from fedlr.tasks.multiple_choice import choose
from fedlr.tasks.synthetic_chat import synthetic_chat


def test_answers_are_those_of_each_prompt_alone() -> None:
    base, data = tiny_random_causal(seed=0), synthetic_chat(30, 0)
    turns = [
        (Turn(USER, " ".join(row[0].text.split()[: 1 + n % 4])), Turn(ASSISTANT, "red"))
        for n, row in enumerate(data.turns)
    ]
    object.__setattr__(data, "turns", tuple(turns))
    prompts = prompts_of(data, base.tokenizer, max_length=64)
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    base.network.eval()
    texts, ended = greedy_answers(base.network, prompts, base.tokenizer, max_new_tokens=6, token_budget=64)
    end = base.tokenizer.eos_token_id
    for prompt, text, own_end in zip(prompts, texts, ended, strict=True):
        ids = list(prompt.ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(base.network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == end:
                break
        assert own_end is (ids[-1] == end)
        said = base.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()
        assert text == said


def test_a_prompt_is_all_but_the_last_answer() -> None:
    base = tiny_random_causal(seed=0)
    data = synthetic_chat(2, 0)
    turns = (Turn(SYSTEM, "now"), Turn(USER, "what"), Turn(ASSISTANT, "red"), Turn(USER, "the"), Turn(ASSISTANT, "sea"))
    object.__setattr__(data, "turns", (turns, turns))
    first = prompts_of(data, base.tokenizer, max_length=64)[0]
    assert (first.text, first.wanted) == ("the", "sea")
    said = base.tokenizer.decode(first.ids)
    assert "red" in said and "sea" not in said and said.rstrip().endswith("assistant")
    with pytest.raises(InputError, match="row 1: expected a prompt of less than 8 tokens"):
        prompts_of(data, base.tokenizer, max_length=8)


def test_what_the_template_writes_after_an_answer_ends_one() -> None:
    base = tiny_random_causal(seed=0)
    base.tokenizer.eos_token = "<|unknown|>"  # the template ends answers by another token than the tokenizer says
    base.network.generation_config.eos_token_id = None
    ends = {base.tokenizer.convert_tokens_to_ids(token) for token in ("<|unknown|>", "<|im_end|>")}
    assert set(end_tokens(base.tokenizer, base.network)) == ends


def test_scores_of_answers() -> None:
    pytest.importorskip("rouge_score")
    found = answer_scores(["the sea ", "a b c d"], ["the sea", "a x c y"], [True, False])
    assert found == AnswerScores(exact_match=0.5, rouge_l=pytest.approx(0.75), ended=0.5)


def test_a_choice_without_room_for_the_question_is_refused() -> None:
    from fedlr.data.choices import Question

    base = tiny_random_causal(seed=0)
    with pytest.raises(InputError, match="Expected choices of less than 3 tokens"):
        choose(base.network, [Question("what", ("red", "red green blue"), 0)], base.tokenizer, max_length=3)
