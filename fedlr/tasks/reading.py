"""What a base model can read: how long a text, which tokens, and where a text ends. Checked before any text passes it.

A text that is too long, or a token that the model has no row for, is an error in the middle of training, and on a
device one that a private row decides about. So the limits are the model's own, looked up and tried on made-up tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.tasks.probe import end_token, probe_inputs
from fedlr.tasks.task import Base
from fedlr.tasks.tokenise import TokenisedText, tokenise

# What models call their table of absolute positions; those of pixels and of pages have other names.
_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions_embed")


def read_texts(data: LabelledText, base: Base, *, max_length: int) -> TokenisedText:
    """Tokenise texts for a base model that passed `check_reading`, as `fedlr.tasks.tokenise.tokenise` does.

    Where the model reads a text at its end token, each text has that token once, at its end, also if the text itself
    spells it.

    Raises:
        InputError: as `tokenise`.
    """
    texts = tokenise(data, base.tokenizer, max_length=max_length)
    end = end_token(base.network)
    return texts if end is None else _ending(texts, end)


def check_reading(base: Base, *, max_length: int, has_pairs: bool = False) -> None:
    """Check that a model reads whatever its tokenizer makes of a text of up to `max_length` tokens.

    Args:
        base: the model and its tokenizer.
        max_length: tokens of a row.
        has_pairs: rows are of two texts.

    Raises:
        InputError: for more tokens than it has positions, a token without a row in its embedding, a tokenizer that
            neither pads nor ends a text, and one that does not write the end token at which the model reads; for pairs
            also where the tokenizer writes both texts as one, or the model cannot read which is which.
    """
    limit = num_positions(base.network)
    if limit is not None and max_length > limit:
        raise InputError(
            f"Expected max_length <= {limit}, the positions of {base.source}, got {max_length}; set data.max_length="
            f"{limit} or less"
        )
    _check_tokens(base)
    _check_end(base)
    try:
        with torch.no_grad():
            base.network(**_longest(base.network, max_length))
    except Exception as error:  # whatever a foreign forward raises
        reason = first_line(error)
        raise InputError(
            f"Expected max_length to be a number of tokens that {base.source} reads, got {max_length} "
            f"({type(error).__name__}: {reason}); set a smaller data.max_length"
        ) from error
    if has_pairs:
        _check_pairs(base)


def num_positions(network: nn.Module) -> int | None:
    """Return how many tokens a model was made for; None where it knows relative positions only.

    RoBERTa's table begins behind the padding token, BART's two rows later. Rotary positions have no table, but some
    are scaled by the longest text of a batch above that number: then one text would change what another is read as.
    """
    limits = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES:
            behind_padding = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - int(getattr(module, "offset", behind_padding)))
    config: Any = getattr(network, "config").get_text_config()  # noqa: B009
    rope = getattr(config, "rope_parameters", None)
    if rope:
        scaled = [p.get("original_max_position_embeddings") for p in _rope_parts(rope) if _is_scaled_by_length(p)]
        limits += [n for n in [*scaled, getattr(config, "max_position_embeddings", None)] if isinstance(n, int)]
    return min(limits, default=None)


def _rope_parts(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield rope
    yield from (part for part in rope.values() if isinstance(part, dict))  # one for each kind of layer


def _is_scaled_by_length(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") in ("dynamic", "longrope")


def _check_tokens(base: Base) -> None:
    tokenizer, table = base.tokenizer, base.network.get_input_embeddings()
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"Expected a tokenizer with a pad or an end token beside {base.source}, got neither; name one in its "
            "tokenizer_config.json (pad_token)"
        )
    rows = getattr(table, "num_embeddings", None)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if isinstance(rows, int) and largest >= rows:
        raise InputError(
            f"Expected a tokenizer of at most {rows} tokens, the rows of the embedding of {base.source}, got token "
            f"{token!r} with number {largest}; take the tokenizer that the model was trained with"
        )


def _check_end(base: Base) -> None:
    end = end_token(base.network)
    if end is not None and base.tokenizer("a")["input_ids"][-1:] != [end]:
        raise InputError(
            f"Expected a tokenizer that writes the end token {end} of {base.source} after every text, as the model "
            "reads a text there, got one that does not; add it to the post-processor of its tokenizer.json"
        )


def _check_pairs(base: Base) -> None:
    """Refuse a tokenizer that does not keep two texts apart, and a model that cannot read them."""
    one = " set data.text_pair_column=null and give both texts in one column"
    if end_token(base.network) is not None:
        raise InputError(
            f"Expected a model that reads rows at their first or last token for pairs of texts, got {base.source}, "
            f"which reads them at an end token that its tokenizer also writes between the two; take another, or{one}"
        )
    tokens = base.tokenizer("a", "a")
    num_special = base.tokenizer.num_special_tokens_to_add
    types = torch.tensor([tokens.get("token_type_ids") or [0]])
    if num_special(pair=True) <= num_special(pair=False) and not types.any():
        raise InputError(
            f"Expected a tokenizer that keeps the two texts of a pair apart, got that of {base.source}, which writes "
            f"them end to end;{one}, with a word of your own between them"
        )
    if "token_type_ids" not in tokens:
        return
    tokens = probe_inputs(base.network)
    tokens["token_type_ids"] = torch.zeros_like(tokens["input_ids"])
    tokens["token_type_ids"][:, -1] = types.max()
    try:
        with torch.no_grad():
            base.network(**tokens)
    except Exception as error:  # whatever a foreign forward raises
        raise InputError(
            f"Expected {base.source} to read which text of a pair a token belongs to, as its tokenizer says "
            f"(token_type_ids up to {int(types.max())}), got {type(error).__name__}: {first_line(error)}; take the "
            "tokenizer that the model was trained with"
        ) from error


def _longest(network: nn.Module, num_tokens: int) -> dict[str, torch.Tensor]:
    """Return one made-up text of so many tokens."""
    few = probe_inputs(network)["input_ids"]
    end = end_token(network)
    tokens = few[0, :-1].repeat(num_tokens)[:num_tokens][None].clone()
    if end is not None:
        tokens[:, -1] = end
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _ending(texts: TokenisedText, end: int) -> TokenisedText:
    """Take the end token out of every text but for its last place."""
    last = texts.offsets[1:] - 1
    stays = texts.ids != end
    stays[last] = True
    before = np.concatenate([[0], np.cumsum(stays)])
    types = None if texts.token_type_ids is None else texts.token_type_ids[stays]
    return replace(texts, ids=texts.ids[stays], offsets=before[texts.offsets], token_type_ids=types)
