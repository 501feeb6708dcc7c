"""How good the shared adapter is for each client: on its own held-out rows, and only where the data are public."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedlr.config.build import build, build_method
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.statement import recompute
from fedlr.runs.tables import load_examples
from fedlr.simulations.client_accuracy import ClientTests, client_tests, score_clients
from fedlr.simulations.simulate import simulate

WORDS = ("river", "stone", "garden", "winter", "letter", "music")
TABLE = (
    *("experiment=tiny", "data=table", "data.labels=[no,yes]", "data.public=true", "tracking.client_accuracy=true"),
    *("data.max_length=24", "cohort_size=1", "num_rounds=1", "trainer.sample_rate=0.5", "runtime.num_workers=1"),
)
FILES = ("partition=by_file", "num_clients=null")


def write(path: Path, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lines = [f"{' '.join(generator.choice(WORDS, size=6))} {i},{('no', 'yes')[i % 2]}" for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["text,label", *lines]) + "\n")


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    for number, name in enumerate(("east", "north")):
        write(tmp_path / "wards" / f"{name}.csv", 24, seed=number)
        write(tmp_path / "tests" / f"{name}.csv", 8 + 2 * number, seed=10 + number)
    return tmp_path


def of_clients(*words: str) -> ClientTests | None:
    e = compose_experiment([*TABLE, *words])
    data, held_out = load_examples(e, seed=0)
    partition = build(e.partition.section(), "partition", data=data, num_clients=e.num_clients, seed=0)
    return client_tests(e, build_method(e), partition, held_out, seed=0)


def test_a_run_scores_each_client_on_its_own_rows(wards: Path) -> None:
    words = (f"data.path={wards}/wards", f"data.test_path={wards}/tests", "data.num_test=null")
    e = compose_experiment([*TABLE, *FILES, *words, f"tracking.output_dir={wards}/out"])
    run_dir = simulate(e, say=lambda line: None)
    told = json.loads((run_dir / "client_accuracy.json").read_text())
    assert [(c["name"], c["num_test"]) for c in told["clients"]] == [("east", 8), ("north", 10)]
    accuracy = [c["accuracy"] for c in told["clients"]]
    assert told["worst"] == min(accuracy) and told["mean"] == pytest.approx(sum(accuracy) / 2)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] == pytest.approx((8 * accuracy[0] + 10 * accuracy[1]) / 18)
    page = (run_dir / "report.html").read_text()
    assert "at the worst, client" in page and "client 1 (north)" in page
    statement = recompute(run_dir)
    assert statement["taken_as_public"] == ["which clients there are, and the names of their files"]


def test_held_out_rows_are_dealt_as_the_others(wards: Path) -> None:
    whole = (f"data.path={wards}/wards/east.csv", "data.num_test=0.5", "num_clients=2")
    for partition in (("partition=iid",), ("partition=dirichlet",)):
        found = of_clients(*whole, *partition)
        assert found is not None and found.names is None
        # Held out or not, a row is dealt to the same client: with all rows in one table, they are together.
        e = compose_experiment([*TABLE, *whole, *partition])
        train, test = load_examples(e, seed=0)
        both = train.__class__(
            (*train.texts, *test.texts), np.concatenate([train.labels, test.labels]), train.label_names, None, "both"
        )
        dealt = build(e.partition.section(), "partition", data=both, num_clients=2, seed=0)
        for own, all_rows in zip(found.rows, dealt.indices, strict=True):
            assert [test.texts[i] for i in own] == [both.texts[i] for i in all_rows if i >= len(train)]
    of_file = of_clients(f"data.path={wards}/wards", "data.num_test=0.5", *FILES)
    assert of_file is not None and of_file.names == ("east", "north")


def test_a_client_without_a_row_has_no_accuracy_and_none_is_made_up() -> None:
    tests = ClientTests((np.array([0, 1]), np.array([], dtype=np.int64), np.array([2])), None)
    told = score_clients(tests, lambda rows: 1.0 / len(rows))
    assert [c["accuracy"] for c in told["clients"]] == [0.5, None, 1.0]
    assert (told["mean"], told["worst"]) == (0.75, 0.5)


REFUSED = {
    "data.public=false": "tracking.client_accuracy=false.*data.public=true",
    "runtime=superlink deployment.rehearsal=true num_clients=2": "client_accuracy=false with runtime=superlink",
    "method=fedsa_lora": "method=fedsa_lora.*no adapter is shared by all",
    "data.path=wards/east.csv num_clients=2 partition=dirichlet_by_label data.num_test=0.2": "partition.min_examples",
    "data.path=wards data.test_path=tests/east.csv data.num_test=null": "test_path to a folder or pattern",
    "data.path=wards data.test_path=other data.num_test=null": "only names of clients in 'other'.*got 'west'",
}


@pytest.mark.parametrize(("words", "said"), REFUSED.items(), ids=REFUSED)
def test_what_would_tell_of_private_rows_or_of_no_client_is_refused(
    words: str, said: str, wards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wards)
    write(wards / "other" / "west.csv", 8, seed=5)
    default = [word for word in ("data.path=wards", *FILES) if word.split("=")[0] not in words]
    with pytest.raises(InputError, match=said):
        of_clients(*default, *words.split())
