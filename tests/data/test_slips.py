"""What a tired user does with tables of his own: each slip is one line that names the key and what to do instead.

No line holds a text or a label of a row.
"""

from pathlib import Path

import pytest

from fedlr.config.build import build
from fedlr.config.schema import compose_experiment
from fedlr.data.partition import Partition
from fedlr.errors import InputError
from fedlr.runs.prepare import with_clients_of
from fedlr.runs.tables import load_examples

TABLE = ("experiment=tiny", "data=table", "data.labels=[no,yes]", "num_clients=2", "cohort_size=1")
TEST = "data.num_test=null data.path=train.csv"
FILES = "data.path=wards partition=by_file num_clients=null"
SECRET = "secretword"


def write(path: str, header: str = "text,label", labels: tuple[str, ...] = ("no", "yes"), more: str = "") -> None:
    rows = [f"{SECRET} {path} {i},{labels[i % 2]}{more}" for i in range(12)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("train.csv")
    write("dev.csv")
    write("other_labels.csv", labels=("negative", "positive"))
    write("pairs.csv", "text,label,second", more=",second text")
    write("sites.csv", "text,label,site", more=",north")
    for name in ("north", "south"):
        write(f"wards/{name}.csv")
    for folder, name, labels in (("mixed", "b", ("down", "up")), ("mixed", "a", ("no", "yes"))):
        write(f"{folder}/{name}.csv", labels=labels)
    write("twice/north.csv")
    write("twice/north.tsv", "text\tlabel")
    write("broken/north.csv")
    write("broken/south.csv", more=",one too many")
    Path("no_tables").mkdir()
    Path("no_tables/notes.txt").write_text("none")
    write("numbers.csv")
    Path("numbers.csv").write_text("text,label,second\n" + "".join(f"{SECRET} {i},no,{i}\n" for i in range(9)))
    return tmp_path


SLIPS = {
    # columns
    "data.path=train.csv data.text_column=sentence": ["no column 'sentence'", "'text', 'label'", "data.text_column"],
    "data.path=train.csv data.text_column=Text": ["no column 'Text'", "did you mean 'text'?"],
    "data.path=train.csv data.text_pair_column=second": ["no column 'second'", "data.text_pair_column"],
    "data.path=pairs.csv data.text_pair_column=text": ["data.text_pair_column", "'text'", "data.text_column", "null"],
    "data.path=pairs.csv data.text_pair_column=label": ["data.text_pair_column", "'label'", "data.label_column"],
    "data.path=numbers.csv data.text_pair_column=second": ["only numbers", "'second'", "data.text_pair_column"],
    # a test table
    "data.path=train.csv data.test_path=dev.csv": ["data.num_test=null", "data.test_path", "0.2"],
    "data.path=train.csv data.num_test=null": ["data.num_test, data.test_path or data.test_split", "0.2"],
    f"{TEST} data.test_path=train.csv": ["data.test_path to be another table than data.path", "'train.csv'"],
    f"{TEST} data.test_path=./train.csv": ["data.test_path to be another table than data.path"],
    f"{TEST} data.test_path=copy.csv": ["not in the test table", "all 12 of them", "data.test_path"],
    f"{TEST} data.test_path=other_labels.csv": ["other_labels.csv, row 2", "not one of 'no', 'yes'", "data.labels"],
    f"{TEST} data.test_path=dve.csv": ["no file 'dve.csv'", "'dev.csv'"],
    f"{TEST} data.test_split=validation": ["data.test_path", "'train.csv'", "data.test_split='validation'"],
    f"{TEST} data.test_path=dev.csv data.test_split=test": ["data.test_path=null beside data.test_split"],
    "data.path=train.csv data.train_split=train": ["data.train_split=null", "'train.csv'", "data.test_path"],
    "data=sst2 data.test_split=train": ["data.test_split to be another split than data.train_split", "'train'"],
    "data=synthetic data.num_test=null data.test_path=dev.csv": ["data.num_test", "synthetic, which has no path"],
    # a file for each client
    "data.path=empty/*.csv partition=by_file": ["Nothing matches the pattern 'empty/*.csv'", "wards/*.csv"],
    "data.path=no_tables partition=by_file": ["'no_tables' is a folder without a .csv"],
    "data.path=no_tables/* partition=by_file": ["'no_tables/notes.txt' ends in '.txt'", "export it"],
    "data.path=twice partition=by_file": ["two files of a client 'north'", "'north.csv' and 'north.tsv'", "rename"],
    "data.path=broken partition=by_file": ["broken/south.csv, row 2", "3 fields where the header has 2"],
    "data.path=mixed data.labels=null data.public=true": [
        "mixed/b.csv has other labels than mixed/a.csv",
        "data.labels",
    ],
    f"{FILES} num_clients=5": ["2 files", "num_clients=5", "set num_clients=2"],
    f"{FILES} cohort_size=4": ["cohort_size <= num_clients=2, got 4"],
    f"{FILES} partition.min_rows=100": [
        "partition.min_rows=100",
        "'north', 'south'",
        "partition.small_clients=leave_out",
    ],
    f"{FILES} partition.min_rows=100 partition.small_clients=leave_out": [
        "0 files without the 2",
        "partition.min_rows",
    ],
    f"{FILES} partition.small_clients=drop": ["partition.small_clients", "'leave_out'", "'drop'"],
    "data.path=train.csv partition=by_file": ["a file for each client", "'wards/*.csv'", "train.csv"],
    "data.path=wards data.group_column=label partition=by_file": [
        "different columns for text, label and group",
        "'label'",
    ],
    "data.path=train.csv num_clients=null": ["num_clients >= 1", "got null", "partition=by_group or by_file"],
    "data.path=train.csv num_clients=0": ["num_clients", "null: as many as there are", "got 0"],
    "data.path=train.csv partition=by_group num_clients=null": ["data.group_column"],
    "data.path=sites.csv data.group_column=site partition=by_group num_clients=3": ["1 group", "set num_clients=1"],
    f"{FILES} runtime=superlink": ["num_clients to be a number with runtime=superlink"],
}


def told(words: str) -> str:
    with pytest.raises(InputError) as error:
        e = compose_experiment([*TABLE, *words.split()])
        data, _ = load_examples(e, seed=0)
        partition: Partition = build(e.partition.section(), "partition", data=data, num_clients=e.num_clients, seed=0)
        with_clients_of(e, partition)
    return str(error.value)


@pytest.mark.parametrize(("words", "fragments"), SLIPS.items(), ids=SLIPS)
def test_a_slip_is_one_line_with_the_way_out(words: str, fragments: list[str], here: Path) -> None:
    Path("copy.csv").write_text(Path("train.csv").read_text().replace(SECRET, SECRET.upper()))
    said = told(words)
    assert [fragment for fragment in fragments if fragment not in said] == [], said
    assert "\n" not in said and SECRET not in said.casefold()
