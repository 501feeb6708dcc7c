"""Files of multiple choice: every format gives the same questions, and a bad row is named by its number alone."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedlr.data.choices import Question, load_questions
from fedlr.errors import InputError

ROWS = [
    {"question": "which is red", "choices": ["snow", "blood"], "answer": "B"},
    {"question": "which is big", "choices": ["ant", "sea", "pin"], "answer": 1},
]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_csv_and_parquet_give_the_same_questions(tmp_path: Path) -> None:
    found = load_questions(lines(tmp_path / "a.jsonl", ROWS), format="mmlu")
    assert found[0] == Question("which is red\nA. snow\nB. blood\nAnswer:", ("A", "B"), 1)
    assert [one.right for one in found] == [1, 1] and found[1].choices == ("A", "B", "C")
    header = "question,choices,answer\n"
    rows = ['which is red,"[""snow"", ""blood""]",B\n', 'which is big,"[""ant"", ""sea"", ""pin""]",1\n']
    (tmp_path / "a.csv").write_text(header + "".join(rows), encoding="utf-8")
    assert load_questions(tmp_path / "a.csv", format="mmlu") == found
    table = pyarrow.table({key: [str(r[key]) if key == "answer" else r[key] for r in ROWS] for key in ROWS[0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_questions(tmp_path / "a.parquet", format="mmlu") == found


def test_hellaswag_chooses_among_endings(tmp_path: Path) -> None:
    row = {"ctx": "He runs.", "endings": ["He stops.", "He flies."], "label": "0", "activity_label": "Running"}
    (found,) = load_questions(lines(tmp_path / "h.jsonl", [row]), format="hellaswag")
    assert found == Question("He runs.", ("He stops.", "He flies."), 0)


SECRET = "a private value"
BAD = {
    "one choice": ({"choices": [SECRET]}, "expected 'choices' to be a list of 2 to 26 texts"),
    "no list": ({"choices": SECRET}, "expected 'choices' to be a list"),
    "a number among them": ({"choices": [SECRET, 3]}, "expected 'choices' to be a list"),
    "no such place": ({"answer": 2}, "expected 'answer' to be a place from 0 to 1"),
    "no such letter": ({"answer": "C"}, "expected 'answer' to be a place from 0 to 1, or a letter"),
    "true": ({"answer": True}, "expected 'answer' to be a place"),
    "a text": ({"answer": SECRET}, "expected 'answer' to be a place"),
    "nothing asked": ({"question": None}, "row 2: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_its_number_and_never_by_value(case: str, tmp_path: Path) -> None:
    changes, told = BAD[case]
    with pytest.raises(InputError) as error:
        load_questions(lines(tmp_path / "b.jsonl", [ROWS[0], {**ROWS[0], **changes}]), format="mmlu")
    assert told in str(error.value) and "row 2" in str(error.value) and SECRET not in str(error.value)


def test_a_missing_column_and_an_empty_file_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hellaswag has ctx, endings, label"):
        load_questions(lines(tmp_path / "c.jsonl", ROWS), format="hellaswag")
    with pytest.raises(InputError):
        load_questions(lines(tmp_path / "d.jsonl", []), format="mmlu")
