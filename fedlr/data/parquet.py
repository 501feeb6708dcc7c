"""Parquet files to rows. A small file can hold any number of rows of any size: sizes are looked at while it is read."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fedlr.data.formats import Row, Rows, check_columns, check_fits
from fedlr.errors import InputError
from fedlr.errors.messages import first_line

_ROW_BYTES = 40  # what a row costs at least, as Python objects, over the factor of `check_fits`
_ROWS_AT_ONCE = 4096


def parquet_rows(path: Path, columns: Sequence[str]) -> Rows:
    """Read the wanted columns of a Parquet file; the second column is the label.

    Raises:
        InputError: for a file that cannot be read, lacks a column, or holds more than memory does.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is an empty file: expected a table with a text and a label in each row")
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_columns(str(path), schema.names, columns)
            check_fits(path, file.metadata.num_rows * _ROW_BYTES)
            rows = [Row(i, values) for i, values in enumerate(_values(file, path, columns), start=1)]
    except InputError:
        raise
    except (MemoryError, pyarrow.ArrowMemoryError) as error:
        raise InputError(f"{path} does not fit into memory: split the file") from error
    except (pyarrow.ArrowException, OSError, OverflowError, RecursionError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable Parquet file ({first_line(error):.200}): it is damaged, cut short or of "
            "another kind; write or copy it again"
        ) from error
    return Rows(rows, _class_names(schema.metadata or {}, columns[1], path))


def _values(file: "pyarrow.parquet.ParquetFile", path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    num_bytes = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(dict.fromkeys(columns))):
        num_bytes += batch.nbytes
        check_fits(path, num_bytes)
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _class_names(metadata: dict[bytes, bytes], label_column: str, path: Path) -> tuple[str, ...] | None:
    """Return the ClassLabel names that Hugging Face `datasets` leaves in a Parquet schema."""
    if b"huggingface" not in metadata:
        return None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):  # the note is there, the column is no ClassLabel
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    normal = tuple(unicodedata.normalize("NFC", name).strip() for name in names)
    if len(set(normal)) < len(normal) or "" in normal:
        raise InputError(f"{path} names classes of column {label_column!r} twice or not at all: write the file again")
    return normal
