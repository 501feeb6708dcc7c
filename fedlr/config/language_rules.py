"""What goes together where the task is a language model's, and what is refused before anything is loaded."""

from typing import TYPE_CHECKING

from fedlr.errors import InputError

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

CAUSAL_LM = "causal_lm"
CLASSIFIERS, CAUSAL_MODELS = ("pretrained", "tiny_random"), ("pretrained_causal", "tiny_random_causal")
LABELLED, CONVERSATIONS = ("table", "synthetic"), ("conversations", "synthetic_chat")
BY_LABEL = ("dirichlet", "dirichlet_by_label")


def check_language(experiment: "Experiment") -> None:
    """Refuse keys that mean nothing to a language model, and a language model for another task.

    Raises:
        InputError: which names the key to change.
    """
    e = experiment
    if e.task.target != CAUSAL_LM:
        if e.model.target in CAUSAL_MODELS:
            raise InputError(f"Expected task=causal_lm with model._target_={e.model.target}, got {e.task.target}")
        if e.data.target in CONVERSATIONS:
            raise InputError(f"Expected task=causal_lm with data._target_={e.data.target}, got {e.task.target}")
        return
    if e.model.target in CLASSIFIERS:
        raise InputError(
            f"Expected model=causal (or smollm2, tiny_causal) with task=causal_lm, got {e.model.target}, a classifier"
        )
    if e.data.target in LABELLED:
        raise InputError(
            f"Expected data=chat (or dictionaries, synthetic_chat) with task=causal_lm, got {e.data.target}, whose "
            "rows have labels"
        )
    if e.adapter.train_head:
        raise InputError(
            "Expected adapter.train_head=false with task=causal_lm, got true: a language model's head stays frozen"
        )
    if e.runtime.cache_prefix and e.runtime.kind != "local":
        raise InputError(
            f"Expected runtime.cache_prefix=false with task=causal_lm and runtime={e.runtime.kind}, got true: devices "
            "keep no states of a decoder"
        )
    if e.data.label_weights:
        raise InputError("Expected data.label_weights=null with task=causal_lm, got some: conversations have no label")
    if e.partition.target in BY_LABEL:
        raise InputError(
            f"Expected partition=iid, by_group or by_file with task=causal_lm, got {e.partition.target}: conversations "
            "have no label"
        )
