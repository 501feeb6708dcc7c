"""What a table is read as: names, order, encodings, and the split."""

import codecs
import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlr.data.table import load_table
from fedlr.errors import InputError

ROWS = [
    ("so good", "positive", "shop"),
    ('a "bad", long\nday', "negative", "home"),
    ("NA", "positive", "home"),
]


def write(path: Path) -> Path:
    """Write ROWS in the format of the suffix."""
    names = ("text", "label", "site")
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *ROWS])
    elif path.suffix == ".parquet":
        columns = zip(*ROWS, strict=True)
        pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), path)
    else:
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in ROWS))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_texts(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix.lower()}").rename(tmp_path / f"b{suffix}")
    data = load_table(path, group_column="site")
    assert data.texts == tuple(row[0] for row in ROWS)
    assert [data.label_names[i] for i in data.labels] == [row[1] for row in ROWS]
    assert data.label_names == ("negative", "positive")
    assert data.labels.dtype == np.int64
    assert data.groups == ("shop", "home", "home")
    assert data.source == str(path) and data.num_dropped == 0


def test_words_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,null\nnull,None\nNone,NA\n")
    data = load_table(path, labels=["NA", "None", "null"])
    assert data.texts == ("NA", "null", "None")
    assert data.label_names == ("NA", "None", "null")
    for word in ("NA", "null", "None", "none", "n/a", "<NA>", "NaN"):
        path.write_text(f"text,label\nx,a\ny,{word}\nz,b\n")
        with pytest.raises(InputError, match="row 3, column 'label': the label is missing"):
            load_table(path)


def test_two_ways_to_write_an_accent_are_one_label(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,caf\u00e9\ny,cafe\u0301\nz,tea\n", encoding="utf-8")
    assert load_table(path).label_names == ("caf\u00e9", "tea")
    data = load_table(path, labels=["tea", "cafe\u0301"])
    assert data.label_names == ("tea", "caf\u00e9") and data.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("spelling", ["1.0", "01", "1e0", "+1", "1."])
def test_two_spellings_of_a_number_are_refused_unless_named(spelling: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\nx,1\ny,{spelling}\nz,0\n")
    with pytest.raises(InputError, match="column 'label' spells the number of one label in 2 ways"):
        load_table(path)
    assert len(load_table(path, labels=["0", "1", spelling]).label_names) == 3


def test_many_numbers_with_decimals_are_scores(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 112 / 4}\n" for i in range(1000)))
    with pytest.raises(InputError, match="112 different numbers with decimals.*regression"):
        load_table(path)
    path.write_text("text,label\n" + "".join(f"text {i},{i % 9 / 2}\n" for i in range(100)))
    assert len(load_table(path).label_names) == 9  # half stars are classes
    path.write_text("text,label\n" + "".join(f"text {i},{i % 150}\n" for i in range(1000)))
    assert len(load_table(path).label_names) == 150  # numbered intents are too


def test_marks_line_ends_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    plain = "text,label\ncafé,a\nx,b\n"
    for content, encoding in [
        (plain.encode(), "utf-8"),
        (codecs.BOM_UTF8 + plain.encode(), "utf-8"),
        (plain.replace("\n", "\r\n").encode(), "utf-8"),
        (plain.replace("\n", "\r").encode(), "utf-8"),
        (plain.replace("\n", "\n\n").encode(), "utf-8"),
        (plain.rstrip().encode(), "utf-8"),
        (plain.encode("utf-16"), "utf-16"),
        (plain.encode("utf-16-le"), "utf-16-le"),
        (plain.encode("cp1252"), "cp1252"),
    ]:
        path.write_bytes(content)
        data = load_table(path, encoding=encoding)
        assert data.texts == ("café", "x") and data.label_names == ("a", "b"), (content, encoding)


def test_json_lines_may_hold_line_separators_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two", "label": true}\r\n{"text": "x", "label": false}\r\n', newline="")
    data = load_table(path)
    assert data.texts[0] == "one\u2028two"
    assert data.label_names == ("false", "true")


def test_integer_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 11}\n" for i in range(33)))
    data = load_table(path)
    assert data.label_names == tuple(str(i) for i in range(11))
    assert data.labels.tolist() == [i % 11 for i in range(33)]


def test_whole_numbers_are_one_label_whatever_their_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "label": [1.0, 0.0]}), path)
    assert load_table(path).label_names == ("0", "1")


def test_given_labels_fix_the_order_and_may_be_absent_from_one_clients_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,b\ny,b\n")
    data = load_table(path, labels=["c", "b", "a"])
    assert data.label_names == ("c", "b", "a")
    assert data.labels.tolist() == [1, 1]


def test_label_groups_rename_labels_in_their_own_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    data = load_table(path, label_column="site", label_groups={"out": ["shop"], "in": ["home", "garden"]})
    assert data.label_names == ("out", "in")
    assert data.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("groups", "labels", "message"),
    [
        ({"all": ["shop", "home"]}, None, "two or more groups"),
        ({"a": ["shop"], "b": []}, None, "two or more groups"),
        ({"a": ["shop"], "b": ["shop", "home"]}, None, "different labels"),
        ({"a": ["shop"], "b": ["home"]}, ["shop", "home"], "data.labels=null"),
        ({"a": ["shop"], "b": ["garden"]}, None, "row 3, column 'site': the label is not one of 'shop', 'garden'"),
    ],
)
def test_label_groups_that_cannot_be_used_are_refused(
    groups: dict[str, list[str]], labels: list[str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load_table(write(tmp_path / "a.csv"), label_column="site", label_groups=groups, labels=labels)


def test_class_names_in_a_parquet_file_of_datasets_are_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features).to_parquet(path)
    data = load_table(path)
    assert data.label_names == ("neg", "pos") and data.labels.tolist() == [1, 0]
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features).to_parquet(path)
    with pytest.raises(InputError, match="row 2, column 'label': the label is missing"):
        load_table(path)


def test_a_dataset_by_name_is_read_with_its_class_names(tmp_path: Path) -> None:
    # A dataset script in the cache is not to be had offline, so a local folder stands in for `owner/name`.
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("text,label\nx,a\ny,b\nz,a\n")
    from fedlr.data.hub import read_hub

    table = read_hub(str(folder), ["text", "label"], split="train")
    assert [row.values for row in table.rows] == [("x", "a"), ("y", "b"), ("z", "a")]
    with pytest.raises(InputError, match="split 'nonsense'"):
        read_hub(str(folder), ["text", "label"], split="nonsense")
    with pytest.raises(InputError, match="no column 'sentence'"):
        read_hub(str(folder), ["sentence", "label"], split="train")


def test_a_text_of_any_length_is_accepted_and_the_csv_limit_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    before = csv.field_size_limit()
    path.write_text(f"text,label\n{'word ' * 100_000},a\nshort,b\n")
    assert len(load_table(path).texts[0]) == 500_000
    assert csv.field_size_limit() == before
