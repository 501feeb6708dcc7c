"""Every way that conversations are written becomes the same turns; every bad row is named, and no value of one is.

Mutants this file kills: a role of ShareGPT taken for its opposite, a system turn put before one that is there, a last
turn of the user kept.
"""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedlr.data import conversations as shipped
from fedlr.data.conversations import ASSISTANT, SYSTEM, TEXT, USER, Conversations, Turn, load_conversations
from fedlr.data.placement import split_train_test, whole_rows
from fedlr.errors import InputError
from tests.training.small_models import mutant

SECRET = "the-secret-of-a-row"
ASKED = (Turn(USER, "why?"), Turn(ASSISTANT, "because"))
MESSAGES = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
SHAREGPT = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("prompt_response", {"prompt": "why?", "response": "because"}),
        ("messages", {"messages": MESSAGES}),
        ("messages", {"messages": json.dumps(MESSAGES)}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}, MESSAGES[1]]}),
        ("messages", {"messages": {"role": ["user", "assistant"], "content": ["why?", "because"]}}),
        ("sharegpt", {"conversations": SHAREGPT}),
        ("alpaca", {"instruction": "why?", "input": "", "output": "because"}),
        ("alpaca", {"instruction": "why?", "input": None, "output": "because"}),
        ("dolly", {"instruction": "why?", "context": "", "response": "because", "category": "open_qa"}),
    ],
)
def test_each_format_gives_the_same_turns(tmp_path: Path, format, row) -> None:
    data = load_conversations(jsonl(tmp_path / "chats.jsonl", row, row), format=format)
    assert data.turns == (ASKED, ASKED)
    assert data.labels.tolist() == [0, 0] and data.label_names == () and data.numbers.tolist() == [1, 2]


def test_an_alpaca_input_stands_below_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "translate", "input": "chat", "output": "cat"}
    data = load_conversations(jsonl(tmp_path / "a.jsonl", row, row), format="alpaca")
    assert data.turns[0] == (Turn(USER, "translate\n\nchat"), Turn(ASSISTANT, "cat"))


def test_plain_texts_are_rows_without_sides(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,who\nfirst,a\nsecond,b\n", encoding="utf-8")
    data = load_conversations(tmp_path / "texts.csv", format="text", group_column="who")
    assert data.turns == ((Turn(TEXT, "first"),), (Turn(TEXT, "second"),)) and data.is_plain
    assert data.groups == ("a", "b") and data.numbers.tolist() == [2, 3]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_messages_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"chats.{kind}"
    if kind == "csv":
        text = json.dumps(MESSAGES).replace('"', '""')
        path.write_text(f'messages\n"{text}"\n"{text}"\n', encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"messages": [MESSAGES, MESSAGES]}), path)
    assert load_conversations(path, format="messages").turns == (ASKED, ASKED)


def test_a_system_text_is_said_where_a_row_has_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, *MESSAGES]
    path = jsonl(tmp_path / "c.jsonl", {"messages": MESSAGES}, {"messages": own})
    data = load_conversations(path, format="messages", system="be kind")
    assert [row[0] for row in data.turns] == [Turn(SYSTEM, "be kind"), Turn(SYSTEM, "mine")]
    twice = mutant(shipped, ("if system is not None and turns[0].role != SYSTEM:", "if system is not None:"))
    assert len(twice.load_conversations(path, format="messages", system="be kind").turns[1]) == 4


def test_a_folder_has_a_file_for_each_client(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r"}
    jsonl(tmp_path / "north.jsonl", row, row)
    jsonl(tmp_path / "south.jsonl", row)
    data = load_conversations(tmp_path, format="prompt_response")
    assert data.clients == ("north", "south") and data.groups == ("north", "north", "south")


BAD = {
    "no list": ({"messages": SECRET}, "column 'messages': expected a list of messages, got text that is not JSON"),
    "empty list": ({"messages": []}, "got an empty one"),
    "nothing": ({"messages": None}, "got nothing"),
    "no object": ({"messages": [SECRET]}, "turn 1: expected an object"),
    "unknown role": ({"messages": [{"role": SECRET, "content": "x"}]}, "turn 1: its 'role' is none of"),
    "empty text": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]},
        "turn 2: 'content': the text is",
    ),
    "number": ({"messages": [{"role": "user", "content": 7}]}, "the text is a int"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text"),
    "tool": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "it calls tools"),
    "ends with user": ({"messages": [MESSAGES[1], MESSAGES[0]]}, "the last turn is not the assistant's"),
    "no question": ({"messages": [MESSAGES[1]]}, "expected the turns of a user and an assistant"),
    "late system": ({"messages": [MESSAGES[0], {"role": "system", "content": "x"}, MESSAGES[1]]}, "only before them"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_and_its_values_are_not(tmp_path: Path, name: str) -> None:
    row, told = BAD[name]
    path = jsonl(tmp_path / "c.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES}, row)
    with pytest.raises(InputError) as error:
        load_conversations(path, format="messages")
    assert "row 3" in str(error.value) and told in str(error.value) and SECRET not in str(error.value)
    data = load_conversations(path, format="messages", on_bad_row="drop")
    assert len(data) == 2 and data.num_dropped == 1


def test_mutants_of_the_reader_are_caught(tmp_path: Path) -> None:
    def turns(module: ModuleType, *rows: object) -> object:
        path = jsonl(tmp_path / "m.jsonl", *rows)
        return module.load_conversations(path, format="sharegpt", on_bad_row="drop").turns

    row = {"conversations": SHAREGPT}
    swapped = mutant(shipped, ('"gpt": ASSISTANT', '"gpt": USER'), ("if turns[-1].role != ASSISTANT:", "if False:"))
    assert turns(shipped, row, row) == (ASKED, ASKED) != turns(swapped, row, row)
    unended = {"conversations": [*SHAREGPT, SHAREGPT[0]]}
    kept = mutant(shipped, ("if turns[-1].role != ASSISTANT:", "if False:"))
    assert len(turns(shipped, row, row, unended)) == 2 and len(turns(kept, row, row, unended)) == 3


def test_a_missing_column_names_those_that_there_are_and_the_key(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", {"prompt": "p", "response": "r"})
    with pytest.raises(InputError, match=r"no column 'messages'.*data\.format"):
        load_conversations(path, format="messages")
    with pytest.raises(InputError, match="format to be one of text, prompt_response"):
        load_conversations(path, format="chat")  # type: ignore[arg-type]


def test_rows_are_placed_and_equal_by_all_their_turns(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 30}", "response": "r"} for i in range(60)]
    data = load_conversations(jsonl(tmp_path / "c.jsonl", *rows), format="prompt_response")
    assert len(set(whole_rows(data))) == 30
    training, held_out = split_train_test(data, num_test=0.3, seed=3)
    assert not set(whole_rows(training)) & set(whole_rows(held_out))
    assert len(training) + len(held_out) == 60 and isinstance(training, Conversations)
    assert np.array_equal(training.subset([1]).numbers, training.numbers[1:2])
