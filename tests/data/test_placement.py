"""Where a row lies: it alone decides, equal texts lie together, and a run of which that is not true says so.

Mutants killed: places by a permutation of all rows, by rank or by the number of a row, a hash of the text as it is
typed, proportions that are drawn around those of the data.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fedlr.data.partition as partitions
import fedlr.data.placement as places
from fedlr.config.build import build
from fedlr.config.schema import compose_experiment
from fedlr.data.partition import Partition, dirichlet, iid
from fedlr.data.placement import content, num_shared_texts, split_train_test
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.runs.prepare import placement
from fedlr.runs.tables import load_examples
from fedlr.tasks.synthetic import synthetic_text

GROUPS = (
    "partition=by_group",
    "partition.groups=[east,west]",
    "num_clients=2",
    "cohort_size=1",
    "data.group_column=site",
)
FOR_RELEASE = {
    "iid": ("partition=iid",),
    "dirichlet": ("partition=dirichlet", "partition.alpha=0.5"),
    "dirichlet_by_label": ("partition=dirichlet_by_label", "partition.min_examples=0"),
    "by_group": GROUPS,
}
NOT_FOR_RELEASE = {
    "partition.min_examples": ("partition=dirichlet_by_label",),
    "partition.groups": (*GROUPS[:1], *GROUPS[2:]),
    "data.num_test": ("partition=iid", "data.num_test=80"),
}
NUM_ROWS = 400


def placed(path: Path, overrides: tuple[str, ...]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return where each text of a table lies (-1: held out), and what its place depends on besides itself."""
    table = ("data=table", f"data.path={path}", "data.labels=[a,b,c]", "data.max_length=32")
    e = compose_experiment(["experiment=tiny", *table, "privacy.randomness=os", "seed=null", *overrides])
    data, held_out = load_examples(e, seed=5)
    partition: Partition = build(e.partition.section(), "partition", data=data, num_clients=e.num_clients, seed=5)
    where = dict.fromkeys(held_out.texts, -1)
    for client_id, rows in enumerate(partition.indices):
        where |= {data.texts[row]: client_id for row in rows.tolist()}
    return where, placement(e, partition, num_shared=num_shared_texts(data, partition.indices))


def num_moved(path: Path, overrides: tuple[str, ...]) -> int:
    """Remove each of several rows, and count the others that lie elsewhere then."""
    rows = [f"text {i},{'abc'[i % 7 % 3]},{('east', 'west')[i % 2]}" for i in range(NUM_ROWS)]
    moved, whole = 0, {}
    for removed in (None, 0, 1, 17, 200, 399):
        kept = [row for i, row in enumerate(rows) if i != removed]
        path.write_text("\n".join(["text,label,site", *kept]) + "\n")
        where, reasons = placed(path, overrides)
        assert not reasons
        whole = whole or where
        moved += sum(client != whole[text] for text, client in where.items())
        assert len(where) == len(kept)
    return moved


@pytest.mark.parametrize("name", FOR_RELEASE)
def test_removing_a_row_moves_no_other_row_where_a_run_may_be_released(name: str, tmp_path: Path) -> None:
    assert num_moved(tmp_path / "a.csv", FOR_RELEASE[name]) == 0


@pytest.mark.parametrize("key", NOT_FOR_RELEASE)
def test_what_lets_rows_decide_about_others_is_named_with_its_key(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"text {i},{'abc'[i % 3]},{('east', 'west')[i % 2]}" for i in range(NUM_ROWS)]
    path.write_text("\n".join(["text,label,site", *rows]) + "\n")
    (reason,) = placed(path, NOT_FOR_RELEASE[key])[1]
    assert key in reason


def permuted(texts: tuple[str, ...], *, seed: int, step: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed + step).permutation(len(texts)) / len(texts)


def by_rank(texts: tuple[str, ...], *, seed: int, step: int = 0) -> NDArray[np.float64]:
    return np.argsort(np.argsort(texts)) / len(texts)


def by_number(texts: tuple[str, ...], *, seed: int, step: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed + step).random(len(texts))


