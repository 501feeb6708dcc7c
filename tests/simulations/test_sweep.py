"""A sweep is its runs: side by side as alone, finished ones not repeated, one that was cut off gone on with.

Mutants this file kills (by hand): a comparison of `asked.yaml` that leaves the seed out; one that counts threads; a
worker that keeps the first run's configuration; results in the order in which they come.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import fedlr.simulations.simulate
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.runs.asked import ADDED, ASKED, earlier_run, write_asked
from fedlr.runs.directory import FINISHED, SUMMARY, create_run_dir, sole_writer, write_json, write_origin
from fedlr.runs.prepare import with_library
from fedlr.simulations import cli
from fedlr.simulations.sweep import run_job, run_sweep
from fedlr.simulations.sweep_worker import serve
from tests.simulations.small_runs import SMALL, lines

FAST = (*SMALL, "num_rounds=1", "trainer.num_steps=1", "model.hidden_size=8", "adapter.rank=2", "privacy=none")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    return tmp_path


def written(*overrides: str, finished: bool = True, problem: str | None = None) -> Path:
    """A run's folder as `earlier_run` sees it, without a run."""
    experiment = compose_experiment([*FAST, *overrides])
    run_dir = create_run_dir(experiment)
    write_asked(run_dir, experiment)
    write_origin(run_dir, with_library(experiment))
    if finished:
        write_json(run_dir / SUMMARY, {"problem": problem, FINISHED: True})
    return run_dir


def found(*overrides: str) -> Path | None:
    earlier = earlier_run(compose_experiment([*FAST, *overrides]))
    return earlier and earlier.run_dir


def test_a_run_is_found_by_what_was_asked_for() -> None:
    run_dir = written("seed=1", "trainer.optimizer.lr=auto", "trainer.divisor=auto")
    auto = ("trainer.optimizer.lr=auto", "trainer.divisor=auto")
    assert found("seed=1", *auto) == run_dir
    assert found("seed=1", *auto, "runtime.num_workers=7", "tracking.checkpoint_every=null") == run_dir
    for other in (("seed=2", *auto), ("seed=1",), ("seed=1", *auto, "num_rounds=2"), ("seed=1", *auto, "name=other")):
        assert found(*other) is None, other


def test_a_run_from_before_a_key_was_added_is_found_and_its_library_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulations.test_sweep.FAST", FAST[:-1])  # with privacy
    run_dir = written()
    tree = yaml.safe_load((run_dir / ASKED).read_text())
    for section, key in [*(("privacy", key) for key in ADDED["privacy"]), ("runtime", "matmul")]:
        tree[section].pop(key, None)
    for section in ("data", "model"):
        tree[section]["fetched_by"] = "python -m assets"
    (run_dir / ASKED).write_text(yaml.safe_dump(tree))
    versions = json.loads((run_dir / "versions.json").read_text())
    del versions["matmul"]
    write_json(run_dir / "versions.json", versions)
    monkeypatch.setattr("fedlr.runs.asked.library_of", lambda asked: "onednn")
    earlier = earlier_run(compose_experiment(list(FAST)))
    assert earlier is not None and (earlier.run_dir, earlier.changed) == (run_dir, "matmul mkl, now onednn")
    assert found("privacy.release_noise=grid") is None
    assert found("privacy.ledger=a.jsonl", "privacy.ledger_epsilon=9") is None


def test_a_run_without_a_seed_is_never_the_same() -> None:
    written("seed=null")
    assert found("seed=null") is None


def test_a_finished_run_comes_before_one_that_was_cut_off_and_the_latest_first() -> None:
    first, second, _ = written(), written(), written(finished=False)
    assert found() == second != first
    shutil.rmtree(second)
    shutil.rmtree(first)
    earlier = earlier_run(compose_experiment(list(FAST)))
    assert earlier is not None and not earlier.is_finished


def test_other_versions_are_told() -> None:
    run_dir = written()
    versions = json.loads((run_dir / "versions.json").read_text())
    earlier = earlier_run(compose_experiment(list(FAST)))
    assert earlier is not None and earlier.changed is None
    write_json(run_dir / "versions.json", {**versions, "torch": "1.0"})
    earlier = earlier_run(compose_experiment(list(FAST)))
    assert earlier is not None and earlier.changed is not None and earlier.changed.startswith("torch 1.0, now ")


