"""Conversations as a language model reads them: flat arrays of tokens, and which of them are scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import IGNORED_LABEL


@dataclass(frozen=True)
class TokenisedTurns:
    """Token ids of all examples end to end; example i is `ids[offsets[i]:offsets[i + 1]]`.

    Legend: N examples, T tokens. `groups` is the natural client or domain of each row, by its number in `group_names`,
    where the source says.
    """

    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]  # of each token: whether a loss is taken of it
    offsets: NDArray[np.int64]  # (N + 1,)
    pad_id: int
    num_truncated: int  # conversations that were cut, when they were tokenised
    groups: NDArray[np.int64] | None = None  # (N,)
    group_names: tuple[str, ...] = ()
    # (total T, H): what a frozen prefix made of ids (fedlr.models.token_prefix); uint16 holds the bits of bfloat16
    hidden: NDArray[np.float32] | NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return zeros, shape (N,): a conversation has no class."""
        return np.zeros(len(self), dtype=np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example, shape (N,)."""
        return np.diff(self.offsets)

    @cached_property
    def num_scored(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example of which a loss is taken, shape (N,).

        The first token of an example is never one: nothing stands before it.
        """
        sums = np.concatenate([[0], np.cumsum(self.scored)])
        found: NDArray[np.int64] = sums[self.offsets[1:]] - sums[np.minimum(self.offsets[:-1] + 1, self.offsets[1:])]
        return found

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "TokenisedTurns":
        """Return a copy of the examples at `indices`, in that order; `num_truncated` stays that of the whole table."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        groups = None if self.groups is None else self.groups[chosen]
        hidden = None if self.hidden is None else self.hidden[places]
        return replace(
            self, ids=self.ids[places], scored=self.scored[places], offsets=offsets, groups=groups, hidden=hidden
        )

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return these examples, padded on the right to the longest of them.

        Inputs are `input_ids` and `attention_mask`, targets the ids again where they are scored and -100 elsewhere, all
        (N, T) int64. What is padding is told by length, never by token. Conversations that passed a frozen prefix give
        `inputs_embeds` (N, T, H) float32 or bfloat16 in place of the ids.
        """
        chosen = self.subset(rows)
        lengths = chosen.lengths
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        targets = np.full(mask.shape, IGNORED_LABEL, dtype=np.int64)
        targets[mask] = np.where(chosen.scored, chosen.ids, IGNORED_LABEL)
        inputs = {**_read_by_model(chosen, mask), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return Batch(inputs, torch.from_numpy(targets))


def _read_by_model(chosen: TokenisedTurns, mask: NDArray[np.bool_]) -> dict[str, Tensor]:
    if chosen.hidden is None:
        ids = np.full(mask.shape, chosen.pad_id, dtype=np.int64)
        ids[mask] = chosen.ids
        return {"input_ids": torch.from_numpy(ids)}
    states = np.zeros((*mask.shape, chosen.hidden.shape[1]), dtype=chosen.hidden.dtype)
    states[mask] = chosen.hidden
    given = torch.from_numpy(states)
    return {"inputs_embeds": given.view(torch.bfloat16) if states.dtype == np.uint16 else given}
