"""Read JSON and JSONL files of a run; every complaint names the file, the line and the key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.runs.plain_yaml import plain_yaml

LARGEST = 1e18  # of any number of a run: what is larger was never written, and cannot be drawn
MOST = 1_000_000  # rounds, clients: a page is drawn of each


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands, so that a wrong value can be named."""

    values: Mapping[str, object]
    where: str

    def get(self, key: str) -> object:
        """Return a value that must be there (it may be null)."""
        if key not in self.values:
            raise InputError(f"{self.where} lacks {key!r}: the file is from another version or was cut; run again")
        return self.values[key]

    def number(self, key: str, *, may_diverge: bool = False) -> float:
        """Return a required number as float; nan and inf only of what a run that diverges has such values of."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"Expected a number for {key!r} in {self.where}, got {shown(value)}")
        if not (abs(value) <= LARGEST or (may_diverge and isinstance(value, float) and not math.isfinite(value))):
            got = "one of many digits" if isinstance(value, int) else value
            raise InputError(f"Expected a number of at most {LARGEST:g} for {key!r} in {self.where}, got {got}")
        return float(value)

    def optional_number(self, key: str, *, may_diverge: bool = False) -> float | None:
        """Return a number, or None where the file says null or nothing."""
        return None if self.values.get(key) is None else self.number(key, may_diverge=may_diverge)

    def integer(self, key: str) -> int:
        """Return a required whole number."""
        value = self.number(key)
        if not value.is_integer():
            raise InputError(f"Expected a whole number for {key!r} in {self.where}, got {shown(value)}")
        return int(value)

    def count(self, key: str, *, most: int = MOST) -> int:
        """Return a required whole number of things that there can be."""
        value = self.integer(key)
        if not 0 <= value <= most:
            raise InputError(f"Expected {key!r} in {self.where} in [0, {most:,}], got {value}")
        return value

    def text(self, key: str) -> str:
        """Return a required string."""
        value = self.get(key)
        if not isinstance(value, str):
            raise InputError(f"Expected text for {key!r} in {self.where}, got {shown(value)}")
        return value

    def items(self, key: str) -> list[object]:
        """Return a required list."""
        value = self.get(key)
        if not isinstance(value, list):
            raise InputError(f"Expected a list for {key!r} in {self.where}, got {shown(value)}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a required list of whole numbers."""
        items = self.items(key)
        return tuple(Record({key: item}, self.where).integer(key) for item in items)

    def label_counts(self) -> dict[int, tuple[int, ...]]:
        """Return label counts by client: of few clients an object each, of many a list of counts each, in order."""
        key = "label_counts"
        if key not in self.values:
            return {one.count("client_id"): one.integers(key) for one in self.records("clients")}
        each = (Record({key: item}, f"{self.where}, {key}[{n}]") for n, item in enumerate(self.items(key)))
        return {client_id: one.integers(key) for client_id, one in enumerate(each)}

    def records(self, key: str) -> list["Record"]:
        """Return a required list of objects."""
        return [as_record(item, f"{self.where}, {key}[{index}]") for index, item in enumerate(self.items(key))]

    def nested(self, key: str) -> "Record":
        """Return a required object; an absent one is empty."""
        return as_record(self.values.get(key) or {}, f"{self.where}, {key}")

    def numbers(self, key: str, *, may_diverge: bool = False) -> dict[str, float]:
        """Return an object of numbers, with its keys in order; an absent one is empty."""
        nested = self.nested(key)
        return {name: nested.number(name, may_diverge=may_diverge) for name in sorted(nested.values)}

    def number_lists(self, key: str) -> dict[str, tuple[float, ...]]:
        """Return an object of lists of numbers, which may diverge, with its keys in order; an absent one is empty."""
        nested = self.nested(key)
        return {name: _floats(nested, name) for name in sorted(nested.values)}


def read_text(path: Path) -> str:
    """Return the text of a required file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected the directory of a finished run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


def read_record(path: Path) -> Record:
    """Return the JSON object in a required file."""
    return _parse(read_text(path), str(path))


def optional_record(path: Path) -> Record | None:
    """Return the JSON object in a file; None where there is no such file."""
    return read_record(path) if path.exists() else None


def read_plain_yaml(path: Path) -> str:
    """Return YAML without tags and references, which somebody else may have written.

    Raises:
        InputError: it is something else.
    """
    text = read_text(path)
    try:
        plain_yaml(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    return text


def read_lines(path: Path) -> list[Record]:
    """Return the JSON objects of a required JSONL file, one a line; blank lines are skipped."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [_parse(line, f"{path} line {number}") for number, line in lines if line.strip()]


def as_record(value: object, where: str) -> Record:
    """Return a JSON value as a Record."""
    if not isinstance(value, dict):
        raise InputError(f"Expected a JSON object in {where}, got {shown(value)}")
    return Record(value, where)


def _parse(text: str, where: str) -> Record:
    try:
        return as_record(json.loads(text), where)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error


def _floats(record: Record, key: str) -> tuple[float, ...]:
    return tuple(Record({key: item}, record.where).number(key, may_diverge=True) for item in record.items(key))
