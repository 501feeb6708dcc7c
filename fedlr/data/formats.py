"""File formats to rows: .csv, .tsv, .jsonl, .json (one object a line) and .parquet.

A flaw of the whole file (encoding, structure, a column that is not there) is an `InputError` here. A flaw of
one row is kept in its `Row.problem`, so that the caller decides whether to refuse or to drop it. Notable
choices:

* A field of a csv is its text: "NA", "null" and "" are never turned into NaN.
* A csv row is numbered by the line on which it starts, as an editor shows it: the header is row 1. Blank
  lines hold nothing and are passed over. Rows of Parquet files count from 1.
* The csv module, not pandas: it knows the line of every row, and a strict parse refuses what pandas would
  guess.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fedlr.data.memory import free_memory
from fedlr.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

# Longest first: the mark of UTF-32 (little endian) begins with that of UTF-16.
_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# Names of columns that are told where it is not certain that they are names.
_WELL_KNOWN = frozenset(
    (
        "text texts sentence sentence1 review reviews content comment message tweet post body title subject "
        "question answer premise hypothesis document description summary prompt instruction input output response "
        "label labels class category sentiment target stars rating score topic intent emotion y id index group domain"
    ).split()
)
_NO_TEXT = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")
_BYTES_IN_MEMORY = 4  # per byte of a file, while its rows are read


class Row(NamedTuple):
    """One row: the number a person sees, the values of the wanted columns, and what is wrong with it ('' if
    nothing)."""

    number: int
    values: tuple[Any, ...]
    problem: str = ""


class Rows(NamedTuple):
    """The rows of one table; `class_names` are those of a ClassLabel label column, else None."""

    rows: list[Row]
    class_names: tuple[str, ...] | None = None


def read_rows(path: Path, columns: Sequence[str], *, encoding: str) -> Rows:
    """Read the wanted columns of a file with one of `SUFFIXES`; the second column is the label.

    Raises:
        InputError: for a file that is not there, cannot be read or lacks a column.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from fedlr.data.parquet import parquet_rows  # takes half a second to import

        return parquet_rows(path, columns)
    text = _decoded(_content(path), path, encoding)
    if suffix in (".csv", ".tsv"):
        return Rows(_csv_rows(text, path, columns, delimiter="," if suffix == ".csv" else "\t"))
    return Rows(_json_rows(text, path, columns))


