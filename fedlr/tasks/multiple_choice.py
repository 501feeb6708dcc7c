"""Multiple choice by likelihood: a language model chooses what it finds likeliest after a question.

Two rules are told apart, as in the tables of papers: by the likelihood itself, and by the likelihood per character,
which does not prefer what is short (`acc` and `acc_norm` of EleutherAI's harness, which a test compares).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedlr.data.choices import Question
from fedlr.errors import InputError
from fedlr.tasks.chat import adds_bos
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.token_loss import token_scores
from fedlr.tasks.tokenised_turns import TokenisedTurns


@dataclass(frozen=True)
class ChoiceScores:
    """How many questions a model answers right, by either rule."""

    num_questions: int
    num_right: int
    num_right_by_length: int
    chance: float  # of a guess


def choose(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    token_budget: int = 4096,
) -> ChoiceScores:
    """Let a model choose.

    Privacy: reads the questions in the clear and what it returns is not noised; call it on public rows only.

    Raises:
        InputError: for a choice that leaves no room for the question.
    """
    found = likelihoods(model, questions, tokenizer, max_length=max_length, token_budget=token_budget)
    counts = [len(one.choices) for one in questions]
    right, right_by_length = 0, 0
    for one, own in zip(questions, np.split(found, np.cumsum(counts)[:-1]), strict=True):
        right += int(own.argmax()) == one.right
        right_by_length += int((own / [len(choice) for choice in one.choices]).argmax()) == one.right
    return ChoiceScores(len(questions), right, right_by_length, float(np.mean([1 / count for count in counts])))


@torch.no_grad()
def likelihoods(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    token_budget: int = 4096,
) -> NDArray[np.float64]:
    """Return the log-likelihood of every choice of every question, in their order, in nats; as `choose`."""
    rows = _encoded(questions, tokenizer, max_length)
    found = np.zeros(len(rows))
    device = next(model.parameters()).device
    for piece in micro_batches(rows.lengths, range(len(rows)), token_budget):
        batch = rows.batch(piece).to(device)
        found[piece] = -token_scores(model, batch.inputs, batch.targets).losses.double().sum(1).cpu().numpy()
    return found


def _encoded(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenisedTurns:
    """Return each question with each of its choices, whose tokens alone are scored; a question is cut first."""
    before = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
    ids: list[list[int]] = []
    scored: list[list[bool]] = []
    for number, question in enumerate(questions, start=1):
        start = before + question.context.rstrip()
        batch = tokenizer(
            [f"{start} {choice}" for choice in question.choices],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for tokens, places in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            is_choice = [end > len(start) for _, end in places]
            if sum(is_choice) >= max_length:
                raise InputError(
                    f"Expected choices of less than {max_length} tokens, got a longer one of question {number}"
                )
            ids.append(tokens[-max_length:])
            scored.append(is_choice[-max_length:])
    return TokenisedTurns(
        ids=np.array([token for row in ids for token in row], dtype=np.int32),
        scored=np.array([one for row in scored for one in row], dtype=np.bool_),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        pad_id=int(tokenizer.pad_token_id or 0),
        num_truncated=0,
    )
