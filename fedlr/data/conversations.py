"""Conversations from a table: plain texts, prompts with responses, chat messages; what is accepted and what refused.

Every format becomes turns with a role. Which parts of them a model is trained on is the task's business.

| format | columns | a row |
|---|---|---|
| `text` | text_column | one text, all of it to be learnt |
| `prompt_response` | prompt_column, response_column | a user's turn and the answer |
| `alpaca` | `instruction`, `input` (may be empty), `output` | the instruction with its input below, and the answer |
| `dolly` | `instruction`, `context` (may be empty), `response` | the same, as databricks-dolly-15k calls it |
| `messages` | messages_column | OpenAI's `[{"role": ..., "content": ...}, ...]` |
| `sharegpt` | messages_column | `[{"from": "human", "value": ...}, ...]` |

Notable choices:

* No message holds a value of a row: it names the file, the row, the column and the turn.
* A conversation ends with an answer. What follows the last answer would be read and never learnt from.
* In a csv, messages are JSON text; in the other formats they may be, too.
* A text is kept as it is, of any length; the task cuts and counts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from fedlr.data.files import table_files
from fedlr.data.formats import Row, read_rows
from fedlr.data.hub import read_hub
from fedlr.data.table import Source, Table
from fedlr.data.values import as_name, text_problem
from fedlr.errors import InputError

Format = Literal["text", "prompt_response", "alpaca", "dolly", "messages", "sharegpt"]

SYSTEM, USER, ASSISTANT, TEXT = "system", "user", "assistant", "text"

# What is written for a role in the wild; OpenAI's `developer` is its newer word for `system`.
_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
}
_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
_INSTRUCTIONS = {  # of which the second column may be empty
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
}


class Turn(NamedTuple):
    """What one side says: `system`, `user` or `assistant`; the role `text` is that of a text without sides."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversations(Table):
    """Conversations or plain texts, in the order of their source.

    `groups` names the natural client or domain of each row, if the source has such a column; `clients` the natural
    clients where there is a file of each: `groups` then says whose a row is. `num_dropped` counts bad rows that were
    left out on request, `num_held_out` rows that are among those of a test table. `numbers` are those that a person
    sees in the source.
    """

    turns: tuple[tuple[Turn, ...], ...]
    numbers: NDArray[np.int64]  # (N,)
    groups: tuple[str, ...] | None
    source: str
    num_dropped: int = 0
    clients: tuple[str, ...] | None = None
    num_held_out: int = 0

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Return zeros, shape (N,): a conversation has no class."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def label_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return no names: a conversation has no class."""
        return ()

    @property
    def is_plain(self) -> bool:
        """Return whether all rows are texts without turns."""
        return all(row[0].role == TEXT for row in self.turns)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the rows at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        turns = tuple(self.turns[i] for i in chosen)
        groups = None if self.groups is None else tuple(self.groups[i] for i in chosen)
        return replace(self, turns=turns, numbers=self.numbers[chosen], groups=groups)

    def row_texts(self) -> tuple[tuple[str, ...], ...]:
        """Return the texts of the turns of each row."""
        return tuple(tuple(turn.text for turn in row) for row in self.turns)


class _Columns(NamedTuple):
    texts: tuple[str, ...]  # as the format reads them
    group: str | None

    @property
    def names(self) -> list[str]:
        """Return the names in the order in which a row has their values; the readers take the second for a label."""
        names = self.texts if len(self.texts) > 1 else self.texts * 2
        return [*names, *([] if self.group is None else [self.group])]


def load_conversations(
    path: str | os.PathLike[str],
    *,
    format: Format,
    text_column: str = "text",
    prompt_column: str = "prompt",
    response_column: str = "response",
    messages_column: str | None = None,
    system: str | None = None,
    group_column: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: str = "refuse",
    train_split: str | None = None,
    fetched_by: str | None = None,
) -> Conversations:
    """Load conversations from .csv, .tsv, .jsonl, .json (one object a line) or .parquet files, or from the Hub.

    A folder or a pattern with `*` stands for several files, one a client (`fedlr.data.files`). A path that does not
    exist and has no file suffix is taken for a Hugging Face dataset, as in `fedlr.data.table.load_table`.

    Args:
        path: of the file, folder, pattern or dataset.
        format: how a row is written, one of the table above.
        text_column: of format=text.
        prompt_column: of format=prompt_response.
        response_column: of format=prompt_response.
        messages_column: of format=messages (None: `messages`) and format=sharegpt (None: `conversations`).
        system: said before every conversation that does not begin with a system turn of its own; None: nothing.
        group_column: the natural clients, for `partition=by_group`.
        encoding: of a text file.
        on_bad_row: "refuse", or "drop", which leaves bad rows out and counts them.
        train_split: of a dataset by name (None: `train`).
        fetched_by: the command that fetches the file, told where it is missing.

    Raises:
        InputError: which names the file, the row and what to change.
    """
    if on_bad_row not in ("refuse", "drop"):
        raise InputError(f"Expected on_bad_row to be 'refuse' or 'drop', got {on_bad_row!r}")
    if format not in get_args(Format):
        raise InputError(f"Expected format to be one of {', '.join(get_args(Format))}, got {format!r}")
    if format == "text" and system is not None:
        raise InputError("Expected system=null with format=text, which has no turns, got a text; set data.system=null")
    columns = {
        "text": (text_column,),
        "prompt_response": (prompt_column, response_column),
        **_INSTRUCTIONS,
        "messages": (messages_column or "messages",),
        "sharegpt": (messages_column or "conversations",),
    }[format]
    if len(set(columns)) < len(columns) or group_column in columns:
        raise InputError(f"Expected different columns, got {[*columns, group_column]}; change data.group_column")
    wanted = _Columns(columns, group_column)
    sources = _read(os.fspath(path), wanted, encoding=encoding, split=train_split, fetched_by=fetched_by)
    return _table(sources, os.fspath(path), wanted, format=format, system=system, drop=on_bad_row == "drop")


