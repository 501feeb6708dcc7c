"""Examples that are nobody's secret: the table that a start is made from (`adapter.public`), read on the server alone.

Activations and gradients of these rows enter the adapter's start without noise, so no epsilon covers them. A run
therefore refuses its own private file here, under whatever name, and says in its statement which table it was.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedlr.data.files import table_files
from fedlr.data.formats import SUFFIXES, read_rows
from fedlr.data.placement import content, whole_rows
from fedlr.data.table import LabelledText, load_table
from fedlr.data.values import text_problem
from fedlr.errors import InputError
from fedlr.streams import Purpose, stream


class PublicTable(BaseModel):
    """A table of examples that are nobody's secret, which a start may read without noise (`fedlr.data.public`).

    `labels` names the labels in the order of the model's classes, for the starts that read gradients; None: only the
    texts are read. `learning_rate` is that of the first step which lora_sb starts with.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    path: Annotated[str, Field(min_length=1)]
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    labels: list[str | int | bool] | None = None
    num_examples: Annotated[int, Field(ge=2, le=4096)] = 256
    learning_rate: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 1e-3


@dataclass(frozen=True)
class PublicExamples:
    """Public texts, with labels where the table names them (else all 0), and the SHA-256 of the file they are from."""

    data: LabelledText
    sha256: str

    def origin(self, start: str) -> str:
        """Return the sentence that a privacy statement says of them."""
        return (
            f"The adapter's start ({start}) was made from {len(self.data)} rows of the table {self.data.source!r} "
            f"(SHA-256 {self.sha256}), without noise: it was given as public, and nothing here protects its rows."
        )


def read_public(
    table: PublicTable,
    private: Mapping[str, Any],
    *,
    num_classes: int,
    seed: int,
    private_texts: Collection[str] = frozenset(),
) -> PublicExamples:
    """Read `num_examples` rows of a public table, drawn by the seed, in the table's order.

    Args:
        table: of the configuration; a file, as what is read must have a hash.
        private: the configuration's section `data`.
        num_classes: of the model; as many labels must be named, if any are.
        seed: of the public randomness.
        private_texts: the clients', as far as they are known here.

    Raises:
        InputError: the file is the private one, holds a private text, or cannot be used.
    """
    path = Path(table.path).expanduser()
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise InputError(f"Expected adapter.public.path to be a {', '.join(SUFFIXES)} file, got {table.path!r}")
    sha256 = file_sha256(path)
    refuse_private(table, sha256, private)
    if table.labels is not None and len(table.labels) != num_classes:
        raise InputError(f"Expected {num_classes} adapter.public.labels, as the model has classes, got {table.labels}")
    try:
        data = _texts(path, table) if table.labels is None else _labelled(path, table)
    except InputError as error:  # which speaks of the clients' table
        told = str(error).replace(", or leave such rows out with data.on_bad_row=drop", "")
        raise InputError(told.replace("data.", "adapter.public.")) from error
    if shared := len(set(map(content, whole_rows(data))) & set(map(content, private_texts))):
        raise InputError(
            f"Expected a public table without a text of the clients', got {shared} of theirs in {table.path!r}: a "
            "start reads its rows without noise, outside every ledger; take them out of adapter.public.path"
        )
    chosen = stream(seed, Purpose.INIT, step=1).permutation(len(data))[: table.num_examples]
    return PublicExamples(data.subset(np.sort(chosen)), sha256)


def refuse_private(table: PublicTable, sha256: str, private: Mapping[str, Any]) -> None:
    """Refuse a public table that holds what the file of the private examples holds, under any name.

    Raises:
        InputError: it is.
    """
    path = private.get("path")
    if not isinstance(path, str):
        return
    try:
        files = table_files(path)
    except InputError:  # a server may have no such table
        return
    for file in files:
        if file_sha256(file.path) == sha256:
            raise InputError(
                f"Expected adapter.public.path to be another table than data.path, got {table.path!r}, the same file "
                f"as {str(file.path)!r}: a start reads its rows without noise, outside every ledger"
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _labelled(path: Path, table: PublicTable) -> LabelledText:
    data = load_table(
        path,
        text_column=table.text_column,
        text_pair_column=table.text_pair_column,
        label_column=table.label_column,
        labels=table.labels,
    )
    return replace(data, source=table.path)


def _texts(path: Path, table: PublicTable) -> LabelledText:
    """Read texts alone; whatever is no text is an error, as in `fedlr.data.table`."""
    rows: list[tuple[str, ...]] = []
    second = table.text_pair_column
    for row in read_rows(path, [table.text_column, second or table.text_column], encoding="utf-8").rows:
        values = row.values[: 2 if second else 1]
        if problem := row.problem or next(filter(None, map(text_problem, values)), ""):
            raise InputError(f"{table.path}, row {row.number}: {problem}; fix the row, or choose another table")
        rows.append(values)
    if not rows:
        raise InputError(f"Expected texts in adapter.public.path={table.path!r}, got a table without rows")
    texts, *pairs = zip(*rows, strict=True)
    labels = np.zeros(len(texts), dtype=np.int64)
    return LabelledText(texts, labels, ("",), None, table.path, pairs=pairs[0] if pairs else None)
