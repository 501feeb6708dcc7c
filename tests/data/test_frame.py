"""A data frame is read under the rules of a table, and a function that returns one is the data of a configuration."""

import sys
import types

import numpy as np
import pandas
import pytest

from fedlr.config.schema import compose_experiment
from fedlr.data import LabelledText, from_frame
from fedlr.errors import InputError
from fedlr.simulations.federation import prepare

FRAME = pandas.DataFrame(
    {
        "premise": [f"river stone {i}" for i in range(60)],
        "hypothesis": [f"garden {i % 7}" for i in range(60)],
        "gold": pandas.Categorical(["no", "yes"] * 30),
        "ward": [i % 3 for i in range(60)],
        "score": np.arange(60) / 7,
    },
    index=range(100, 160),
)
COLUMNS = {"text_column": "premise", "text_pair_column": "hypothesis", "label_column": "gold"}


def test_a_frame_gives_its_rows_in_order() -> None:
    data = from_frame(FRAME, **COLUMNS, group_column="ward")
    assert data.texts == tuple(FRAME.premise) and data.pairs == tuple(FRAME.hypothesis)
    assert data.label_names == ("no", "yes") and data.labels.tolist() == [0, 1] * 30
    assert data.groups is not None and data.groups[:4] == ("0", "1", "2", "0")
    by_number = from_frame(FRAME.assign(gold=[0.0, 1.0] * 30), **COLUMNS)
    assert by_number.label_names == ("0", "1")


BAD = {
    "premis": (FRAME, {"text_column": "premis"}, "no column 'premis', did you mean 'premise'"),
    "score": (FRAME, {**COLUMNS, "label_column": "score"}, "row 2, column 'score': the label is no whole number"),
    "missing": (
        FRAME.assign(premise=FRAME.premise.where(FRAME.ward != 1)),
        COLUMNS,
        "row 2, column 'premise'.*missing",
    ),
    "no string": (FRAME, {**COLUMNS, "text_pair_column": "ward"}, "column 'ward': the text is a int"),
    "the same": (
        FRAME,
        {**COLUMNS, "text_pair_column": "premise"},
        "text_pair_column.*'premise', which is text_column",
    ),
    "labels": (FRAME, {**COLUMNS, "labels": ["a", "b"]}, "row 1, column 'gold': the label is not one of 'a', 'b'"),
    "twice": (pandas.concat([FRAME, FRAME[["gold"]]], axis=1), COLUMNS, "more than one column named 'gold'"),
    "empty": (FRAME[:0], COLUMNS, "no rows"),
    "a list": ([("a", "b")], {}, "a pandas data frame, got a list"),
    "drop": (FRAME, {**COLUMNS, "on_bad_row": "skip"}, "'refuse' or 'drop', got 'skip'"),
}


@pytest.mark.parametrize(("frame", "given", "said"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_frame_is_named(frame: object, given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        from_frame(frame, **given)
    assert "river" not in str(error.value)


def test_bad_rows_of_a_frame_can_be_dropped() -> None:
    frame = FRAME.assign(premise=FRAME.premise.astype("string").where(FRAME.ward != 1))
    assert from_frame(frame, **COLUMNS, on_bad_row="drop").num_dropped == 20


def test_a_function_that_returns_a_frame_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> LabelledText:
        return from_frame(FRAME, **COLUMNS, labels=["no", "yes"], name="letters")

    module = types.ModuleType("letters_of_mine")
    module.rows = rows
    rows.__module__ = "letters_of_mine"
    monkeypatch.setitem(sys.modules, "letters_of_mine", module)
    words = ("data._target_=letters_of_mine.rows", "~data.num_examples", "data.num_test=0.2")
    e = compose_experiment(["experiment=tiny", *words, "num_clients=2", "cohort_size=1", "partition=iid"])
    f = prepare(e, seed=0)
    assert f.has_pairs and f.source == "letters" and f.label_names == ("no", "yes")