def _read(path: str, columns: _Columns, *, encoding: str, split: str | None, fetched_by: str | None) -> list[Source]:
    """Find out what `path` is and read it."""
    files = table_files(path, fetched_by=fetched_by)
    try:
        if not files:
            return [Source(path, read_hub(path, columns.names, split=split or "train"))]
        if split is not None:
            raise InputError(f"Expected train_split=null with the file or folder {path!r}, got {split!r}")
        several = files[0].client is not None
        return [
            Source(str(f.path) if several else path, read_rows(f.path, columns.names, encoding=encoding), f.client)
            for f in files
        ]
    except InputError as error:  # which knows the columns of labelled texts
        wrong = "data.text_column, data.text_pair_column, data.label_column or data.group_column to one of them"
        right = "data.format to how the rows are written, and data's *_column keys to its columns"
        raise InputError(str(error).replace(wrong, right).replace("a text and a label in each row", "rows")) from error


def _table(
    sources: Sequence[Source], name: str, columns: _Columns, *, format: Format, system: str | None, drop: bool
) -> Conversations:
    turns, numbers, groups, num_rows = [], [], [], 0
    for source in sources:
        num_rows += len(source.table.rows)
        for row in source.table.rows:
            found, group, problem = _clean(row, columns, format, system)
            if not problem:
                turns.append(found)
                numbers.append(row.number)
                groups.append(source.client or "" if columns.group is None else group)
            elif not drop:
                fix = "fix the row, or leave such rows out with data.on_bad_row=drop"
                raise InputError(f"{source.name}, row {row.number}{problem}; {fix}")
    if len(turns) < 2:
        dropped = f" after {num_rows - len(turns)} bad rows were dropped" if num_rows > len(turns) else ""
        raise InputError(f"{name} has {len(turns)} usable rows{dropped}: expected at least 2")
    by_file = columns.group is None and sources[0].client is not None
    return Conversations(
        tuple(turns),
        np.array(numbers, dtype=np.int64),
        groups=tuple(groups) if by_file or columns.group else None,
        source=name,
        num_dropped=num_rows - len(turns),
        clients=tuple(source.client or "" for source in sources) if by_file else None,
    )


def _clean(row: Row, columns: _Columns, format: Format, system: str | None) -> tuple[tuple[Turn, ...], str, str]:
    """Return what a row holds, its group, and what is wrong with it ('' if nothing)."""
    if row.problem:
        return (), "", f": {row.problem}"
    values = dict(zip(columns.names, row.values, strict=True))
    turns, problem = _turns(values, columns.texts, format)
    if problem:
        return (), "", problem
    if system is not None and turns[0].role != SYSTEM:
        turns = (Turn(SYSTEM, system), *turns)
    group, problem = ("", "") if columns.group is None else as_name(values[columns.group])
    return turns, group, f", column {columns.group!r}: the group {problem}" if problem else ""


def _turns(values: Mapping[str, Any], columns: Sequence[str], format: Format) -> tuple[tuple[Turn, ...], str]:
    """Return the turns of a row, and what is wrong with them."""
    if format in _KEYS:
        (column,) = columns
        turns, problem = _messages(values[column], *_KEYS[format])
        return turns, f", column {column!r}: {problem}" if problem else ""
    if format in _INSTRUCTIONS and (values[columns[1]] is None or values[columns[1]] == ""):
        columns = (columns[0], columns[2])
    for column in columns:
        if problem := text_problem(values[column]):
            return (), f", column {column!r}: {problem}"
    *asked, said = (values[column] for column in columns)
    if format == "text":
        return (Turn(TEXT, said),), ""
    return (Turn(USER, "\n\n".join(asked)), Turn(ASSISTANT, said)), ""


def _messages(value: Any, role_key: str, text_key: str) -> tuple[tuple[Turn, ...], str]:
    """Return the turns of a list of messages, and what is wrong with it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (), "expected a list of messages, got text that is not JSON"
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        kind = (
            "an empty one" if isinstance(value, list) else "nothing" if value is None else f"a {type(value).__name__}"
        )
        return (), f"expected a list of messages, got {kind}"
    turns = []
    for number, message in enumerate(value, start=1):
        turn, problem = _turn(message, role_key, text_key)
        if turn is None:
            return (), f"turn {number}: {problem}"
        turns.append(turn)
    if turns[-1].role != ASSISTANT:
        return (), "the last turn is not the assistant's, so that nothing is learnt from it"
    if len(turns) == 1 or any(turn.role == SYSTEM for turn in turns[1:]):
        return (), "expected the turns of a user and an assistant, a system's only before them"
    return tuple(turns), ""


def _turn(message: Any, role_key: str, text_key: str) -> tuple[Turn | None, str]:
    if not isinstance(message, Mapping):
        return None, f"expected an object with {role_key!r} and {text_key!r}, got a {type(message).__name__}"
    role = message.get(role_key)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        return None, f"its {role_key!r} is none of {', '.join(_ROLES)}"
    text = message.get(text_key)
    if isinstance(text, list):  # OpenAI's content parts
        parts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in text]
        if not all(isinstance(part, str) for part in parts):
            return None, f"its {text_key!r} has parts that are not text (pictures, tools), which cannot be read here"
        text = "".join(map(str, parts))
    if message.get("tool_calls"):
        return None, "it calls tools, which cannot be read here"
    if problem := text_problem(text):
        return None, f"{text_key!r}: {problem}"
    return Turn(_ROLES[role.lower()], str(text)), ""