@pytest.mark.parametrize("mutant", [permuted, by_rank, by_number])
def test_places_that_other_rows_decide_about_are_caught(
    mutant: Callable[..., NDArray[np.float64]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_positions", mutant)
    assert num_moved(tmp_path / "a.csv", FOR_RELEASE["iid"]) > 0
    assert num_moved(tmp_path / "a.csv", FOR_RELEASE["dirichlet"]) > 0


def test_proportions_of_the_data_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prior_of_the_data(data: LabelledText, *, num_clients: int, seed: int, alpha: float) -> Partition:
        prior = np.bincount(data.labels, minlength=3) / len(data)
        wanted = np.random.default_rng(seed).dirichlet(alpha * prior, size=num_clients).T
        positions = places.client_positions(data.texts, seed=seed)
        return Partition(partitions._dealt(data, wanted / wanted.sum(axis=1, keepdims=True), positions), depends_on="")

    monkeypatch.setattr(partitions, "dirichlet", prior_of_the_data)
    assert num_moved(tmp_path / "a.csv", FOR_RELEASE["dirichlet"]) > 0


def twins() -> LabelledText:
    """Every text three times, spelled a little differently; one of ten in a row of another label too."""
    texts = [t for i in range(200) for t in (f"The Text {i}", f"the  text {i}", f" the text \uff11{i}"[:-2] + f"{i}")]
    labels = np.repeat(np.arange(200) % 2, 3)
    return LabelledText(tuple(texts), labels.astype(np.int64), ("a", "b"), None, "here")


def sides(data: LabelledText, num_test: float) -> set[str]:
    train, test = split_train_test(data, num_test=num_test, seed=2)
    assert len(train) + len(test) == len(data) and len(test)
    return set(map(content, train.texts)) & set(map(content, test.texts))


def check_twins() -> None:
    data = twins()
    assert len(set(map(content, data.texts))) <= 200 + len(data) // 3
    assert not sides(data, 0.2) and not sides(data, 100)
    for partition in (iid(data, num_clients=7, seed=1), dirichlet(data, num_clients=7, seed=1, alpha=0.3)):
        assert num_shared_texts(data, partition.indices) == 0


def test_equal_texts_are_at_one_client_and_on_one_side() -> None:
    check_twins()


def test_a_hash_of_the_text_as_it_is_typed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(texts: tuple[str, ...], *, seed: int, step: int = 0) -> NDArray[np.float64]:
        return np.array([np.random.default_rng(list(text.encode())).random() for text in texts])

    monkeypatch.setattr(places, "_positions", typed)
    with pytest.raises(AssertionError):
        check_twins()


def test_equal_texts_of_two_labels_are_counted_and_the_run_is_not_for_release(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i // 2},{'ab'[i % 2]}\n" for i in range(400)))
    _, reasons = placed(path, FOR_RELEASE["dirichlet"])
    assert len(reasons) == 1 and "share texts" in reasons[0]
    assert not placed(path, FOR_RELEASE["iid"])[1]


def test_a_share_holds_out_about_that_share_and_both_sides_have_rows() -> None:
    data = LabelledText(tuple(map(str, range(5000))), np.arange(5000) % 2, ("a", "b"), None, "here")
    assert 850 < len(split_train_test(data, num_test=0.2, seed=3)[1]) < 1150  # 5 standard deviations; the seed is fixed
    with pytest.raises(InputError, match="Expected num_test to leave rows of here on both sides, got 1e-09"):
        split_train_test(data, num_test=1e-9, seed=3)
    same = LabelledText(("x",) * 9, np.arange(9) % 2, ("a", "b"), None, "here")
    with pytest.raises(InputError, match="both sides"):
        split_train_test(same, num_test=3, seed=3)


def test_the_split_keeps_proportions_and_loses_nothing() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 9 + [3])
    data = LabelledText(tuple(map(str, range(100))), labels, ("a", "b", "c", "d"), None, "here")
    train, test = split_train_test(data, num_test=20, seed=3)
    assert sorted([*train.texts, *test.texts], key=int) == list(data.texts)
    assert np.bincount(test.labels, minlength=4).tolist() == [12, 6, 2, 0]
    assert np.bincount(train.labels, minlength=4).min() >= 1


def test_the_split_is_a_function_of_the_seed() -> None:
    data = LabelledText(tuple(map(str, range(50))), np.arange(50) % 2, ("a", "b"), None, "here")
    first, again, other = (split_train_test(data, num_test=10, seed=s)[1].texts for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("num_test", [1, 5, 48])
def test_the_split_has_exactly_the_number_asked_for(num_test: int) -> None:
    data = LabelledText(tuple(map(str, range(50))), np.arange(50) // 49, ("a", "b"), None, "here")
    train, test = split_train_test(data, num_test=num_test, seed=0)
    assert (len(train), len(test)) == (50 - num_test, num_test)
    assert set(train.labels) == {0, 1}


@pytest.mark.parametrize("num_test", [-1, 0, 49, 1000])
def test_a_split_that_leaves_a_label_untrained_is_refused(num_test: int) -> None:
    data = LabelledText(tuple(map(str, range(50))), np.arange(50) // 49, ("a", "b"), None, "here")
    with pytest.raises(InputError, match=rf"num_test in \[1, 48\].*got {num_test}"):
        split_train_test(data, num_test=num_test, seed=0)


def test_the_same_seed_gives_the_same_split_in_another_process() -> None:
    code = (
        "from fedlr.data import split_train_test; from fedlr.tasks.synthetic import synthetic_text;"
        "print(split_train_test(synthetic_text(30, 5), num_test=5, seed=9)[1].texts)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    here = split_train_test(synthetic_text(30, 5), num_test=5, seed=9)[1].texts
    assert there.stdout.decode().strip() == str(here)


def test_a_tiny_model_takes_a_table_as_it_comes_and_longer_texts_are_refused_before_they_are_read() -> None:
    table = ("experiment=tiny", "data=table", "data.path=nowhere.csv")
    assert compose_experiment(table).data.max_length == 32
    with pytest.raises(InputError, match="data.max_length <= model.max_length=64, got 128"):
        compose_experiment([*table, "data.max_length=128"])
