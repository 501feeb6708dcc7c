"""What a language model answers when it takes the likeliest token each time, and how close that is to the answer given.

Prompts of one length go through the model together: nothing is padded, so an answer does not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedlr.data.conversations import ASSISTANT, TEXT, USER, Conversations, Turn
from fedlr.errors import InputError
from fedlr.tasks.chat import encode_turns
from fedlr.tasks.examples import micro_batches


class Prompt(NamedTuple):
    """The tokens of a conversation up to its last answer, and that answer."""

    ids: tuple[int, ...]
    text: str  # what was said last before the answer
    wanted: str


@dataclass(frozen=True)
class AnswerScores:
    """How close answers are to those given, on average; a text ends with its last character that is no white space."""

    exact_match: float  # share of answers that are the same text
    rouge_l: float  # F1 of the longest common subsequence of words (Lin 2004)
    ended: float  # share that ended by itself within the limit


def prompts_of(data: Conversations, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Prompt]:
    """Return what a model is asked in each conversation, by the tokenizer's own template.

    Raises:
        InputError: for plain texts, which ask nothing, and for a prompt that fills `max_length`.
    """
    found = []
    for row, number in zip(data.turns, data.numbers.tolist(), strict=True):
        if row[0].role == TEXT:
            raise InputError(f"Expected conversations to answer, got plain texts in {data.source}")
        messages = [{"role": turn.role, "content": turn.text} for turn in row[:-1]]
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) >= max_length:
            raise InputError(
                f"{data.source}, row {number}: expected a prompt of less than {max_length} tokens (data.max_length), "
                f"got {len(ids)}"
            )
        found.append(Prompt(tuple(ids), row[-2].text, row[-1].text))
    return found


def end_tokens(tokenizer: PreTrainedTokenizerBase, network: Any) -> list[int]:
    """Return the tokens that end an answer: those of the model, and the one that the template writes after it."""
    configured = getattr(network, "generation_config", None)
    named = getattr(configured, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    said = encode_turns((Turn(USER, "a"), Turn(ASSISTANT, "b")), tokenizer)
    if said.scored.count(True) > 1:
        found.add(said.ids[len(said.ids) - 1 - said.scored[::-1].index(True)])
    return sorted(token for token in found if isinstance(token, int))


@torch.no_grad()
def greedy_answers(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    token_budget: int = 4096,
) -> tuple[list[str], list[bool]]:
    """Return what a model answers to each prompt, and whether it ended by itself.

    Privacy: reads the prompts in the clear and what it returns is not noised; call it on public rows only.
    """
    ends = end_tokens(tokenizer, model.get_base_model() if hasattr(model, "get_base_model") else model)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # else the base model's own settings would count
        eos_token_id=ends,
        pad_token_id=int(tokenizer.pad_token_id),
    )
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    device = next(model.parameters()).device
    for rows in _of_one_length([len(prompt.ids) for prompt in prompts], max_new_tokens, token_budget):
        ids = torch.tensor([prompts[row].ids for row in rows], device=device)
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row, tokens in zip(rows, said[:, ids.shape[1] :].tolist(), strict=True):
            stop = next((place for place, token in enumerate(tokens) if token in ends), None)
            ended[row] = stop is not None
            texts[row] = str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).strip()
    return texts, ended


def answer_scores(answers: Sequence[str], wanted: Sequence[str], ended: Sequence[bool]) -> AnswerScores:
    """Score answers; ROUGE-L is that of Google's `rouge-score`, without stemming.

    Raises:
        InputError: the package is not installed.
    """
    scorer = rouge_scorer()
    pairs = list(zip(wanted, answers, strict=True))
    return AnswerScores(
        exact_match=fmean(right.strip() == said.strip() for right, said in pairs),
        rouge_l=fmean(float(scorer.score(right, said)["rougeL"].fmeasure) for right, said in pairs),
        ended=fmean(ended),
    )


def rouge_scorer() -> Any:
    """Return the scorer of ROUGE-L.

    Raises:
        InputError: the package is not installed; it says what to do.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError(
            "Expected the package rouge-score to score generated answers, got none; install it with: "
            "pip install 'fedlr[eval]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=False)


def _of_one_length(lengths: Sequence[int], max_new_tokens: int, token_budget: int) -> list[list[int]]:
    """Return the rows in groups of one length, each with at most so many tokens in all."""
    whole = np.array(lengths, dtype=np.int64) + max_new_tokens
    groups: list[list[int]] = []
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        groups += [piece.tolist() for piece in micro_batches(whole, rows, token_budget)]
    return groups