def check_columns(source: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a table with two columns of one name, or without a wanted column.

    A name that is not wanted is told only where it cannot be a value: a table without a header has its first row there.

    Raises:
        InputError: which names the wanted column, and what to set.
    """
    twice = [name for name, count in Counter(found).items() if count > 1 and name]
    if twice:
        name = repr(twice[0]) if twice[0] in wanted else f"as column {found.index(twice[0]) + 1}"
        raise InputError(f"{source} has more than one column named {name}: rename or remove one")
    for name in wanted:
        if name not in found:
            raise InputError(f"{source} has no column {name!r}, {_column_hint(name, found, wanted)}")


def _column_hint(name: str, found: Sequence[str], wanted: Sequence[str]) -> str:
    folded = {c.casefold(): c for c in found}
    near = [] if name.casefold() not in folded else [name.casefold()]
    near = near or get_close_matches(name.casefold(), [c for c in folded if len(c) < 2 * len(name)], n=1, cutoff=0.75)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    if len(found) == 1 and any(mark in found[0] for mark in ";\t|,"):
        return (
            "its only column seems to hold several, separated by another character than the suffix says (.csv comma, "
            ".tsv tab)"
        )
    fix = "set data.text_column, data.text_pair_column, data.label_column or data.group_column to one of them"
    # With a wanted name among them the first row is a header; else only well-known names are surely no values.
    is_header = any(c in found for c in wanted)
    shown = [c for c in found[:20] if c and len(c) <= 30 and (is_header or c.casefold() in _WELL_KNOWN)]
    if not shown:
        return f"nor a well-known name among its {len(found)}: the first row must be a header with names; {fix}"
    more = ", ..." if len(shown) < len(found) else ""
    return f"its columns are {', '.join(map(repr, shown))}{more}: {fix}"


def _content(path: Path) -> bytes:
    try:
        check_fits(path, path.stat().st_size)
        return path.read_bytes()
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory: split the file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def check_fits(path: Path, num_bytes: int) -> None:
    """Refuse a table that memory could not hold.

    Raises:
        InputError: with both sizes.
    """
    free = free_memory()
    if free and num_bytes * _BYTES_IN_MEMORY > free:
        raise InputError(
            f"{path} has {num_bytes / 1e9:,.1f} GB, which needs about {_BYTES_IN_MEMORY} times as much memory, and "
            f"{free / 1e9:,.1f} GB are free: split the file"
        )


def _decoded(content: bytes, path: Path, encoding: str) -> str:
    """Decode a text file, without its byte order mark."""
    try:
        codec = codecs.lookup(encoding).name
        if codec.replace("-", "_") in _NO_TEXT:
            raise LookupError(encoding)
        wide = codec.startswith(("utf-16", "utf-32"))
        mark = next((name for mark, name in _WIDE_MARKS if content.startswith(mark)), None)
        if mark and not wide:
            raise InputError(f"{path} is a {mark.upper()} file, not {encoding}: set data.encoding={mark}")
        if not wide:
            _check_no_nul(content, path)
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, row {row}: byte {error.start} (0x{content[error.start]:02x}) is not {encoding}: "
            "save the file as UTF-8, or name its encoding, such as data.encoding=cp1252 (Windows)"
        ) from error
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory: split the file") from error
    except (LookupError, TypeError, ValueError) as error:  # no codec, one from bytes to bytes, a NUL in its name
        raise InputError(f"Expected data.encoding to be one such as utf-8, got {str(encoding)[:40]!r}") from error
    if wide:
        _check_no_nul(text.encode("utf-8", "surrogatepass"), path)
    if not text.strip():
        raise InputError(f"{path} is an empty file: expected a table with a text and a label in each row")
    return text


def _check_no_nul(content: bytes, path: Path) -> None:
    offset = content.find(b"\0")
    if offset >= 0:
        row = content.count(b"\n", 0, offset) + 1
        raise InputError(
            f"{path}, row {row}: byte {offset} is NUL, so this is a binary file or damaged, not a text file "
            f"as {path.suffix} says: export it again as UTF-8 text"
        )


def _csv_rows(text: str, path: Path, columns: Sequence[str], *, delimiter: str) -> list[Row]:
    records = _csv_records(text, path, delimiter)
    _, first = next(records)
    header = [name.strip() for name in first]
    check_columns(str(path), header, columns)
    places = [header.index(name) for name in columns]
    rows = []
    for number, record in records:
        if len(record) == len(header):
            rows.append(Row(number, tuple(record[i] for i in places)))
        else:
            problem = f"{len(record)} fields where the header has {len(header)}"
            rows.append(Row(number, (), f"{problem} (quote a text that holds {delimiter!r})"))
    return rows


def _csv_records(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not a blank line, with the line on which it starts."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _field_limit(len(text)):
        while True:
            number = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{path}, row {number}: {_quote_problem(error)}") from error
            if record and (len(record) > 1 or record[0].strip()):
                yield number, record


def _quote_problem(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return 'a quote (") opened here is never closed: close it, or write a quote inside a text as ""'
    return f'a quoted field goes on after its closing quote ({error}): write a quote inside a text as ""'


@contextmanager
def _field_limit(num_characters: int) -> Iterator[None]:
    """Let one csv field be as long as the file (the module stops at 131,072 characters, a text of 20,000
    words)."""
    old = csv.field_size_limit()
    csv.field_size_limit(max(old, num_characters))
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _json_rows(text: str, path: Path, columns: Sequence[str]) -> list[Row]:
    if text.lstrip().startswith("["):
        raise InputError(
            f"{path} holds one JSON array: expected one JSON object a line, such as "
            'pandas.DataFrame.to_json(path, orient="records", lines=True) writes'
        )
    rows: list[Row] = []
    found: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, problem = _json_object(line)
            found.update(dict.fromkeys(value))
            rows.append(Row(number, tuple(value.get(name) for name in columns), problem))
    if found:  # else no line was an object, and the problem of the first row says more
        check_columns(str(path), list(found), columns)
    return rows


def _json_object(line: str) -> tuple[dict[str, Any], str]:
    """Return the object of one line and what is wrong with the line."""
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        return {}, f"not valid JSON ({where}): expected one JSON object a line"
    except (ValueError, RecursionError) as error:
        return {}, f"not a usable JSON object ({_json_problem(error)})"
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__} where an object with named fields is expected"
    return value, ""


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a field is named twice" if "twice" in str(error) else "a number has too many digits"


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a field is named twice")
    return value
