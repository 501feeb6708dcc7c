"""Settings are chosen on rows that nothing else sees, by as many tries for every arm, and whoever reads a run is told.

Mutants this file kills: validation rows placed by the seed, which are test rows of another one; a choice on the test
rows; a grid point that failed at one seed and wins by the others; the highest where the lowest is best; a tuned run
that trains on the rows it was tuned on; a rate found anew on other rows.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedlr.config.schema import Experiment, compose_experiment
from fedlr.data.placement import all_texts
from fedlr.data.table import LabelledText
from fedlr.data.validation import set_apart
from fedlr.errors import InputError
from fedlr.runs.report.chosen import how_chosen
from fedlr.runs.report.run_files import read_run
from fedlr.runs.tables import load_examples
from fedlr.runs.tuned import Tuned, TunedArm, read_tuned, write_tuned
from fedlr.simulations import cli
from fedlr.simulations.tune import Grid, chosen, grid_of
from tests.report.run_directory import write_run
from tests.simulations.small_runs import SMALL

OWN = ("experiment=tiny", "data=table", "data.path=rows.csv", "data.labels=[x,y]", "data.num_test=0.3")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    write_rows(tmp_path / "rows.csv", range(200))
    write_rows(tmp_path / "own.csv", range(180, 230))
    return tmp_path


def write_rows(path: Path, numbers: Sequence[int]) -> None:
    path.write_text("text,label\n" + "".join(f"film {n},{'xy'[n % 2]}\n" for n in numbers))


def texts(experiment: Experiment) -> tuple[set[str], set[str]]:
    """The texts that are trained on, and those that are scored."""
    train, scored = load_examples(experiment, seed=experiment.seed or 0)
    return set(all_texts(train)), set(all_texts(scored))


def test_validation_rows_are_in_no_training_and_no_test_of_any_seed() -> None:
    found: list[set[str]] = []
    for seed in range(4):
        words = [*OWN, "privacy=none", f"seed={seed}", "data.num_validation=0.2"]
        train, test = texts(compose_experiment(words))
        same, validation = texts(compose_experiment([*words, "tracking.evaluate_on=validation"]))
        assert train == same and len(train | test | validation) == len(train) + len(test) + len(validation) == 200
        found.append(validation)
        assert all(not one & (train | test) for one in found)
    assert all(one == found[0] for one in found)


def test_a_table_of_the_servers_own_is_left_out_of_training_and_test() -> None:
    words = [*OWN, "data.validation_path=own.csv"]
    train, test = texts(compose_experiment(words))
    _, validation = texts(compose_experiment([*words, "tracking.evaluate_on=validation"]))
    assert len(validation) == 50 and len(train) + len(test) == 180 and not validation & (train | test)
    beside = [*OWN, "data.num_test=null", "data.test_path=own.csv", "data.validation_path=rows.csv"]
    with pytest.raises(InputError, match=r"data.validation_path to be another table than data.path, got 'rows.csv'"):
        texts(compose_experiment(beside))
    beside[-1] = "data.validation_path=own.csv"
    with pytest.raises(InputError, match=r"data.validation_path to be another table than data.test_path"):
        texts(compose_experiment(beside))


def test_rows_are_set_apart_each_by_itself_and_equal_texts_together() -> None:
    words = tuple(f"row {k % 300}" for k in range(600))
    data = LabelledText(words, np.zeros(600, dtype=np.int64), ("a", "b"), None, source="here")
    rest, apart = set_apart(data, 0.25)
    assert not set(rest.texts) & set(apart.texts) and len(rest) + len(apart) == 600
    assert 0.1 < len(apart) / 600 < 0.4  # six standard deviations of a share of 300 rows
    fewer = data.subset([k for k in range(600) if k % 300 != 7])
    assert set(set_apart(fewer, 0.25)[1].texts) == set(apart.texts) - {"row 7"}
    with pytest.raises(InputError, match="num_validation to leave rows of here on both sides"):
        set_apart(data.subset([0]), 0.25)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.num_validation=0.2"], "what is chosen on private rows costs epsilon"),
        (
            ["tracking.evaluate_on=validation"],
            "Expected validation rows with tracking.evaluate_on",
        ),
        (["data.num_validation=0.2", "data.validation_path=a"], "data.num_validation=null beside data.validation_path"),
        (["data.num_validation=0.2", "runtime=flower", "privacy=none"], "data.num_validation=null with runtime=flower"),
        (["data.num_validation=2"], "data.num_validation"),
    ],
)
def test_validation_rows_that_cannot_be_are_one_clear_error(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        compose_experiment([*OWN, *words])
    for allowed in ("data.public=true", "privacy=none"):
        compose_experiment([*OWN, "data.num_validation=0.2", allowed])
    compose_experiment([*OWN, "data.validation_path=own.csv"])


@pytest.mark.parametrize(
    ("words", "points", "told"),
    [
        ([], [], "Expected --grid KEY=VALUE,VALUE, got none"),
        ([], ["trainer.optimizer.lr=1"], "Expected several values in --grid trainer.optimizer.lr=1"),
        (["adapter.rank=2"], ["adapter.rank=1,2"], "--grid adapter.rank once and nowhere else"),
        ([], ["adapter.rank=1,2", "adapter.rank=3,4"], "--grid adapter.rank once"),
        ([], ["privacy.epsilon=1,2"], "got privacy.epsilon: it makes the task or the arm"),
        ([], ["method=fedsvd,fedit"], "got method: it makes"),
        (["tracking.evaluate_on=test"], ["adapter.rank=1,2"], "no tracking.evaluate_on beside --on validation"),
    ],
)
def test_a_grid_that_cannot_be_is_one_clear_error(words: list[str], points: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        grid_of(words, points)


def test_what_is_swept_and_no_grid_makes_the_arms_but_the_seed() -> None:
    words = ["method=fedsvd,fedit", "seed=1,2", "privacy.epsilon=1,6", "num_rounds=2"]
    grid = grid_of(words, ["trainer.optimizer.lr=1,2", "privacy.max_grad_norm=0.5,1"])
    assert grid.arms == ("method", "privacy.epsilon")
    run = ["method=fedit", "seed=1", "privacy.epsilon=6", "num_rounds=2", "trainer.optimizer.lr=1"]
    assert grid.arm_of(run) == ("method=fedit", "privacy.epsilon=6") and grid.point_of(run) == (run[-1],)


GRID = Grid(("trainer.optimizer.lr=1,2",), ("method",))
SCORES = {("a", "1"): (0.6, 0.7), ("a", "2"): (0.7, 0.8), ("b", "1"): (0.9, 0.8), ("b", "2"): (0.8, None)}


def tried(root: Path, *, metric: bool = True) -> tuple[list[list[str]], list[Path | None]]:
    """Runs of a grid: two arms, two points, two seeds; None is one that failed."""
    jobs: list[list[str]] = []
    run_dirs: list[Path | None] = []
    for (method, lr), scores in SCORES.items():
        for seed, score in enumerate(scores):
            jobs.append([f"method={method}", f"seed={seed}", f"trainer.optimizer.lr={lr}"])
            if score is None:
                run_dirs.append(None)
                continue
            folder = root / f"{method}-{lr}-{seed}"
            measure = {"name": "accuracy", "higher_is_better": metric, "is_share": True}
            change = {"final_accuracy": score, "final_score": score, "metric": measure}
            write_run(folder, method=method, seed=seed, num_rounds=2, baselines=False, change=change)
            data = {"data": {"path": "rows.csv", "num_validation": 0.2}}
            for name, divisor in (("asked.yaml", "auto"), ("config.yaml", 12.5)):
                (folder / name).write_text(yaml.safe_dump({**data, "trainer": {"divisor": divisor}}))
            run_dirs.append(folder)
    return jobs, run_dirs


def test_the_best_mean_over_all_seeds_is_chosen_for_each_arm(tmp_path: Path) -> None:
    tuned = chosen(GRID, *tried(tmp_path / "runs"), command=["experiment=tiny"])
    assert [(arm.arm, arm.chosen, round(arm.score, 6)) for arm in tuned.arms] == [
        (("method=a",), ("trainer.optimizer.lr=2", "trainer.divisor=12.5"), 0.75),
        (("method=b",), ("trainer.optimizer.lr=1", "trainer.divisor=12.5"), 0.85),
    ]
    assert (tuned.seeds, tuned.num_points, tuned.beside) == (("0", "1"), 2, ("data.num_validation=0.2",))


def test_of_a_loss_the_lowest_is_chosen(tmp_path: Path) -> None:
    tuned = chosen(GRID, *tried(tmp_path / "runs", metric=False), command=[])
    assert tuned.arms[0].chosen[0] == "trainer.optimizer.lr=1"


def test_an_arm_of_which_no_point_came_out_is_an_error(tmp_path: Path) -> None:
    jobs, run_dirs = tried(tmp_path / "runs")
    with pytest.raises(InputError, match="came out at every seed for method=b, got none"):
        chosen(GRID, jobs, [*run_dirs[:4], None, *run_dirs[5:]], command=[])
    with pytest.raises(InputError, match="Expected a run of the grid that came out, got none"):
        chosen(GRID, jobs, [None] * len(jobs), command=[])


TUNED = Tuned(
    "fedlr tune experiment=tiny",
    "40 validation rows (data.num_validation=0.2)",
    ("data.num_validation=0.2",),
    "accuracy",
    ("0", "1"),
    2,
    (TunedArm(("method=a",), ("adapter.rank=2",), 0.75, {"adapter.rank=1": 0.65, "adapter.rank=2": 0.75}),),
)


def test_a_file_is_read_as_it_was_written(here: Path) -> None:
    write_tuned(TUNED, here / "tuned.yaml")
    assert read_tuned(here / "tuned.yaml") == TUNED
    for broken in ("{", "arms: 1", "[]", "!!python/object:os.system {}"):
        (here / "broken.yaml").write_text(broken)
        with pytest.raises(InputError, match=r"a file of `fedlr tune`.*broken.yaml"):
            read_tuned(here / "broken.yaml")


def test_a_run_takes_what_was_chosen_for_its_arm() -> None:
    words = TUNED.words_of(["experiment=tiny", "method=a", "seed=3"])
    assert words[:2] == ["data.num_validation=0.2", "adapter.rank=2"]
    assert words[2].startswith('tracking.tuned="adapter.rank=2 was the best of 2 by accuracy on 40 validation rows')
    assert "adapter.rank=2" not in TUNED.words_of(["method=a", "adapter.rank=2"])
    with pytest.raises(InputError, match=r"with the words of an arm \(method=a\), got method=b"):
        TUNED.words_of(["method=b"])
    with pytest.raises(InputError, match=r"Expected data.num_validation=0.2 as it was tuned, got data"):
        TUNED.words_of(["method=a", "data.num_validation=0.1"])


def test_from_a_grid_to_a_run_that_says_what_it_was_tuned_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "privacy=none", "model.hidden_size=8", "adapter.rank=2", "trainer.divisor=auto"]
    grid = ["--grid", "trainer.optimizer.lr=0.5,2", "--on", "validation"]
    assert cli.tune([*words, "data.num_validation=0.3", *grid]) == 0
    assert "2 tries for every arm" in capsys.readouterr().out
    assert cli.tune([*words, "data.num_validation=0.3", *grid, "--out", "again.yaml"]) == 0
    assert capsys.readouterr().out.count("done before, in outputs/tiny-tune/") == 2
    assert cli.simulate([*words, "--tuned", "tuned.yaml"]) == 0
    (run_dir,) = Path("outputs/tiny").iterdir()
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["data"]["num_validation"] == 0.3 and config["tracking"]["evaluate_on"] == "test"
    (grid_run,) = (path for path in Path("outputs/tiny-tune").iterdir() if same_rate(path, config))
    assert yaml.safe_load((grid_run / "config.yaml").read_text())["trainer"]["divisor"] == config["trainer"]["divisor"]
    (tuned,) = how_chosen(read_run(run_dir))
    assert (
        tuned.startswith("Tuned: trainer.optimizer.lr=") and tuned.rstrip(".") in (run_dir / "report.html").read_text()
    )
    assert how_chosen(read_run(grid_run))[0].startswith("All scores of this run are of validation rows")
    assert json.loads((run_dir / "summary.json").read_text())["verdict"]["num_rows"] == 24


def same_rate(run_dir: Path, config: dict) -> bool:
    own = yaml.safe_load((run_dir / "config.yaml").read_text())
    return own["trainer"]["optimizer"] == config["trainer"]["optimizer"]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--grid", "adapter.rank=1,2"], "Expected --on validation, got none"),
        (["--grid", "adapter.rank=1,2", "--on", "test"], "Expected --on validation, got test"),
        (["--on", "validation"], "Expected --grid KEY=VALUE,VALUE"),
        (["--grid", "adapter.rank=1,2", "--on", "validation"], "Expected validation rows with tracking.evaluate_on"),
        (["method=a,b", "--grid", "adapter.rank=1,2", "--on", "validation"], "method"),
        (["--grid", "adapter.rank=1,2", "--on", "validation", "--out", "rows.csv"], "--out to be a new file"),
    ],
)
def test_what_cannot_be_tuned_is_one_clear_line(
    words: list[str], fragment: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.tune(["experiment=tiny", *words]) == 2
    told = capsys.readouterr()
    assert told.out == "" and fragment in told.err and told.err.count("\n") == 1
    assert not (here / "outputs").exists()