@pytest.mark.parametrize("broken", ["asked", "summary"])
def test_a_broken_folder_is_no_run(broken: str) -> None:
    run_dir = written()
    (run_dir / {"asked": ASKED, "summary": SUMMARY}[broken]).write_text("{")
    assert found() is None


def test_a_table_that_was_written_since_makes_another_run(here: Path) -> None:
    table = here / "reviews.csv"
    table.write_text("text,label\na,x\n")
    own = ("data=table", "data.path=reviews.csv", "data.labels=[x,y]", "data.num_test=0.2")
    run_dir = written(*own)
    assert found(*own) == run_dir
    later = time.time() + 60
    os.utime(table, (later, later))
    assert found(*own) is None


def sweep(*overrides: str, skip_done: bool = True) -> tuple[list[Path], str]:
    """Run a sweep in this process and return its folders and all that it said."""
    said: list[str] = []
    jobs = cli.expand([*FAST, *overrides])
    experiments = [compose_experiment(job) for job in jobs]
    done = run_sweep(jobs, experiments, skip_done=skip_done, say=said.append)
    return [run_dir for run_dir in done if run_dir], "\n".join(said)


def test_what_is_done_is_not_repeated_and_said() -> None:
    first, _ = sweep("-m", "seed=1,2")
    again, said = sweep("-m", "seed=2,1,3")
    assert again[:2] == first[::-1] and again[2] not in first
    assert said.count("done before, in ") == 2 and f"[1/3] {' '.join(FAST)} seed=2: done before, in {first[1]}" in said
    both, said = sweep("-m", "seed=1,2", skip_done=False)
    assert not set(both) & set(first) and "done before" not in said


def test_a_run_that_learned_nothing_is_not_repeated_and_still_failed(capsys: pytest.CaptureFixture[str]) -> None:
    written("seed=1", problem="Expected at least one update")
    assert cli.simulate([*FAST, "-m", "seed=1", "--skip-done"]) == 2
    told = capsys.readouterr()
    assert "and failed: Expected at least one update" in told.out and "1 of 1 runs failed" in told.err


