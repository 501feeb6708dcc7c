"""Published data sets by name: each preset reads a local copy with the columns, labels and splits of the Hub's.

Column names, class names and splits are those of `nyu-mll/glue` and `stanfordnlp/snli`; the rows are made up.
"""

from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

from fedlr.config.schema import compose_experiment
from fedlr.models.network import tiny_random
from fedlr.runs.tables import load_examples
from fedlr.tasks.reading import check_reading, read_texts

NLI = ("entailment", "neutral", "contradiction")
QUESTIONS = ("not_duplicate", "duplicate")
FOLLOWS = ("entailment", "not_entailment")


class Copy(NamedTuple):
    """The columns of texts as the Hub has them, the names of its classes by index, and the split that is scored."""

    texts: tuple[str, ...]
    classes: tuple[str, ...]
    scored: str = "validation"


HUB = {
    "sst2": Copy(("sentence",), ("negative", "positive")),
    "cola": Copy(("sentence",), ("unacceptable", "acceptable")),
    "mnli": Copy(("premise", "hypothesis"), NLI, "validation_matched"),
    "snli": Copy(("premise", "hypothesis"), NLI),
    "qqp": Copy(("question1", "question2"), QUESTIONS),
    "qnli": Copy(("question", "sentence"), FOLLOWS),
    "mrpc": Copy(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "rte": Copy(("sentence1", "sentence2"), FOLLOWS),
    "wnli": Copy(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def copy_of(name: str, folder: Path, *, without_label: int = 0) -> Path:
    hub = HUB[name]
    features = {column: datasets.Value("string") for column in hub.texts}
    features |= {"label": datasets.ClassLabel(names=list(hub.classes)), "idx": datasets.Value("int32")}
    splits = {}
    for split, size in (("train", 40), (hub.scored, 9), ("test", 4)):
        rows = {column: [f"{split} {column} river {i}" for i in range(size)] for column in hub.texts}
        labels = [i % len(hub.classes) for i in range(size)] if split != "test" else [-1] * size
        labels[:without_label] = [-1] * without_label
        rows |= {"label": labels, "idx": list(range(size))}
        splits[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", HUB)
def test_a_preset_reads_the_columns_labels_and_splits_of_the_hub(name: str, tmp_path: Path) -> None:
    hub = HUB[name]
    without_label = 2 if name == "snli" else 0
    e = compose_experiment([f"data={name}", f"data.path={copy_of(name, tmp_path / name, without_label=without_label)}"])
    data, held_out = load_examples(e, seed=0)
    assert (len(data), len(held_out)) == (40 - without_label, 9 - without_label)
    assert data.num_dropped == without_label and data.label_names == hub.classes
    assert data.labels.tolist() == [i % len(hub.classes) for i in range(without_label, 40)]
    assert held_out.texts[0] == f"{hub.scored} {hub.texts[0]} river {without_label}"
    assert (data.pairs is None) == (len(hub.texts) == 1)
    if data.pairs is not None:
        assert data.pairs[0] == f"train {hub.texts[1]} river {without_label}"
    base = tiny_random(label_names=data.label_names, seed=0)
    check_reading(base, max_length=32, has_pairs=data.pairs is not None)
    assert len(read_texts(data, base, max_length=32)) == len(data)
    assert e.data.public and compose_experiment([f"data={name}"]).data.section()["path"].split(":")[0] in (
        "nyu-mll/glue",
        "stanfordnlp/snli",
    )
