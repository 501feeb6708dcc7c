"""Every data file a person can get wrong is one sentence that says where and how to mend it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlr.data.table import load_table
from fedlr.errors import InputError


class Hostile(NamedTuple):
    """A file, how it is loaded, and what the message must say."""

    name: str
    content: bytes
    expected: tuple[str, ...]
    options: dict[str, Any] = {}


def csv(*rows: str, end: str = "\n") -> bytes:
    return (end.join(["text,label", *rows]) + end).encode()


def jsonl(*lines: str) -> bytes:
    return "\n".join(['{"text": "fine", "label": "a"}', *lines, '{"text": "fine", "label": "b"}']).encode()


def parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


GOOD = ("so good,positive", "so bad,negative")
SOUND_PARQUET = parquet({"text": ["x" * 500, "y"] * 200, "label": [0, 1] * 200})

FILES = {
    "empty": Hostile("a.csv", b"", ("empty file",)),
    "only white space": Hostile("a.csv", b" \n\n  \n", ("empty file",)),
    "only a byte order mark": Hostile("a.csv", b"\xef\xbb\xbf\n", ("empty file",)),
    "header only": Hostile("a.csv", csv(), ("header and no rows",)),
    "no text column": Hostile("a.csv", b"Texts,label\nx,a\n", ("no column 'text'", "'Texts'", "did you mean")),
    "no label column": Hostile("a.csv", b"text,y\nx,a\n", ("no column 'label'", "'text', 'y'", "label_column")),
    "no group column": Hostile("a.csv", csv(*GOOD), ("no column 'site'",), {"group_column": "site"}),
    "semicolons": Hostile("a.csv", b"text;label\nx;a\n", ("no column 'text'", "separated by another character")),
    "commas in tsv": Hostile("a.tsv", csv(*GOOD), ("no column 'text'", "separated by another character")),
    "duplicate columns": Hostile("a.csv", b"text,label,text\nx,a,y\n", ("more than one column named 'text'",)),
    "empty text": Hostile("a.csv", csv(*GOOD, ",positive"), ("row 4", "text is empty", "on_bad_row=drop")),
    "white space text": Hostile("a.csv", csv(GOOD[0], '" \t",positive'), ("row 3", "text is empty")),
    "missing label": Hostile("a.csv", csv(*GOOD, "x,"), ("row 4", "label is missing")),
    "label nan": Hostile("a.csv", csv(*GOOD, "x,NaN"), ("row 4", "label is missing")),
    "unknown label": Hostile(
        "a.csv",
        csv(*GOOD, "x,positve"),
        ("row 4", "column 'label'", "not one of 'negative', 'positive'", "case counts"),
        {"labels": ["negative", "positive"]},
    ),
    "one label": Hostile("a.csv", csv("x,a", "y,a"), ("only one label", "data.labels")),
    "one row": Hostile("a.csv", csv("x,a"), ("1 usable rows", "at least 2")),
    "latin-1": Hostile("a.csv", csv(*GOOD) + b"caf\xe9,positive\n", ("row 4", "byte 47", "0xe9", "data.encoding=")),
    "cut utf-8": Hostile("a.csv", csv(*GOOD) + b"caf\xc3", ("row 4", "data.encoding=")),
    "nul byte": Hostile("a.csv", csv(*GOOD) + b"x\0y,positive\n", ("row 4", "NUL", "binary")),
    "zip named csv": Hostile("a.csv", b"PK\x03\x04\x14\0\0\0\x08\0", ("row 1", "binary")),
    "utf-16": Hostile("a.csv", csv(*GOOD).decode().encode("utf-16"), ("UTF-16", "data.encoding=utf-16")),
    "utf-32": Hostile("a.csv", csv(*GOOD).decode().encode("utf-32"), ("UTF-32", "data.encoding=utf-32")),
    "no such encoding": Hostile("a.csv", csv(*GOOD), ("data.encoding", "'utf-9'"), {"encoding": "utf-9"}),
    "no text encoding": Hostile("a.csv", csv(*GOOD), ("data.encoding", "'base64'"), {"encoding": "base64"}),
    "row too long": Hostile("a.csv", csv(GOOD[0], "good, and cheap,positive"), ("row 3", "3 fields", "header has 2")),
    "row too short": Hostile("a.csv", csv("x", *GOOD), ("row 2", "1 fields", "header has 2")),
    "row after a text of two lines": Hostile("a.csv", csv('"two\nlines",a', "x,b", "y"), ("row 5", "1 fields")),
    "open quote": Hostile("a.csv", csv(GOOD[0], '"so bad,negative', "x,a", "y,b"), ("row 3", "never closed")),
    "text after quote": Hostile("a.csv", csv(GOOD[0], '"so" bad,negative'), ("row 3", "after its closing quote")),
    "numbers as texts": Hostile("a.csv", csv("1.5,a", "2,b"), ("only numbers", "data.text_column")),
    "columns exchanged": Hostile(
        "a.csv", csv(*(f"{i % 2},text number {i}" for i in range(60))), ("only numbers", "data.text_column")
    ),
    "score as label": Hostile(
        "a.csv",
        csv(*(f"text,{i / 7}" for i in range(60))),
        ("60 different numbers with decimals", "score", "regression"),
    ),
    "missing group": Hostile(
        "a.csv", b"text,label,g\nx,a,1\ny,b,\n", ("row 3", "group is missing"), {"group_column": "g"}
    ),
    "invalid json": Hostile("a.jsonl", jsonl('{"text": "x", "label": '), ("row 2", "not valid JSON")),
    "json array line": Hostile("a.jsonl", jsonl('["x", "a"]'), ("row 2", "list", "object with named fields")),
    "json number line": Hostile("a.json", jsonl("17"), ("row 2", "int", "object")),
    "one json array": Hostile("a.json", b'[{"text": "x", "label": "a"}]', ("one JSON array", "one JSON object a line")),
    "indented json": Hostile("a.json", b'{\n  "text": "x",\n  "label": "a"\n}', ("row 1", "not valid JSON")),
    "json field named twice": Hostile("a.jsonl", jsonl('{"text": "x", "text": "y"}'), ("row 2", "named twice")),
    "json without the field": Hostile("a.jsonl", b'{"txt": "x", "label": 1}\n', ("no column 'text'", "'txt'")),
    "json row without text": Hostile("a.jsonl", jsonl('{"label": "a"}'), ("row 2", "text is missing")),
    "json row without label": Hostile("a.jsonl", jsonl('{"text": "x"}'), ("row 2", "label is missing")),
    "json nan text": Hostile("a.jsonl", jsonl('{"text": NaN, "label": "a"}'), ("row 2", "text is missing")),
    "json nan label": Hostile("a.jsonl", jsonl('{"text": "x", "label": NaN}'), ("row 2", "label is missing")),
    "nested text": Hostile("a.jsonl", jsonl('{"text": {"en": "x"}, "label": "a"}'), ("row 2", "dict", "string")),
    "nested label": Hostile("a.jsonl", jsonl('{"text": "x", "label": ["a"]}'), ("row 2", "label is a list")),
    "number as text": Hostile("a.jsonl", jsonl('{"text": 12, "label": "a"}'), ("row 2", "int", "string")),
    "fraction as label": Hostile(
        "a.jsonl", jsonl('{"text": "x", "label": 0.4}'), ("row 2", "label is no whole number")
    ),
    "half a character": Hostile("a.jsonl", jsonl('{"text": "\\ud83d", "label": "a"}'), ("row 2", "half a character")),
    "json too deep": Hostile("a.jsonl", jsonl("[" * 100_000), ("row 2", "not a usable JSON object")),
    "json endless number": Hostile(
        "a.jsonl", jsonl('{"text": "x", "label": 1' + "0" * 5000 + "}"), ("row 2", "not a usable JSON object")
    ),
    "no parquet": Hostile("a.parquet", csv(*GOOD), ("not a readable Parquet file",)),
    "empty parquet": Hostile("a.parquet", b"", ("empty file",)),
    "cut parquet": Hostile("a.parquet", SOUND_PARQUET[:-40], ("not a readable Parquet file", "cut short")),
    "parquet without the column": Hostile("a.parquet", parquet({"a": ["x"], "label": [1]}), ("no column 'text'",)),
    "parquet null text": Hostile(
        "a.parquet", parquet({"text": ["x", None], "label": [0, 1]}), ("row 2", "text is missing")
    ),
    "parquet nan label": Hostile(
        "a.parquet",
        parquet({"text": ["x", "y"], "label": [0.0, float("nan")]}),
        ("row 2", "label is missing"),
    ),
    "parquet bytes": Hostile("a.parquet", parquet({"text": [b"x", b"y"], "label": [0, 1]}), ("row 1", "bytes")),
    "excel": Hostile("a.xlsx", b"PK\x03\x04", (".xlsx", "export it as one of .csv")),
    "no suffix": Hostile("reviews", csv(*GOOD), ("ends in ''", "export it as one of .csv")),
}


def message_of(load: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        load()
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_one_sentence_that_says_what_to_do(case: str, tmp_path: Path) -> None:
    hostile = FILES[case]
    path = tmp_path / hostile.name
    path.write_bytes(hostile.content)
    message = message_of(lambda: load_table(path, **hostile.options))
    for fragment in hostile.expected:
        assert fragment in message
    assert "\n" not in message and len(message) < 700
    assert hostile.name in message or "data.encoding" in message


def test_a_broken_parquet_file_never_gives_a_traceback(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "a.parquet"
    for _ in range(150):
        content = bytearray(SOUND_PARQUET)
        for offset in generator.integers(len(content), size=3):
            content[offset] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        try:
            load_table(path)
        except InputError:
            pass


def test_a_broken_text_file_never_gives_a_traceback(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sound = {
        "a.csv": csv(*(f'"text ""{i}"", é",{"ab"[i % 2]}' for i in range(20))),
        "a.jsonl": jsonl(*(json.dumps({"text": f"é {i}", "label": i % 2}) for i in range(20))),
    }
    for name, content in sound.items():
        path = tmp_path / name
        for _ in range(150):
            broken = bytearray(content)
            for offset in generator.integers(len(broken), size=3):
                broken[offset] = int(generator.choice(list(b'",{}[]\n\r\0\\x:\xff')))
            path.write_bytes(broken)
            try:
                load_table(path)
            except InputError:
                pass


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_bytes(csv(*GOOD))
    assert "'reviews.csv'" in message_of(lambda: load_table(tmp_path / "review.csv"))
    assert "'reviews.csv'" in message_of(lambda: load_table(tmp_path / "something_else.csv"))
    assert "does not exist" in message_of(lambda: load_table(tmp_path / "no_folder" / "reviews.csv"))
    assert "no file 'reviews.xlsx'" in message_of(lambda: load_table("reviews.xlsx"))
    assert "no file" in message_of(lambda: load_table(str(tmp_path / ("n" * 400 + ".csv"))))
    assert "no file" in message_of(lambda: load_table("nul\0byte.csv"))


def test_a_folder_stands_for_the_tables_in_it(tmp_path: Path) -> None:
    assert "is a folder without" in message_of(lambda: load_table(tmp_path))
    (tmp_path / "reviews.csv").write_bytes(csv(*GOOD))
    (tmp_path / ".hidden.csv").write_bytes(b"no table")
    (tmp_path / "readme.txt").write_bytes(b"no table")
    assert load_table(tmp_path).clients == ("reviews",)


def test_a_dataset_that_cannot_be_reached_says_that_the_run_is_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = message_of(lambda: load_table("nobody/no_such_reviews:sst2"))
    assert "'nobody/no_such_reviews:sst2' is not a file here" in message and "offline" in message


@pytest.mark.parametrize(
    "options",
    [
        {"on_bad_row": "ignore"},
        {"labels": ["a"]},
        {"labels": ["a", "a"]},
        {"labels": ["a", None]},
        {"labels": "ab"},
        {"label_column": "text"},
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv(*GOOD))
    assert "Expected" in message_of(lambda: load_table(path, **options))
    assert "Expected a path" in message_of(lambda: load_table(None))  # type: ignore[arg-type]


def test_bad_rows_are_dropped_on_request_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv(*GOOD, ",positive", "x,", "x,y,z", "x,neutral", "fine,negative"))
    data = load_table(path, on_bad_row="drop", labels=["negative", "positive"])
    assert data.texts == ("so good", "so bad", "fine")
    assert data.num_dropped == 4
    path.write_bytes(csv(GOOD[0], ",positive"))
    assert "1 bad rows were dropped" in message_of(lambda: load_table(path, on_bad_row="drop"))


def calls_per_row(path: Path) -> float:
    """Count the Python calls that loading a row costs."""
    num_calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        num_rows = len(load_table(path))
    finally:
        sys.setprofile(None)
    return num_calls / num_rows


def test_the_work_of_a_row_does_not_grow_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    costs = []
    for num_rows in (1000, 4000):
        path.write_bytes(csv(*(f'"text, number {i} é {"word " * 25}",{"ab"[i % 2]}' for i in range(num_rows))))
        costs.append(calls_per_row(path))
    assert costs[1] < 1.05 * costs[0] < 100
