"""What a task asks of a device beside labels and lengths, and the task that a device makes of it.

A text classification says nothing here: its terms are those of protocol 1. Of another task the terms name what turns a
row into what the model reads, by its hash: a tokenizer with its chat template, or the size and normalisation of
pictures. It is never sent; a device has it beside its base model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fedlr.config.schema import Section
from fedlr.data.conversations import Conversations
from fedlr.data.multilabel import MultiLabelText
from fedlr.data.scored import ScoredText
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.tasks.causal_lm import CausalLM
from fedlr.tasks.chat import with_template
from fedlr.tasks.image_classification import ImageClassification
from fedlr.tasks.pictures import PictureProcessor
from fedlr.tasks.task import Base, Task
from fedlr.tasks.text_classification import TextClassification
from fedlr.tasks.text_multilabel import TextMultilabel
from fedlr.tasks.text_regression import TextRegression

TaskName = Literal["text_classification", "text_multilabel", "text_regression", "causal_lm", "image_classification"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
WITH_CLASSES: tuple[TaskName, ...] = ("text_classification", "image_classification")
MOST_RESPONSE = 10**6  # tokens

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class LanguageTask(Section):
    """A language model; `reading_sha256` is that of the tokenizer with the template that writes conversations."""

    name: Literal["causal_lm"]
    reading_sha256: Sha256
    has_turns: bool  # rows are conversations; false: plain texts, which no template writes
    template: Literal["chatml", "plain", "alpaca"] | None  # None: the tokenizer's own
    max_response: Annotated[int, Field(ge=1, le=MOST_RESPONSE)] | None


class PictureTask(Section):
    """Pictures with classes; `reading_sha256` is that of their size, and of mean and deviation of their pixels."""

    name: Literal["image_classification"]
    reading_sha256: Sha256


class ScoreTask(Section):
    """Texts with numbers in a declared range, smallest and largest."""

    name: Literal["text_regression"]
    score_range: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]


class MultiLabelTask(Section):
    """Texts with any of several labels, whose outputs of the model are in this order."""

    name: Literal["text_multilabel"]
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=10_000)]


OtherTask = LanguageTask | PictureTask | ScoreTask | MultiLabelTask
TaskTerms = Annotated[OtherTask, Field(discriminator="name")]


def terms_of_task(task: Task, base: Base, table: Table) -> OtherTask | None:
    """Return what a server's task asks of devices; None for a text classification.

    Args:
        task: of the experiment.
        base: the base model.
        table: rows as devices have them, such as those that the server holds out.

    Raises:
        InputError: for a task of a user's own, which devices do not have.
    """
    if isinstance(task, CausalLM) and isinstance(table, Conversations):
        has_turns = not table.is_plain
        template = task.template if has_turns else None
        sha256 = reading_sha256(base, template=template, has_turns=has_turns)
        return LanguageTask.model_validate(
            {
                "name": "causal_lm",
                "reading_sha256": sha256,
                "has_turns": has_turns,
                "template": template,
                "max_response": task.max_response,
            }
        )
    if isinstance(task, ImageClassification):
        return PictureTask(name="image_classification", reading_sha256=reading_sha256(base))
    if isinstance(task, TextRegression) and isinstance(table, ScoredText):
        return ScoreTask(name="text_regression", score_range=[float(end) for end in table.score_range])
    if isinstance(task, TextMultilabel) and isinstance(table, MultiLabelText):
        return MultiLabelTask(name="text_multilabel", labels=list(table.output_names))
    if isinstance(task, TextClassification):
        return None
    raise InputError(f"Expected task to be one of {', '.join(TASKS)} for devices, got {task.name}")


def task_of_terms(
    terms: OtherTask | None,
    label_names: Sequence[str],
    label_weights: Mapping[str, float] | None,
) -> Task:
    """Return the task that terms describe, which is the server's."""
    if isinstance(terms, LanguageTask):
        return CausalLM(terms.template, terms.max_response)
    if isinstance(terms, PictureTask):
        return ImageClassification(tuple(label_names), label_weights)
    if isinstance(terms, ScoreTask):
        return TextRegression()
    if isinstance(terms, MultiLabelTask):
        return TextMultilabel()
    return TextClassification(tuple(label_names), label_weights)


def reading_sha256(base: Base, *, template: str | None = None, has_turns: bool = False) -> str:
    """Return the SHA-256 of what turns a row into what a model reads.

    Args:
        base: the model, with its processor of pictures or its tokenizer.
        template: a name of `fedlr.tasks.chat.TEMPLATES`; None: the tokenizer's own.
        has_turns: whether rows are written by a template at all.

    Raises:
        InputError: for a tokenizer that is not a fast one, or lacks the template.
    """
    if isinstance(base.tokenizer, PictureProcessor):
        return _sha256(asdict(base.tokenizer))
    tokenizer = with_template(base.tokenizer, template) if has_turns else base.tokenizer
    if not tokenizer.is_fast:
        raise InputError(f"Expected a fast tokenizer (with a tokenizer.json), got {type(tokenizer).__name__}")
    # Cut and padded is call by call, and what a call asked for stays in the file.
    written = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    marks = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return _sha256({"tokenizer": written, "marks": marks, "template": tokenizer.chat_template if has_turns else None})


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
