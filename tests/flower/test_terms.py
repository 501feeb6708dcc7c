"""Terms carry the task; those of a text classification are what they were before there was another, to the byte.

Mutants these tests reject: a new field that is written where it says nothing; a task whose labels do not fit it.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from fedlr.client.owner_limits import MODELS_OF_TASK, TASK_OF_DATA, Policy
from fedlr.config.parts import PARTS
from fedlr.errors import InputError
from fedlr.flower.task_terms import TASKS, LanguageTask
from fedlr.flower.terms import Terms
from fedlr.tasks.chat import TEMPLATES
from fedlr.tasks.text_classification import TextClassification
from tests.client.device_files import TERMS, changed

NO_MODEL = {"model_sha256": "0" * 64}
LANGUAGE = {"name": "causal_lm", "reading_sha256": "1" * 64, "has_turns": True, "template": None, "max_response": None}
PICTURES = {"name": "image_classification", "reading_sha256": "1" * 64}


def read(changes: Mapping[str, Any]) -> Terms:
    tree = json.loads(json.dumps({**TERMS, **NO_MODEL}))
    for key, value in changes.items():
        changed(tree, key, value)
    return Terms.read(json.dumps(tree))


@pytest.mark.parametrize(
    ("changes", "sha256"),
    [  # as the release before wrote them
        ({}, "d6b350098c6f37b461a3e5249a8fd51e700b5343fd57b9350652fbccc37be67f"),
        (
            {"pairs": True, "label_weights": {"negative": 2.0}},
            "2f730bdce85a05c177d507fc62fd3e516bced3885195d173151f66efdca37e2c",
        ),
    ],
)
def test_terms_of_labelled_texts_stay_what_they_were_to_the_byte(changes: Mapping[str, Any], sha256: str) -> None:
    terms = read(changes)
    assert terms.sha256() == sha256 and Terms.read(terms.text()) == terms
    assert terms.task_name == "text_classification" and isinstance(terms.built_task(), TextClassification)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": LANGUAGE, "label_names": ...},
        {"task": {**LANGUAGE, "has_turns": False, "max_response": 64}, "label_names": ...},
        {"task": PICTURES},
        {"task": {"name": "text_regression", "score_range": [0.0, 5.0]}, "label_names": ..., "pairs": True},
        {"task": {"name": "text_multilabel", "labels": ["odd", "late"]}, "label_names": ..., "pairs": True},
    ],
    ids=["conversations", "plain texts", "pictures", "numbers", "several labels"],
)
def test_terms_of_another_task_are_read_as_they_were_written(changes: Mapping[str, Any]) -> None:
    terms = read(changes)
    assert Terms.read(terms.text()) == terms and terms.task_name == changes["task"]["name"]
    assert terms.built_task().name == terms.task_name
    assert terms.sha256() != read({}).sha256()
    assert ("label_names" in json.loads(terms.text())) == (terms.task_name == "image_classification")


WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no labels": ({"label_names": ...}, "two or more label_names for task text_classification"),
    "one label of pictures": ({"task": PICTURES, "label_names": ["cat"]}, "two or more label_names"),
    "labels of conversations": ({"task": LANGUAGE}, "no label_names for task causal_lm"),
    "weights of labels that conversations have not": (
        {"task": LANGUAGE, "label_names": ..., "label_weights": {"negative": 2.0}},
        "weights of labels",
    ),
    "pairs of pictures": ({"task": PICTURES, "pairs": True}, "without pairs"),
    "a task nobody knows": ({"task": {"name": "sound"}}, "terms.task .*'sound'"),
    "a template nobody knows": (
        {"task": {**LANGUAGE, "template": "{{x}}"}},
        "terms.task to be 'chatml', 'plain' or 'alpaca'",
    ),
    "no hash": ({"task": {"name": "causal_lm"}}, "reading_sha256"),
    "a key nobody knows": ({"task": {**PICTURES, "url": "http://x"}}, "known key"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_terms_that_do_not_fit_their_task_are_one_line(changes: Mapping[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(changes)
    assert "\n" not in str(caught.value)


def test_every_reader_and_every_model_of_the_project_is_for_one_task() -> None:
    assert set(TASK_OF_DATA) == set(PARTS["data"]) and set(TASK_OF_DATA.values()) == set(TASKS) == set(PARTS["task"])
    assert {model for models in MODELS_OF_TASK.values() for model in models} == set(PARTS["model"])
    assert set(MODELS_OF_TASK) == set(TASKS)
    (names,) = (get_args(part) for part in get_args(LanguageTask.model_fields["template"].annotation) if get_args(part))
    assert set(names) == set(TEMPLATES), "terms know every template by its name"


def test_a_policy_of_an_older_release_allows_no_language_model() -> None:
    policy = Policy(allowed_models=["0" * 64])
    assert set(policy.allowed_tasks) == set(TASKS) - {"causal_lm"}
