"""What goes together where the task is a language model's."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlr.config.rule import rule

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

CAUSAL_LM = "causal_lm"
CLASSIFIERS, CAUSAL_MODELS = ("pretrained", "tiny_random"), ("pretrained_causal", "tiny_random_causal")
LABELLED, CONVERSATIONS = ("table", "synthetic"), ("conversations", "synthetic_chat")
BY_LABEL = ("dirichlet", "dirichlet_by_label")


@rule("task", "model", "data")
def language_task(e: "Experiment") -> Iterator[str]:
    """A language model and conversations are for the task of a language model."""
    if e.task.target == CAUSAL_LM:
        return
    if e.model.target in CAUSAL_MODELS:
        yield f"Expected task=causal_lm with model._target_={e.model.target}, got {e.task.target}"
    if e.data.target in CONVERSATIONS:
        yield f"Expected task=causal_lm with data._target_={e.data.target}, got {e.task.target}"


@rule("model", "task")
def language_model(e: "Experiment") -> Iterator[str]:
    """The task of a language model is not for a classifier."""
    if e.task.target == CAUSAL_LM and e.model.target in CLASSIFIERS:
        yield f"Expected model=causal (or smollm2, tiny_causal) with task=causal_lm, got {e.model.target}, a classifier"


@rule("data", "task")
def language_data(e: "Experiment") -> Iterator[str]:
    """The task of a language model is not for rows with labels."""
    if e.task.target == CAUSAL_LM and e.data.target in LABELLED:
        yield (
            f"Expected data=chat (or dictionaries, synthetic_chat) with task=causal_lm, got {e.data.target}, whose "
            "rows have labels"
        )


@rule("adapter.train_head", "task")
def language_head(e: "Experiment") -> Iterator[str]:
    """The head of a language model stays frozen."""
    if e.task.target == CAUSAL_LM and e.adapter.train_head:
        yield "Expected adapter.train_head=false with task=causal_lm, got true: a language model's head stays frozen"


@rule("runtime.cache_prefix", "task", "runtime")
def decoder_states(e: "Experiment") -> Iterator[str]:
    """Devices do not cache what a decoder's frozen layers make of their rows."""
    if e.task.target == CAUSAL_LM and e.runtime.cache_prefix and e.runtime.kind != "local":
        yield (
            f"Expected runtime.cache_prefix=false with task=causal_lm and runtime={e.runtime.kind}, got true: devices "
            "keep no states of a decoder"
        )


@rule("data.label_weights", "partition", "task")
def no_labels(e: "Experiment") -> Iterator[str]:
    """Conversations have no labels to weigh, or to deal rows out by."""
    if e.task.target != CAUSAL_LM:
        return
    if e.data.label_weights:
        yield "Expected data.label_weights=null with task=causal_lm, got some: conversations have no label"
    if e.partition.target in BY_LABEL:
        yield (
            f"Expected partition=iid, by_group or by_file with task=causal_lm, got {e.partition.target}: conversations "
            "have no label"
        )
