"""Language models: answers to prompts, turns of chats, or plain texts, token by token.

The unit of a loss, and of privacy, is one conversation: its loss is the mean over its own scored tokens, whatever else
is in the batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedlr.data.conversations import Conversations
from fedlr.data.table import Table
from fedlr.errors import InputError, in_range
from fedlr.tasks.answer_places import end_marks, measures_of_places, nats_by_place
from fedlr.tasks.batch import Batch
from fedlr.tasks.chat import encode_conversations, with_template
from fedlr.tasks.evaluation import Evaluation, Metric
from fedlr.tasks.losses import IGNORED_LABEL
from fedlr.tasks.probe import in_training, probe_inputs
from fedlr.tasks.reading import check_reading
from fedlr.tasks.task import Base, Task
from fedlr.tasks.token_loss import check_token_loss, token_losses, token_scores
from fedlr.tasks.tokenised_turns import TokenisedTurns

PERPLEXITY = Metric("perplexity", higher_is_better=False, is_share=False)


@dataclass(frozen=True)
class CausalLM(Task):
    """The task `causal_lm`.

    Args:
        template: how a conversation is written: None: by the tokenizer's own chat template; or one of
            `fedlr.tasks.chat.TEMPLATES`.
        max_response: tokens of an answer, at most; a longer one is cut and gets no end mark. None: no limit of its own.
    """

    template: str | None = None
    max_response: int | None = None
    name: str = "causal_lm"
    metric: Metric = PERPLEXITY

    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """See `fedlr.tasks.task.Task.check`."""
        self._tokenizer(base, _conversations(table))
        check_reading(base, max_length=max_length)
        check_token_loss(base.network)

    def encode(self, base: Base, table: Table, *, max_length: int) -> TokenisedTurns:
        """See `fedlr.tasks.task.Task.encode`."""
        data = _conversations(table)
        tokenizer = self._tokenizer(base, data)
        pieces = list(encode_conversations(data, tokenizer, max_length=max_length, max_response=self.max_response))
        names = sorted(set(data.groups or ()))
        number = {name: place for place, name in enumerate(names)}
        return TokenisedTurns(
            ids=np.concatenate([np.array(piece.ids, dtype=np.int32) for piece in pieces]),
            scored=np.concatenate([np.array(piece.scored, dtype=np.bool_) for piece in pieces]),
            offsets=np.cumsum([0, *(len(piece.ids) for piece in pieces)], dtype=np.int64),
            pad_id=int(base.tokenizer.pad_token_id),
            num_truncated=sum(piece.cut for piece in pieces),
            groups=None if data.groups is None else np.array([number[name] for name in data.groups], dtype=np.int64),
            group_names=tuple(names),
        )

    def _tokenizer(self, base: Base, data: Conversations) -> PreTrainedTokenizerBase:
        """Return the tokenizer with the template of this task, where there are turns that it writes."""
        tokenizer: PreTrainedTokenizerBase = base.tokenizer
        return tokenizer if data.is_plain else with_template(tokenizer, self.template)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each conversation's mean cross-entropy over its own scored tokens, in nats."""
        return token_losses(model, batch.inputs, batch.targets)

    def probe(self, model: nn.Module) -> Batch:
        """Return constant tokens, of which the model is asked for those that it finds least likely."""
        inputs = probe_inputs(model)
        with torch.no_grad(), in_training(model):
            unlikely = model(**inputs).logits.argmin(dim=-1)
        targets = torch.full_like(unlikely, IGNORED_LABEL)
        targets[:, 1:] = unlikely[:, :-1]
        return Batch(inputs, targets)

    def answers(self, model: nn.Module, batch: Batch) -> "TextAnswers":
        """Return how likely the model finds these conversations."""
        found = token_scores(model, batch.inputs, batch.targets)
        nats, hits, counts = found.losses.double().sum(1), found.hits.sum(1), found.scored.sum(1)
        places = nats_by_place(found.losses, found.scored, batch.targets[:, 1:], end_marks(model))
        return TextAnswers(nats.cpu().numpy(), hits.cpu().numpy(), counts.cpu().numpy(), places)

    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return the share of next tokens that are right, the mean loss, and the perplexity: exp of nats per token."""
        return text_evaluation(found)

    def of_groups(self, found: Mapping[str, Evaluation]) -> Mapping[str, float]:
        """Return the perplexity of each group, and their geometric mean: every group counts the same."""
        told = {f"perplexity of {name}": one.measures["perplexity"] for name, one in found.items()}
        logs = [math.log(value) for value in told.values()]
        return {"macro_perplexity": math.exp(sum(logs) / len(logs)), **told}


def causal_lm(*, template: str | None = None, max_response: int | None = None) -> CausalLM:
    """Return the task of language models; see `CausalLM`.

    Raises:
        InputError: for a limit below 1.
    """
    if max_response is not None:
        in_range(1, 10**6, max_response=max_response)
    return CausalLM(template, max_response)


@dataclass(frozen=True)
class TextAnswers:
    """What a model says of a micro-batch of conversations, over their scored tokens: arrays (N,)."""

    nats: np.ndarray
    hits: np.ndarray
    counts: np.ndarray
    places: np.ndarray | None = None  # (2, places), of all of them together: `fedlr.tasks.answer_places`


def text_evaluation(found: Sequence[TextAnswers]) -> Evaluation:
    """Score the answers of all micro-batches together.

    >>> answers = TextAnswers(np.array([2.0, 0.0]), np.array([1, 0]), np.array([4, 0]))
    >>> round(text_evaluation([answers]).measures["perplexity"], 4)
    1.6487
    """
    nats, hits, counts = (np.concatenate([getattr(one, name) for one in found]) for name in ("nats", "hits", "counts"))
    has = counts > 0
    means = nats[has] / counts[has]
    if not has.any():
        raise InputError("Expected held-out rows with a token of an answer, got none; raise data.max_length")
    per_token = float(nats.sum() / counts.sum())
    spread = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.inf
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    places = [one.places for one in found if one.places is not None]
    told = measures_of_places(np.sum(places, axis=0)) if places else {}
    measures = {"perplexity": perplexity, "loss_error": spread, **told}
    return Evaluation(float(hits.sum() / counts.sum()), float(means.mean()), measures=measures)


def _conversations(table: Table) -> Conversations:
    if not isinstance(table, Conversations):
        raise InputError(
            f"Expected conversations for task=causal_lm, got {table.source}, a table of another kind; set data=chat, "
            "or task"
        )
    return table
