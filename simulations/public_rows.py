"""Rows that a finished run is scored on: a table that its user names, or those that the run itself held out.

Whoever names a table declares it public: no score is noised. So a table that holds rows of clients is refused.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlr.config.build import build
from fedlr.config.schema import Experiment
from fedlr.data.files import table_files
from fedlr.data.placement import content, whole_rows
from fedlr.data.public import file_sha256
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.runs.tables import load_examples, load_held_out

HELD_OUT = "held-out"  # in place of a table: the rows that the run held out
NOT_COVERED = "no score is noised, and the privacy statement does not cover it"
# How a table is read where the run's own rows were made up.
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "causal_lm": {"_target_": "conversations", "format": "messages"},
    "text_classification": {"_target_": "table"},
    "text_multilabel": {"_target_": "multilabel_table"},
    "text_regression": {"_target_": "scored_table"},
    "image_classification": {"_target_": "images"},
}


@dataclass(frozen=True)
class PublicRows:
    """Rows to score, what they are called, and the SHA-256 of their files, None where they are no files."""

    table: Table
    name: str
    sha256: str | None


def public_rows(
    experiment: Experiment, on: str, *, changes: Mapping[str, Any], label_names: list[str], seed: int
) -> PublicRows:
    """Read the rows to score; those of clients are refused.

    Args:
        experiment: of the run.
        on: a file, a folder or a data set; or `HELD_OUT`.
        changes: of the keys by which the run's own rows are read (`data.KEY=VALUE`).
        label_names: of the run.
        seed: of the run.

    Raises:
        InputError: the table cannot be read, has other classes, or holds rows that clients train on.
    """
    if on == HELD_OUT:
        if changes:
            raise InputError(
                f"Expected no data.{next(iter(changes))} with --on {HELD_OUT}, whose rows the run has read"
            )
        table, _ = load_held_out(experiment, seed=seed)
        return PublicRows(table, f"the held-out rows of {table.source}", None)
    own = experiment.data.section()
    section = dict(own) if isinstance(own.get("path"), str) else dict(SECTIONS.get(experiment.task.target, own))
    section |= {"path": on, **({"train_split": None} if "train_split" in section else {}), **changes}
    section.pop("fetched_by", None)
    if label_names and not section.get("labels") and not section.get("label_groups"):
        section["labels"] = label_names
    check_not_trained_on(experiment, on)
    table = build(section, "data", seed=seed)
    _check_rows(experiment, table, on, seed=seed)
    return PublicRows(table, on, files_sha256(on))


def check_not_trained_on(experiment: Experiment, on: str) -> None:
    """Refuse a file that clients train on, under any name.

    Raises:
        InputError: which names it.
    """
    path = experiment.data.section().get("path")
    if not isinstance(path, str):
        return
    if on == path:
        raise _of_clients(experiment, on)
    try:
        own = {_sha256(file.path) for file in table_files(path)}
    except (InputError, OSError):
        return  # the run's own files are elsewhere: none of them can be named
    if any(_sha256(file.path) in own for file in table_files(on)):
        raise _of_clients(experiment, on)


def files_sha256(path: str) -> str | None:
    """Return the SHA-256 over the files of a path in the order of their names, None for a data set by name."""
    files = table_files(path)
    if len(files) == 1:
        return _sha256(files[0].path)
    digest = hashlib.sha256("".join(_sha256(file.path) for file in files).encode())
    return digest.hexdigest() if files else None


def _check_rows(experiment: Experiment, table: Table, on: str, *, seed: int) -> None:
    """Refuse a table with a row that clients train on, where their rows can be read here."""
    try:
        trained, _ = load_examples(experiment, seed=seed)
    except InputError:
        return  # they are at the clients, or have gone
    if not set(map(content, whole_rows(trained))).isdisjoint(map(content, whole_rows(table))):
        raise _of_clients(experiment, on)


def _of_clients(experiment: Experiment, on: str) -> InputError:
    why = (
        "rows that were trained on say nothing about others"
        if not experiment.privacy.is_private or experiment.data.public
        else f"those are private: {NOT_COVERED}"
    )
    return InputError(
        f"Expected a public table without rows that clients train on, got {on!r}, which holds some; {why}. Name "
        f"another table, or --on {HELD_OUT}"
    )


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
