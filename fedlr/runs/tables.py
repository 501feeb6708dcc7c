"""The rows of an experiment: those that clients share out, and those that are held out for evaluation."""

import os
from collections.abc import Sequence, Sized
from functools import partial
from inspect import signature
from typing import Any

from fedlr.config.build import build, checked, naming
from fedlr.config.schema import DataSection, Experiment
from fedlr.data.files import table_files
from fedlr.data.placement import split_train_test, without_texts_of
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.runs.validation import scored_rows, with_validation

WITHOUT_CLASSES = ("causal_lm", "text_multilabel", "text_regression")  # tasks whose rows have not one class each


def load_examples(experiment: Experiment, *, seed: int) -> tuple[Table, Table]:
    """Return the examples that clients share out, and those the server holds out for evaluation.

    Raises:
        InputError: also where a private run would take its label names from private data.
    """
    return load_tables(experiment, seed=seed)[:2]


def load_tables(experiment: Experiment, *, seed: int) -> tuple[Table, Table, Table | None]:
    """Return what `load_examples` does, and the validation rows by which a model is chosen.

    None: no model is, or all scores are of validation rows. Validation rows that are test rows too are no part of them.
    """
    section = experiment.data.section()
    if experiment.data.num_test is None:
        check_another_table(experiment.data)
    data: Table = build(section, "data", seed=seed)
    named = section.get("labels") or section.get("label_groups")
    from_data = "labels" in signature(checked(section, "data", ("seed",))[0]).parameters and not named
    if experiment.privacy.is_private and not experiment.data.public and from_data:
        raise InputError(
            "Expected data.labels in a private run, got null: the names that are found tell what the data hold; name "
            "them as the file spells them, data.labels=[NAME,NAME], or say data.public=true if the data are no secret"
        )
    load = partial(load_test_table, seed=seed, label_names=data.label_names)
    data, validation = with_validation(experiment, data, load=load)
    if experiment.data.num_test is None:
        held_out = load(experiment)
        data = without_texts_of(data, held_out)
    else:
        with naming("data", "num_test"):
            data, held_out = split_train_test(data, num_test=experiment.data.num_test, seed=seed)
    chooses = experiment.release == "best" or experiment.patience is not None
    scored = scored_rows(experiment, held_out, validation)
    if validation is None or not chooses or experiment.tracking.evaluate_on == "validation":
        return data, scored, None
    return data, scored, without_texts_of(validation, held_out)


def load_held_out(experiment: Experiment, *, seed: int) -> tuple[Table, int | None]:
    """Return the examples that a server scores, and how many rows there are with those that are not held out.

    Where the held-out rows are a table of their own nothing else is read, and nobody knows (None).

    Raises:
        InputError: as `load_examples`.
    """
    section = experiment.data.section()
    is_named = section.get("labels") or section.get("label_groups") or experiment.task.target in WITHOUT_CLASSES
    if experiment.data.test_path is not None and is_named:
        return load_test_table(experiment, seed=seed, label_names=None), None
    data, held_out = load_examples(experiment, seed=seed)
    return held_out, num_rows_of(experiment, data, held_out)


def num_rows_of(experiment: Experiment, data: Sized, held_out: Sized) -> int:
    """Return how many rows `data.path` has, held-out ones too."""
    return len(data) + (0 if experiment.data.num_test is None else len(held_out))


def check_another_table(data: DataSection) -> None:
    """Refuse a table of held-out rows that is the one that clients train on, or that could not be read.

    Raises:
        InputError: which names the two keys.
    """
    section = data.section()
    path = _path_of(data)
    if data.test_path is not None:
        own, test = ({os.path.realpath(f.path) for f in table_files(p)} or {p} for p in (path, data.test_path))
        if shared := sorted(own & test):
            raise InputError(
                f"Expected data.test_path to be another table than data.path, got {data.test_path!r}, which is "
                f"{shared[0]!r} too: rows that were trained on say nothing about others"
            )
        return
    if table_files(path) and section.get("split_column") is None:
        raise InputError(
            f"Expected data.test_path with the file or folder {path!r}, got data.test_split={data.test_split!r}: only "
            "a dataset by name has splits"
        )
    if data.test_split == (section.get("train_split") or "train"):
        raise InputError(
            f"Expected data.test_split to be another split than data.train_split, got {data.test_split!r} for both"
        )


def _path_of(data: DataSection) -> str:
    """Return where the clients' rows are, or refuse data that are made up or read by another key."""
    path = data.section().get("path")
    if not isinstance(path, str):
        raise InputError(
            f"Expected data.num_test with data._target_={data.target}, which has no path, got data.test_path or "
            "data.test_split"
        )
    return path


def load_test_table(experiment: Experiment, *, seed: int, label_names: Sequence[str] | None) -> Table:
    """Return the rows of the table that is held out, read as that of the clients is.

    Args:
        experiment: with `data.test_path` or `data.test_split`.
        seed: as for the clients' table.
        label_names: the clients', for a table that names none itself.

    Raises:
        InputError: as for any table; another label than the clients' is one.
    """
    section, data = experiment.data.section(), experiment.data
    _path_of(data)
    changed: dict[str, Any] = {"path": data.test_path, "train_split": None}
    if data.test_path is None:
        changed = {"train_split": data.test_split}
    if label_names and not section.get("labels") and not section.get("label_groups"):
        changed["labels"] = list(label_names)
    changed |= {key: None for key in ("fetched_by", "person_column") if key in section}
    table: Table = build({**section, **changed}, "data", seed=seed)
    return table
