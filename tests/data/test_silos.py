"""Tables as their owners keep them: a file for each client, a column of clients, a test table or split of their own.

Mutants killed: clients that are there only if their file has a usable row, training rows that stay although the test
table holds their text, test rows that leave because somebody trains on their text, a size limit that counts as no say
of the rows.
"""

from pathlib import Path

import datasets
import numpy as np
import pytest

import fedlr.data.placement as places
import fedlr.runs.tables
from fedlr.config.build import build
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.data.partition import Partition, by_file, by_group
from fedlr.data.placement import content, whole_rows
from fedlr.data.table import LabelledText, load_table
from fedlr.errors import InputError
from fedlr.runs.prepare import placement
from fedlr.runs.tables import load_examples, load_held_out, num_rows_of
from fedlr.simulations.federation import prepare
from fedlr.simulations.plan import make_plan

LABELS = ("no", "yes")
TABLE = ("experiment=tiny", "data=table", "data.labels=[no,yes]", "data.max_length=24", "trainer.sample_rate=0.5")
WARDS = ("partition=by_file", "num_clients=null", "cohort_size=1")


def write(
    path: Path, rows: int, *, start: int = 0, header: str = "text,label", labels: tuple[str, ...] = LABELS
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"river stone {i},{labels[i % 2]}" for i in range(start, start + rows)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    for number, name in enumerate(("north", "south", "east")):
        write(tmp_path / "wards" / f"{name}.csv", 10 + number, start=100 * number)
    return tmp_path / "wards"


def experiment(*words: str) -> Experiment:
    return compose_experiment([*TABLE, *words])


def test_every_file_of_a_folder_or_a_pattern_is_a_client(wards: Path) -> None:
    for path in (wards, wards / "*.csv", wards / "*", wards.parent / "war?s" / "*.csv"):
        data = load_table(path, labels=LABELS)
        of_pattern = "war?s" in str(path)
        names = [f"wards/{name}" if of_pattern else name for name in ("east", "north", "south")]
        assert data.clients == tuple(names) and data.source == str(path)
        partition = by_file(data, num_clients=0, seed=0)
        assert partition.names == tuple(names) and list(map(len, partition.indices)) == [12, 10, 11]
        assert partition.depends_on == ""
        for name, rows in zip(names, partition.indices, strict=True):
            own = load_table(wards / f"{Path(name).name}.csv", labels=LABELS)
            assert data.subset(rows).texts == own.texts
    deep = [write(wards / name / "train.csv", 4).parent.name for name in ("a", "b")]
    assert load_table(wards / "*" / "train.csv", labels=LABELS).clients == tuple(deep)


def test_a_client_is_there_whatever_its_rows(wards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wards / "west.csv").write_text("text,label\n,yes\n")
    data = load_table(wards, labels=LABELS, on_bad_row="drop")
    assert list(map(len, by_file(data, num_clients=4, seed=0).indices)) == [12, 10, 11, 0]
    # The mutant: clients that are found in rows.
    found = by_group(data, num_clients=0, seed=0)
    assert found.num_clients == 3 and "partition.groups" in found.depends_on


def test_a_minimum_is_a_say_of_the_rows_and_is_said(wards: Path) -> None:
    data = load_table(wards, labels=LABELS)
    kept = by_file(data, num_clients=0, seed=0, min_rows=11, small_clients="leave_out")
    assert kept.names == ("east", "south") and kept.num_left_out == 1
    assert [len(rows) for rows in kept.indices] == [12, 11] and "partition.min_rows=0" in kept.depends_on
    assert by_file(data, num_clients=3, seed=0, min_rows=10).depends_on
    e = experiment(f"data.path={wards}", *WARDS, "partition.min_rows=1", "data.num_test=0.1", "data.public=true")
    assert any("partition.min_rows" in reason for reason in prepare(e, seed=0).placed_by)


def test_a_small_client_is_named_where_its_name_is_public() -> None:
    data = LabelledText(("a", "b", "c"), np.array([0, 1, 0]), LABELS, ("x", "hush", "x"), "here")
    with pytest.raises(InputError, match="fewer of 'hush'"):
        by_group(data, num_clients=2, seed=0, groups=["x", "hush"], min_rows=2)
    with pytest.raises(InputError, match="fewer of 1 of them") as error:
        by_group(data, num_clients=2, seed=0, min_rows=2)
    assert "hush" not in str(error.value)


def test_as_many_clients_as_there_are(wards: Path, tmp_path: Path) -> None:
    f = prepare(experiment(f"data.path={wards}", *WARDS), seed=0)
    assert f.experiment.num_clients == len(f.clients) == 3 and f.placed_by == ()
    assert "1 of 3 clients" in make_plan(experiment(f"data.path={wards}", *WARDS))
    one = tmp_path / "one.csv"
    one.write_text("text,label,site\n" + "".join(f"stone {i},{LABELS[i % 2]},s{i % 5}\n" for i in range(60)))
    words = (f"data.path={one}", "data.group_column=site", "partition=by_group", *WARDS[1:])
    assert prepare(experiment(*words), seed=0).experiment.num_clients == 5


def own_test(tmp_path: Path) -> tuple[Path, Path]:
    train = write(tmp_path / "train.csv", 40)
    test = write(tmp_path / "test.csv", 12, start=34)  # six rows of both
    test.write_text(test.read_text().replace("river stone 39", "  RIVER  stone 39"))
    return train, test


def check_own_test(train: Path, test: Path) -> None:
    words = (f"data.path={train}", f"data.test_path={test}", "data.num_test=null", "partition=iid", "num_clients=3")
    e = experiment(*words, "cohort_size=1")
    data, held_out = load_examples(e, seed=0)
    assert held_out.texts == load_table(test, labels=LABELS).texts
    assert not set(map(content, whole_rows(data))) & set(map(content, whole_rows(held_out)))
    assert len(data) == 34 and data.num_held_out == 6
    partition: Partition = build(e.partition.section(), "partition", data=data, num_clients=3, seed=0)
    assert placement(e, partition, num_shared=0) == ()


def test_a_test_table_is_held_out_whole_and_nothing_of_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = own_test(tmp_path)
    check_own_test(train, test)
    e = experiment(
        f"data.path={train}", f"data.test_path={test}", "data.num_test=null", "num_clients=2", "cohort_size=1"
    )
    notes = prepare(e, seed=0).notes
    assert any("6 rows of" in note and "are in the test table" in note for note in notes)

    def stays(data, held_out):
        return data

    def leaves_from_the_test_table(data, held_out):
        found = places.without_texts_of(held_out, data)
        object.__setattr__(held_out, "texts", found.texts)
        return data

    for mutant in (stays, leaves_from_the_test_table):
        with monkeypatch.context() as patch:
            patch.setattr(fedlr.runs.tables, "without_texts_of", mutant)
            with pytest.raises(AssertionError):
                check_own_test(train, test)


def test_labels_of_the_test_table_are_those_of_the_training_table(tmp_path: Path) -> None:
    train, test = own_test(tmp_path)
    test.write_text("text,label\nmusic,yes\nletter,yes\n")
    words = (
        "data.labels=null",
        "data.public=true",
        f"data.path={train}",
        f"data.test_path={test}",
        "data.num_test=null",
    )
    _, held_out = load_examples(experiment(*words), seed=0)
    assert held_out.label_names == LABELS and held_out.labels.tolist() == [1, 1]


def test_a_server_reads_the_test_table_alone(tmp_path: Path) -> None:
    _, test = own_test(tmp_path)
    e = experiment(f"data.path={tmp_path / 'nowhere.csv'}", f"data.test_path={test}", "data.num_test=null")
    with pytest.raises(Exception, match="nowhere"):
        load_examples(e, seed=0)
    (tmp_path / "nowhere.csv").write_text("no table")
    held_out, num_rows = load_held_out(e, seed=0)
    assert held_out.texts == load_table(test, labels=LABELS).texts and num_rows is None


def test_rows_of_a_test_table_are_not_counted_with_those_of_the_clients(tmp_path: Path) -> None:
    train, test = own_test(tmp_path)
    apart = experiment(f"data.path={train}", f"data.test_path={test}", "data.num_test=null")
    assert num_rows_of(apart, range(30), range(8)) == 30
    assert num_rows_of(experiment(f"data.path={train}", "data.num_test=0.2"), range(30), range(8)) == 38


def saved(folder: Path) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    splits = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} river {i}" for i in range(size)], "label": [i % 2 for i in range(size)]},
            features=features,
        )
        for name, size in (("train", 30), ("validation", 8))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_a_dataset_is_read_by_its_splits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    words = (f"data.path={folder}", "data.num_test=null", "data.test_split=validation")
    data, held_out = load_examples(experiment(*words), seed=0)
    assert (len(data), len(held_out)) == (30, 8) and held_out.texts[0] == "validation river 0"
    data, held_out = load_examples(
        experiment(f"data.path={folder}", "data.num_test=null", "data.train_split=validation", "data.test_split=train"),
        seed=0,
    )
    assert (len(data), len(held_out)) == (8, 30)
    datasets.load_from_disk(str(folder))["train"].save_to_disk(str(tmp_path / "one"))
    assert len(load_table(tmp_path / "one", labels=LABELS)) == 30


def test_a_partition_of_natural_clients_has_their_rows_in_order() -> None:
    data = LabelledText(("a", "b", "c"), np.array([0, 1, 0]), LABELS, ("x", "y", "x"), "here")
    assert [rows.tolist() for rows in by_group(data, num_clients=0, seed=0).indices] == [[0, 2], [1]]
