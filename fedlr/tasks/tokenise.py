"""Texts to tokens, and tokens to padded batches.

All tokens of a table lie in one flat array with offsets, a layout that can be memory-mapped and shared by
many clients. Nothing is padded until a batch is made. Legend: N examples, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.tasks.batch import Batch

_TEXTS_A_CALL = 4096  # the tokenizer's own record of a text is a hundred times its ids
# What a tokenizer may do in a way of its own; then it is asked itself.
_OF_EVERY_TOKENIZER = ("__call__", "_encode_plus", "set_truncation_and_padding")


@dataclass(frozen=True)
class TokenisedText:
    """Token ids of all examples end to end; example i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]  # (N + 1,)
    labels: NDArray[np.int64]  # (N,)
    pad_id: int
    num_truncated: int  # texts longer than max_length, when they were tokenised
    # (total T,): which text of a pair a token belongs to, where there are pairs and the tokenizer says so
    token_type_ids: NDArray[np.int8] | None = None
    scores: NDArray[np.float32] | None = None  # (N,) or (N, K): what a model should say where rows have no one class
    # (total T, H): what a frozen prefix made of ids (fedlr.models.prefix); uint16 holds the bits of bfloat16
    hidden: NDArray[np.float32] | NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example, shape (N,)."""
        return np.diff(self.offsets)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "TokenisedText":
        """Return a copy of the examples at `indices`, in that order; `num_truncated` stays that of the whole
        table."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        hidden = None if self.hidden is None else self.hidden[places]
        types = None if self.token_type_ids is None else self.token_type_ids[places]
        return replace(
            self,
            ids=self.ids[places],
            offsets=offsets,
            labels=self.labels[chosen],
            token_type_ids=types,
            scores=None if self.scores is None else self.scores[chosen],
            hidden=hidden,
        )

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return these examples padded on the right, to the longest of them.

        The inputs are `input_ids` (N, T) and `attention_mask` (N, T), the targets the labels (N,), all int64. Pairs
        give `token_type_ids` (N, T) too, if their tokenizer does; padding is of type 0. No row gives shape (0, 0).
        Texts that passed a frozen prefix give `inputs_embeds` (N, T, H) float32 or bfloat16 in place of both kinds of
        ids.
        """
        chosen = self.subset(rows)
        lengths = chosen.lengths
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        inputs: dict[str, NDArray[Any]] = {"attention_mask": mask.astype(np.int64)}
        if chosen.hidden is None:
            inputs["input_ids"] = np.full(mask.shape, self.pad_id, dtype=np.int64)
            inputs["input_ids"][mask] = chosen.ids
            if chosen.token_type_ids is not None:
                inputs["token_type_ids"] = np.zeros(mask.shape, dtype=np.int64)
                inputs["token_type_ids"][mask] = chosen.token_type_ids
        else:
            inputs["inputs_embeds"] = np.zeros((*mask.shape, chosen.hidden.shape[1]), dtype=chosen.hidden.dtype)
            inputs["inputs_embeds"][mask] = chosen.hidden
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        if chosen.hidden is not None and chosen.hidden.dtype == np.uint16:
            tensors["inputs_embeds"] = tensors["inputs_embeds"].view(torch.bfloat16)
        return Batch(tensors, torch.from_numpy(chosen.labels if chosen.scores is None else chosen.scores))


def tokenise(data: LabelledText, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> TokenisedText:
    """Tokenise every text, cut to `max_length` tokens including the special ones; count those that were cut.

    Two texts of a pair are tokenised together; the longer one is cut first. Which of the two a token belongs to is kept
    where the tokenizer says so (`token_type_ids`, as BERT reads them).

    A text of which no token is left (a tokenizer without special tokens that knows none of it) becomes one
    pad token, which is attended to: a model cannot read nothing.

    Raises:
        InputError: when `max_length` leaves no room for a token of each text or is more than the model of this
            tokenizer reads, or when the tokenizer is not a fast one or has neither a pad nor an end token.
    """
    _check_max_length(tokenizer, max_length, is_pair=data.pairs is not None)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise InputError("The tokenizer has neither a pad nor an end-of-text token: set tokenizer.pad_token")
    pieces, types, lengths, num_truncated = [], [], [0], 0
    for start in range(0, len(data), _TEXTS_A_CALL):
        texts, *others = (list(t[start : start + _TEXTS_A_CALL]) for t in (data.texts, data.pairs) if t is not None)
        found = _encoded(tokenizer, texts, *others, max_length=max_length)
        ids = [encoding.ids or [pad_id] for encoding in found]
        pieces.append(np.concatenate(ids, dtype=np.int32))
        lengths.extend(map(len, ids))
        num_truncated += sum(bool(encoding.overflowing) for encoding in found)
        if others and "token_type_ids" in tokenizer.model_input_names:
            types.append(np.concatenate([encoding.type_ids or [0] for encoding in found], dtype=np.int8))
    flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64)
    segments = np.concatenate(types) if types else None
    return TokenisedText(flat, offsets, data.labels, pad_id, num_truncated, segments)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], *pairs: list[str], max_length: int) -> list[Any]:
    """Return the tokenizer's record of each text, or pair, of which at least one is given."""
    cut: dict[str, Any] = {"truncation": "longest_first", "max_length": max_length, "padding": False}
    kind = type(tokenizer)
    if any(getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name) for name in _OF_EVERY_TOKENIZER):
        return list(tokenizer(texts, *pairs, **cut).encodings or ())
    # A call leaves the backend set as it was asked, and the backend alone, without where each token stood in the text,
    # takes two thirds of the time.
    tokenizer(texts[:1], *(others[:1] for others in pairs), **cut)
    backend: Any = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    return list(backend.encode_batch_fast(list(zip(texts, *pairs, strict=True)) if pairs else texts))


def _check_max_length(tokenizer: PreTrainedTokenizerBase, max_length: int, *, is_pair: bool) -> None:
    if not tokenizer.is_fast:
        raise InputError(f"Expected a fast tokenizer (with a tokenizer.json), got {type(tokenizer).__name__}")
    smallest = tokenizer.num_special_tokens_to_add(pair=is_pair) + (2 if is_pair else 1)
    if not smallest <= max_length <= tokenizer.model_max_length:
        most = tokenizer.model_max_length  # 1e30 stands for "no limit"
        limits = f"in [{smallest}, {most}]" if most < 10**9 else f">= {smallest}"
        raise InputError(f"Expected max_length {limits} for this tokenizer, got {max_length}")
