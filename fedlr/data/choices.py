"""Questions with several answers to choose from, one of them right: the files of HellaSwag and of MMLU.

`hellaswag` (Zellers et al. 2019): the model is given `ctx` and chooses among the `endings`; `label` is right.
`mmlu` (Hendrycks et al. 2021): it is given the `question`, each of the `choices` behind its letter, and `Answer:`, and
chooses among the letters; `answer` is right.

What is right is told by its place, from 0, or its letter. In a csv, choices are a JSON list. No message holds a value
of a row.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedlr.data.formats import SUFFIXES, Row, read_rows
from fedlr.data.values import text_problem
from fedlr.errors import InputError

ChoiceFormat = Literal["hellaswag", "mmlu"]
COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "hellaswag": ("ctx", "endings", "label"),
    "mmlu": ("question", "choices", "answer"),
}
LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """A text, what may follow it, and the place of what is right."""

    context: str
    choices: tuple[str, ...]
    right: int


def load_questions(path: Path, *, format: ChoiceFormat) -> tuple[Question, ...]:
    """Read a .csv, .tsv, .jsonl, .json (one object a line) or .parquet file.

    Raises:
        InputError: which names the file and the row.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "two.jsonl"
    >>> _ = file.write_text('{"question": "1 + 1?", "choices": ["1", "2"], "answer": "B"}' + chr(10))
    >>> load_questions(file, format="mmlu")[0].context.splitlines()
    ['1 + 1?', 'A. 1', 'B. 2', 'Answer:']
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"Expected a {', '.join(SUFFIXES)} file of questions, got {str(path)!r}")
    columns = COLUMNS[format]
    try:
        rows = read_rows(path, columns, encoding="utf-8").rows
    except InputError as error:
        keys = "data.text_column, data.text_pair_column, data.label_column or data.group_column to one of them"
        raise InputError(str(error).replace(f"set {keys}", f"{format} has {', '.join(columns)}")) from error
    if not rows:
        raise InputError(f"Expected questions in {path}, got none")
    return tuple(_question(row, columns, format=format, source=str(path)) for row in rows)


def _question(row: Row, columns: tuple[str, str, str], *, format: ChoiceFormat, source: str) -> Question:
    text, offered, right = row.values if not row.problem else (None, None, None)
    problem = row.problem or text_problem(text)
    choices = () if problem else _choices(offered)
    place = _place(right, len(choices)) if choices else None
    if problem or not choices or place is None:
        wrong = problem or (
            f"expected {columns[2]!r} to be a place from 0 to {len(choices) - 1}, or a letter"
            if choices
            else f"expected {columns[1]!r} to be a list of 2 to {len(LETTERS)} texts"
        )
        raise InputError(f"{source}, row {row.number}: {wrong}; fix the row")
    if format == "hellaswag":
        return Question(text, choices, place)
    offers = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return Question(f"{text}\n{offers}\nAnswer:", tuple(LETTERS[: len(choices)]), place)


def _choices(value: Any) -> tuple[str, ...]:
    """Return a list of texts, () where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ()
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= len(LETTERS):
        return ()
    return () if any(text_problem(text) for text in value) else tuple(value)


def _place(value: Any, num_choices: int) -> int | None:
    """Return which choice is right, None where that is not said."""
    if isinstance(value, str):
        text = value.strip()
        if len(text) == 1 and text in LETTERS:
            value = LETTERS.index(text)
        elif text.isascii() and text.isdigit() and len(text) < 4:
            value = int(text)
    is_place = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_choices
    return value if is_place else None
