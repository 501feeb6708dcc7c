"""Two hundred hostile tables: each loads or is one line, without a value of a row, whoever reads it.

The marker stands in every row. Work is bounded by the size of the file: no table here is larger than 2 MB.
Mutants killed: a message that shows a label, a list of columns of a table without a header.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fedlr.data.formats as rows_module
import fedlr.data.table as table_module
from fedlr.data.public import PublicTable, read_public
from fedlr.data.table import load_table
from fedlr.errors import InputError

MARKER = "Zq7PrivateOfSomebody"
SIZE = 2_000_000

# What a field of a row may hold instead of a text or a label. Each is a marker, or has one next to it.
TEXTS = [
    MARKER,
    "",
    " ",
    MARKER * 5000,
    MARKER + "\u0000",
    MARKER + "\u202e\u0301",
    f'{MARKER}"',
    f"{MARKER}\nsecond line",
    f"{MARKER},{MARKER}",
    f"{MARKER}\t{MARKER}",
    "1" * 5000,
    "-" + MARKER,
    "=cmd()" + MARKER,
]
LABELS = [
    MARKER,
    MARKER.lower(),
    MARKER + "\u0301",
    MARKER * 100,
    "9" * 5000,
    "1e9999999999",
    "-1e-9999",
    "0x1F",
    "١",
    "²",
    "--5",
    "1_000",
    "NA",
    "None",
    "nan",
    "inf",
    "-inf",
    "",
    f"{MARKER}\n{MARKER}",
    "[" * 1000,
]
TYPED: list[Any] = [
    None, True, 0, -1, 0.25, 10**30, 10**400, float("nan"), float("inf"), [MARKER], {MARKER: MARKER}, [[[[MARKER]]]],
    MARKER,
]  # fmt: skip
LINES = [
    "[" * 100_000,
    '{"a":' * 50_000,
    f'{{"text": "{MARKER}", "label": ' + "1" * 5000 + "}",
    f'{{"text": "{MARKER}", "label": 1e999}}',
    f'{{"text": "{MARKER}", "text": "{MARKER}"}}',
    f'{{"{MARKER}": 1}}',
    f'"{MARKER}"',
    f"{MARKER}",
    f'{{"text": "\\ud800{MARKER}", "label": "\\udfff{MARKER}"}}',
    f"{{'text': '{MARKER}'}}",
    "null",
    "",
    "\ufeff{}",
    "//" + MARKER,
    f'{{"text": "{MARKER}", "label": "a"}} {{"text": "{MARKER}"}}',
]
BYTES = [
    b"",
    b"\n" * 1000,
    b"\0" * 1000,
    b"\xff\xfe" + f"text,label\n{MARKER},a\n{MARKER},b\n".encode("utf-16-le"),
    b"\xfe\xff" + MARKER.encode(),
    f"{MARKER},a\n{MARKER} two,b\n".encode(),  # no header
    f"{MARKER},{MARKER}\nx,b\n".encode(),
    f"text;label\n{MARKER};a\n".encode(),
    f"text,label\n{MARKER},\xe9\n".encode("latin-1"),
    f'text,label\n"{MARKER},a\n'.encode(),
    f'text,label\n"{MARKER}"x,a\n'.encode(),
    f"text,label\r{MARKER},a\r{MARKER} two,b\r".encode(),
    f"text,label\n{MARKER}\n".encode(),
    f"text,label\n{MARKER},a,{MARKER}\n".encode(),
    b",".join([MARKER.encode()] * 20_000) + b"\n1\n",
    b"text,label\n" + b'"' * 99_999,
    b"PAR1" + b"\0" * 500 + b"PAR1",
    b"PAR1" + b"\xff" * 8 + b"PAR1",
    b"PK\x03\x04" + MARKER.encode(),
    f"Label,Text\n{MARKER},a\n".encode(),
    f"text,text,label\n{MARKER},x,a\n".encode(),
]


def csv_field(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def text_files() -> Iterator[tuple[str, bytes]]:
    for suffix in (".csv", ".tsv"):
        comma = "," if suffix == ".csv" else "\t"
        for text, label in [(text, "a") for text in TEXTS] + [(MARKER, label) for label in LABELS]:
            lines = [f"text{comma}label", f"{MARKER} one{comma}a", f"{MARKER} two{comma}b"]
            yield suffix, "\n".join([*lines, csv_field(text) + comma + csv_field(label), ""]).encode()
    for suffix in (".csv", ".tsv", ".jsonl"):
        yield from ((suffix, content) for content in BYTES)


def json_files() -> Iterator[tuple[str, bytes]]:
    good = [json.dumps({"text": f"{MARKER} {i}", "label": "ab"[i % 2]}) for i in range(2)]
    values = [{"text": value, "label": "a"} for value in (*TYPED, *TEXTS)]
    values += [{"text": MARKER, "label": value} for value in (*TYPED, *LABELS)]
    for line in [*map(json.dumps, values), *LINES]:
        yield ".jsonl", "\n".join([*good, line, ""]).encode("utf-8", "surrogatepass")


def parquet_files() -> Iterator[tuple[str, bytes]]:
    texts = [f"{MARKER} {i}" for i in range(4)]
    columns: list[Any] = [
        [MARKER, "a", None, "b"], [0.1, 0.2, 0.3, 0.4], [b"a", MARKER.encode(), b"b", b"c"], [[MARKER]] * 4,
        [{"a": MARKER}] * 4, [1, 2**62, -1, 0], [True, False, None, True], [None] * 4,
        pa.array([1, 2] * 2, pa.date32()),
        pa.array([1, 2, 3, 4], pa.timestamp("ns")), pa.array([1, -(2**62), 3, 4], pa.timestamp("us")),
        pa.array([1, 2, 3, 2**62], pa.duration("us")), pa.array(["1.5", "2", "3", "4"]).cast(pa.decimal128(38, 10)),
        pa.array([MARKER, "b", "a", "b"]).dictionary_encode(),
    ]  # fmt: skip
    notes = ["[" * 100_000, "1" * 5000, "{}", json.dumps({"info": {"features": {"label": {"names": MARKER}}}}),
             json.dumps({"info": {"features": {"label": {"names": ["a", "a", ""]}}}}),
             json.dumps({"info": {"features": {"label": {"names": [["a"], 3]}}}})]  # fmt: skip
    tables = [pa.table({"text": texts, "label": column}) for column in columns]
    tables += [pa.table({"text": column, "label": ["a", "b", "a", "b"]}) for column in columns]
    tables += [
        pa.table({"text": texts, "label": [0, 1, 0, 7]}).replace_schema_metadata({"huggingface": n}) for n in notes
    ]
    tables += [pa.table({MARKER: texts, MARKER + "2": texts})]
    for table in tables:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        yield ".parquet", content
        yield ".parquet", content[: len(content) // 2] + content[len(content) // 2 + 7 :]
    yield from ((".parquet", content) for content in BYTES)


def hostile() -> list[tuple[str, bytes]]:
    return [*text_files(), *json_files(), *parquet_files()]


def check_message(error: InputError, suffix: str, content: bytes) -> None:
    message = str(error)
    assert MARKER.casefold() not in message.casefold(), (suffix, content[:80])
    assert "\n" not in message and len(message) < 700


def check(files: list[tuple[str, bytes]], folder: Path) -> tuple[int, int]:
    """Load every file as `fedlr simulate` and a device do, and as a public table; count those that load and not."""
    num_loaded = num_refused = 0
    for suffix, content in files:
        assert len(content) <= SIZE
        path = folder / f"table{suffix}"
        path.write_bytes(content)
        for options in (
            {},
            {"labels": ["a", "b"]},
            {"on_bad_row": "drop"},
            {"label_groups": {"x": ["a"], "y": ["NA"]}},
        ):
            try:
                load_table(path, **options)
                num_loaded += 1
            except InputError as error:
                check_message(error, suffix, content)
                num_refused += 1
        for labels in (None, ["a", "b"]):
            public = PublicTable(
                path=str(path), text_column="text", label_column="label", labels=labels, num_examples=2
            )
            try:
                read_public(public, {}, num_classes=2, seed=0)
            except InputError as error:
                assert "\n" not in str(error)  # that table is public: its own values may be told
    return num_loaded, num_refused


@pytest.mark.timeout(120)
def test_two_hundred_hostile_tables_load_or_are_one_line_without_a_private_value(tmp_path: Path) -> None:
    files = hostile()
    assert len(files) >= 200
    num_loaded, num_refused = check(files, tmp_path)
    assert num_loaded > 100 and num_refused > 400


def test_a_message_that_shows_a_label_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shows(row: Any, columns: Any, class_names: Any, allowed: Any) -> tuple[None, str]:
        return None, f": the label {row.values} is not one of them"

    monkeypatch.setattr(table_module, "_clean", shows)
    with pytest.raises(AssertionError):
        check(hostile()[:5], tmp_path)


def test_columns_of_a_table_without_a_header_that_are_shown_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_column_hint", lambda name, found, wanted: f"its columns are {found[:3]}")
    with pytest.raises(AssertionError):
        check([(".csv", BYTES[5])], tmp_path)


@pytest.mark.parametrize(
    "encoding", ["utf\0", "", "x" * 5000, "rot13", "idna", "punycode", "undefined", "zlib", "\ud800"]
)
def test_an_encoding_that_is_none_is_one_line(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,a\ny,b\n")
    with pytest.raises(InputError, match=r"^Expected data.encoding to be one such as utf-8") as caught:
        load_table(path, encoding=encoding)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        path = tmp_path / f"a{suffix}"
        with path.open("wb") as file:
            file.truncate(2**42)  # sparse: four terabytes that take no room
        with pytest.raises(InputError, match="are free: split the file"):
            load_table(path)


def test_a_small_parquet_file_of_more_rows_than_memory_is_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.repeat("same text", 300_000), "label": pa.repeat("a", 300_000)}), path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(rows_module, "free_memory", lambda: 20_000_000)
    with pytest.raises(InputError, match="are free: split the file"):
        load_table(path)