def test_a_sweep_that_was_stopped_goes_on_where_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = sweep("num_rounds=3", "-m", "seed=1", skip_done=False)
    real: Callable[..., int] = fedlr.simulations.simulate.append_lines
    calls: list[object] = []

    def interrupted(path: Path, values: object) -> None:
        calls.append(path)
        if len(calls) == 6:  # the start, and two rounds of two files, are written
            raise KeyboardInterrupt
        real(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(fedlr.simulations.simulate, "append_lines", interrupted)
        patch.setattr("fedlr.simulations.sweep.earlier_run", lambda e: None)
        with pytest.raises(KeyboardInterrupt):
            sweep("num_rounds=3", "-m", "seed=1,2")
    shutil.rmtree(whole[0])
    done, said = sweep("num_rounds=3", "-m", "seed=1,2")
    assert said.count("going on with ") == 1 and "going on after round 2/3" in said
    assert len(done) == 2 and len(list(Path("outputs/tiny").iterdir())) == 2, "nothing began anew"


def test_a_run_that_cannot_be_finished_begins_anew_and_says_why() -> None:
    cut = written(finished=False)
    done, said = sweep("-m", "seed=0")
    assert f"note: {cut} stays as it is, and the run starts anew: Expected a checkpoint" in said
    assert done[0] != cut


def test_a_run_that_another_process_writes_is_left_to_it() -> None:
    cut = written(finished=False)
    with sole_writer(cut), pytest.raises(InputError, match="which one is"):
        run_job(compose_experiment(list(FAST)), cut, say=lambda line: None)
    assert [path.name for path in cut.parent.iterdir()] == [cut.name]


def test_a_crash_of_one_run_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fedlr.simulations.simulate.simulate

    def crashing(experiment, **options):
        if experiment.seed == 1:
            raise RuntimeError("the ceiling fell")
        return real(experiment, **options)

    monkeypatch.setattr(fedlr.simulations.simulate, "simulate", crashing)
    assert cli.simulate([*FAST, "-m", "seed=1,2"]) == 2
    told = capsys.readouterr()
    assert "seed=1: RuntimeError: the ceiling fell" in told.err and "1 of 2 runs failed" in told.err
    assert "results in outputs/tiny/" in told.out


def test_a_process_of_a_sweep_answers_each_run_with_what_came_of_it() -> None:
    for seed in ("1", "2"):
        answer = serve({"overrides": [*FAST, f"seed={seed}"], "unfinished": None}, say=lambda line: None)
        assert json.loads((Path(answer["run_dir"]) / SUMMARY).read_text())["seed"] == int(seed)
    for overrides, why in (["num_clients=1000"], "1000 clients"), (["no_such=1"], "no_such"):
        assert why in serve({"overrides": [*FAST, *overrides], "unfinished": None}, say=lambda line: None)["failed"]


def test_processes_share_the_runs_and_one_that_dies_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedlr.simulations.sweep.WORKER", "tests.simulations.echo_worker")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    jobs = cli.expand([*FAST, "-m", "seed=9,1,7,9,2,3"])
    said: list[str] = []
    done = run_sweep(jobs, [compose_experiment(FAST)] * 6, num_jobs=2, say=said.append)
    assert done == [None, Path("made/1"), None, None, Path("made/2"), Path("made/3")]
    assert "[2/6]   round 1/1" in said and "[5/6] results in made/2" in said and not any("\n" in one for one in said)
    told = capfd.readouterr().err
    assert told.count("its process ended with signal 9 (out of memory?)") == 2 and "seed=7: no luck" in told


@pytest.mark.slow
def test_side_by_side_is_as_alone(capfd: pytest.CaptureFixture[str]) -> None:
    grid = [word for word in FAST if not word.startswith(("num_clients=", "privacy="))]
    grid += ["-m", "seed=1,2", "num_clients=4,1000"]
    assert cli.simulate([*grid, "tracking.output_dir=beside", "--jobs", "2"]) == 2
    told = capfd.readouterr()
    assert "2 of 4 runs failed" in told.err and told.err.count("of synthetic text (seed ") == 2
    assert "[1/4] results in beside/" in told.out and "[3/4]   round 1/1" in told.out
    assert cli.simulate([*grid, "tracking.output_dir=alone"]) == 2
    beside, alone = (
        sorted(Path(folder).glob("tiny/*/metrics.jsonl"), key=lambda path: lines(path)[0]["loss"])
        for folder in ("beside", "alone")
    )
    assert len(beside) == 2 and list(map(lines, beside)) == list(map(lines, alone))
    adapters = [
        [(path.parent / "adapter" / "adapter_model.safetensors").read_bytes() for path in b] for b in (beside, alone)
    ]
    assert adapters[0] == adapters[1]
    assert Path("beside/tiny/comparison.html").is_file()


def test_a_process_ends_with_the_sweep_that_started_it() -> None:
    busy = "import time; from simulations import sweep_worker as w; w.serve = lambda *a, **b: time.sleep(900); w.main()"
    idle = "from simulations import sweep_worker as w; w.main()"
    asked = json.dumps({"overrides": [], "unfinished": None}) + "\n"
    code = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen([sys.executable, "-c", one], stdin=subprocess.PIPE, text=True, env=code)
        for one in (busy, idle)
    ]
    for process, text in zip(both, (asked, ""), strict=True):
        process.communicate(text)
    assert [process.returncode for process in both] == [1, 0]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["-m", "seed=1,2", "--jobs", "0"], '--jobs to be a number from 1 to 256, got "0"'),
        (["-m", "seed=1,2", "--jobs", "two"], 'got "two"'),
        (["-m", "seed=1,2", "--jobs"], "side by side after --jobs, got none"),
        (["--jobs", "2"], "Expected -m beside --jobs 2"),
        (["-m", "seed=1,2", "--jobs", "2", "runtime=flower"], "--jobs 1 with runtime=flower, got 2"),
        (["-m", "seed=1,2", "--jobs", "2", "runtime.num_processes=2"], "--jobs 1 with runtime.num_processes above 1"),
        (["--skip_done"], "got '--skip_done'"),
    ],
)
def test_an_option_that_cannot_be_is_one_clear_line(
    words: list[str], fragment: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.simulate(["experiment=tiny", *words]) == 2
    told = capsys.readouterr()
    assert told.out == "" and fragment in told.err and told.err.count("\n") == 1
    assert list(here.iterdir()) == []
