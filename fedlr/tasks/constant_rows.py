"""Rows of no one's to try a round on: a short one, and as many as are computed at once of the largest size.

They show what a model cannot read, and what the memory does not hold, before any row of a person is read.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fedlr.data.conversations import ASSISTANT, TEXT, USER, Conversations, Turn
from fedlr.data.images import LabelledImages
from fedlr.data.multilabel import MultiLabelText
from fedlr.data.scored import ScoredText
from fedlr.data.table import LabelledText, Table
from fedlr.tasks.causal_lm import CausalLM
from fedlr.tasks.classification import Classification
from fedlr.tasks.examples import Share
from fedlr.tasks.image_classification import ImageClassification
from fedlr.tasks.pictures import PictureProcessor
from fedlr.tasks.task import Base, Task
from fedlr.tasks.text_multilabel import TextMultilabel
from fedlr.tasks.text_regression import TextRegression
from fedlr.tasks.tokenise import TokenisedText
from fedlr.tasks.tokenised_turns import TokenisedTurns

SOURCE = "constant rows"


def constant_table(
    task: Task, base: Base, *, max_length: int, num_long: int, has_pairs: bool = False, has_turns: bool = True
) -> Table:
    """Return a short row and `num_long` of the largest size, as a table of the task.

    Args:
        task: one of the project's own.
        base: the model that will read them.
        max_length: tokens of a row, at most.
        num_long: how many rows are computed side by side.
        has_pairs: rows of two texts.
        has_turns: rows of a language model are conversations; false: plain texts.
    """
    texts = ("a", *["a " * max_length] * num_long)
    if isinstance(task, CausalLM):
        rows = [(Turn(USER, "a"), Turn(ASSISTANT, text)) if has_turns else (Turn(TEXT, text),) for text in texts]
        return Conversations(tuple(rows), np.arange(1, len(rows) + 1), None, SOURCE)
    names = task.label_names if isinstance(task, Classification) else ()
    labels = np.arange(len(texts)) % max(1, len(names))
    if isinstance(task, ImageClassification):
        return _pictures(base.tokenizer, labels, names)
    pairs = texts if has_pairs else None
    if isinstance(task, TextRegression):
        return ScoredText(texts, np.zeros(len(texts), dtype=np.float32), (0.0, 1.0), None, SOURCE, pairs=pairs)
    if isinstance(task, TextMultilabel):
        outputs = tuple(map(str, range(base.network.config.num_labels)))
        has_label = np.zeros((len(texts), len(outputs)), dtype=np.float32)
        return MultiLabelText(texts, has_label, outputs, None, SOURCE, pairs=pairs)
    return LabelledText(texts, labels, names, None, SOURCE, pairs=pairs)


def constant_share(task: Task, base: Base, table: Table, *, max_length: int) -> Share:
    """Return constant rows as a model reads them; the long ones of texts hold the largest token in their middle."""
    share = Share.whole(task.encode(base, table, max_length=max_length))
    if isinstance(share.table, TokenisedTurns):
        # Whatever a template and the limit of an answer leave of it: no row is longer, or has more scored tokens.
        share = replace(share, table=_filled(share.table, max_length))
    elif not isinstance(share.table, TokenisedText):
        return share
    largest = max(base.tokenizer.get_vocab().values(), default=0)
    if isinstance(share.table, TokenisedText) and largest in base.tokenizer.all_special_ids:
        return share
    return with_largest_id(share, largest)


def with_largest_id(share: Share, largest: int) -> Share:
    """Return constant rows whose long ones hold a token id in their middle: the largest that a tokenizer gives."""
    table: Any = share.table
    ids = table.ids.copy()
    long = np.flatnonzero(table.lengths[1:] > 2) + 1
    ids[table.offsets[long] + table.lengths[long] // 2] = largest
    return replace(share, table=replace(table, ids=ids))


def _filled(table: TokenisedTurns, max_length: int) -> TokenisedTurns:
    """Return constant conversations of which all but the first have `max_length` tokens, all of them scored."""
    first, num_long = table.subset([0]), len(table) - 1
    long = np.resize(table.ids[table.offsets[1] :], num_long * max_length)
    return replace(
        table,
        ids=np.concatenate([first.ids, long]).astype(np.int32),
        scored=np.concatenate([first.scored, np.ones(len(long), dtype=np.bool_)]),
        offsets=np.cumsum([0, len(first.ids), *[max_length] * num_long], dtype=np.int64),
    )


def _pictures(processor: PictureProcessor, labels: Any, names: tuple[str, ...]) -> LabelledImages:
    """Return pictures of many greys, one for each label."""
    shape = (len(labels), processor.height, processor.width, 3)
    pixels = (np.arange(np.prod(shape)) * 7919 % 257 % 256).astype(np.uint8).reshape(shape)
    rows = np.arange(len(labels), dtype=np.int64)
    identities = tuple(f"constant picture {row}" for row in rows)
    return LabelledImages(pixels, rows, identities, labels, names, None, SOURCE)
