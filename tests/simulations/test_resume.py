"""A run that is killed, at any moment of any round, is resumed as if nothing had happened (R-F1, R-F2, R-F6, R-F7).

Mutants this file kills (`MUTANTS`): a checkpoint without what the clients keep, lines of later rounds that stay, a
resumed run that forgets who took part.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedlr.simulations.checkpoints
import fedlr.simulations.simulate
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.charges import read_ledger
from fedlr.rounds.pools.client_state import Kept
from fedlr.runs.directory import CHECKPOINTS, LEDGER, cut_lines, sole_writer
from fedlr.simulations.cli import resume as resume_command
from fedlr.simulations.resume import resume
from fedlr.simulations.simulate import simulate
from tests.painted import drawn_by, inline_svg
from tests.simulations.killed_runs import LATE, POINTS, no_report, only_run, run_name
from tests.simulations.small_runs import SMALL, experiment, lines

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)  # its runs are made in one go, in front of the first test


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves behind but its times, and what names the rows of its ledger."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*.json*")):
        name = path.relative_to(run_dir).as_posix()
        if path.suffix == ".jsonl" and "ledger" not in name:
            found[name] = lines(path)
        elif name in ("summary.json", "privacy.json", "partition.json", "baselines/alone.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in content.items() if key not in ("seconds", "ledger_head")}
    found["adapter"] = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    found["files"] = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))
    for path in run_dir.rglob(f"*{LEDGER}"):
        found[path.name] = read_ledger(path)[1].by_client
    return found


def without_repeats(found: dict[str, Any]) -> dict[str, Any]:
    """The same, without which charges were repeated, and in what order."""
    for name in list(found):
        if name.endswith(LEDGER):
            found[name] = {
                client: {n: replace(charge, is_repeated=False) for n, charge in rounds.items()}
                for client, rounds in found[name].items()
            }
    return found


Job = tuple[list[str], list[tuple[str, int]]]  # overrides, and kills: a moment, and of which round, from 1
# Moments within a pool's work differ between the pools; later ones are of code that both share.
OF_POOL = POINTS[1:4]
JOBS: dict[str, Job] = {
    "one after the other": (["trainer.engine=opacus"], [(point, 1 + n % 2) for n, point in enumerate(OF_POOL)]),
    "together": ([], [(point, 2 - n % 2) for n, point in enumerate(POINTS)]),
    # What clients keep, the server's control, the server's momentum.
    "personal tensors": (["method=fedsa_lora", "cohort_size=4"], [("aggregated", 2)]),
    "memory": (["method=scaffold", "num_rounds=3", "cohort_size=4"], [("sent", 3)]),
    "momentum and a mean of models": (
        ["server_momentum=0.5", "average_last=2", "trainer.optimizer.lr=auto", "trainer.divisor=auto", "num_rounds=3"],
        [("sent", 3)],
    ),
    "folded layers": (
        ["method=layer_mean", "adapter=tuner", "adapter.system=hra", "trainer.engine=opacus", "num_rounds=3"],
        [("sent", 3)],
    ),
    "ranks that grow": (["method=rank_growth", "num_rounds=3"], [("sent", 3)]),
    "a start with a side": (["adapter.init_lora_weights=pissa", "method=ffa_lora"], [("sent", 2)]),
    "baselines": (
        ["tracking.run_no_privacy=true", "tracking.run_alone=true"],
        [(point, 1) for point in LATE],
    ),
    "the best model, and an early end": (
        ["release=best", "patience=2", "data.num_validation=0.3", "num_rounds=6", "adapter.train_head=true"]
        + ["trainer.optimizer.lr=30"],
        [("sent", 2), ("after", 3)],
    ),
    "rates that decay": (
        ["method=fedadam", "method.aggregate.bias_correction=true", "trainer.lr_schedule=cosine", "num_rounds=3"]
        + ["server_lr_schedule=linear", "server_warmup_rounds=1"],
        [("sent", 3)],
    ),
    "every third round": (["num_rounds=4", "tracking.checkpoint_every=3"], [("aggregated", 4)]),
}
# The same state again, at another moment, or in another method.
MORE_JOBS: dict[str, Job] = {
    "one after the other": (["trainer.engine=opacus"], [(point, 1 + n % 2) for n, point in enumerate(POINTS)]),
    "memory": (JOBS["memory"][0], [("aggregated", 2)]),
    "server optimizer": (["method=fedadam", "num_rounds=3"], [("sent", 3)]),
    "folded products": (["method=fedex_lora", "num_rounds=3"], [("sent", 3)]),
    "baselines": (JOBS["baselines"][0], [("sent", 4)]),
    "the best model, and an early end": (JOBS["the best model, and an early end"][0], [("aggregated", 3)]),
    "every third round": (JOBS["every third round"][0], [("sent", 3)]),
}


def run_jobs(folder: Path, jobs: dict[str, Job]) -> Path:
    """Run, kill and resume in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.simulations.killed_runs", str(folder), json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_jobs(tmp_path_factory.mktemp("killed"), JOBS)


def check_kills(folder: Path, kills: list[tuple[str, int]]) -> None:
    """Every killed run ended as the uninterrupted one, and its ledger holds whatever was read."""
    expected = without_repeats(outcome(only_run(folder / "reference")))
    assert len(expected) >= 8 and (folder / "reference" / "truth.jsonl").stat().st_size
    for point, number in kills:
        name = run_name(point, number)
        found = without_repeats(outcome(only_run(folder / name)))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value, f"{name}: {key}"
        ledgers = [found[key] for key in found if key.endswith(LEDGER)]
        charged = {(client, n) for ledger in ledgers for client, rounds in ledger.items() for n in rounds}
        truth = {tuple(json.loads(line)) for line in (folder / name / "truth.jsonl").read_text().splitlines()}
        assert truth and truth <= charged


@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_were_not(killed: Path, job: str) -> None:
    check_kills(killed / job, JOBS[job][1])


def test_baselines_that_were_finished_are_not_run_again(killed: Path) -> None:
    """Only the killed alone arm reads its rows twice."""
    reads = {
        point: len((killed / "baselines" / run_name(point, 1) / "truth.jsonl").read_text().splitlines())
        for point in LATE
    }
    whole = len((killed / "baselines" / "reference" / "truth.jsonl").read_text().splitlines())
    assert reads["exported"] == reads["summarised"] == whole < reads["alone"] < 2 * whole


@pytest.mark.slow
def test_other_moments_and_methods_end_as_if_they_were_not_killed(tmp_path: Path) -> None:
    folder = run_jobs(tmp_path, MORE_JOBS)
    for job, (_, kills) in MORE_JOBS.items():
        check_kills(folder / job, kills)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_140_kills_change_nothing(tmp_path: Path, engine: str) -> None:
    kills = [(point, number) for point in POINTS for number in range(1, 21)]
    job: Job = (["num_rounds=20", f"trainer.engine={engine}"], kills)
    check_kills(run_jobs(tmp_path, {"all": job}) / "all", kills)


class Cut(BaseException):
    """The process dies here."""


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fedlr.simulations.simulate", "fedlr.simulations.resume"):
        monkeypatch.setattr(f"{module}.write_report", no_report)


@pytest.fixture
def cut_run(tmp_path: Path) -> Path:
    """A run of two rounds that was cut off in the second, after its clients had paid."""
    return cut_off(tmp_path / "runs")


def cut_off(folder: Path, *overrides: str, words: Sequence[str] = SMALL) -> Path:
    """A run that dies when the second round is aggregated."""
    calls = []

    def dies(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise Cut
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        real = fedlr.simulations.simulate.metrics_row
        patch.setattr(fedlr.simulations.simulate, "metrics_row", dies)
        with pytest.raises(Cut):
            e = compose_experiment([*words, f"tracking.output_dir={folder}", *overrides])
            simulate(e, say=lambda line: None)
    return only_run(folder)


def quietly(run_dir: Path) -> None:
    resume(run_dir, say=lambda line: None)


def edit(path: Path, old: str, new: str) -> None:
    """Replace what stands once in a file."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_run_goes_on_only_with_what_it_began_with(
    cut_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in cut_run.rglob("*") if path.is_file()}

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            quietly(cut_run)

    edit(cut_run / "config.yaml", "num_rounds: 2", "num_rounds: 3")
    refused(r"Expected config\.yaml as it was")
    edit(cut_run / "config.yaml", "num_rounds: 3", "num_rounds: 2")
    with monkeypatch.context() as patch:
        patch.setattr("fedlr.runs.directory.git_revision", lambda: "another")
        refused("Expected git .* got another")
    for name, what in (("data_sha256", "examples"), ("seed", "seed"), ("start_sha256", "adapter that the run began")):
        with monkeypatch.context() as patch:
            real = fedlr.simulations.checkpoints.about_federation
            patch.setattr("fedlr.simulations.resume.about_federation", lambda f: {**real(f), name: "x"})  # noqa: B023
            refused(f"Expected the {what}")
    with sole_writer(cut_run):
        refused("no process is writing")
    (cut_run / LEDGER).rename(tmp_path / "away")
    refused("missing ledger is not an unspent budget")
    (tmp_path / "away").rename(cut_run / LEDGER)
    assert {path: path.read_bytes() for path in cut_run.rglob("*") if path.is_file()} == before

    quietly(cut_run)
    with pytest.raises(InputError, match="which is finished"):
        quietly(cut_run)


def test_one_letter_of_one_row_makes_other_data(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    rows = [f"some text {n},{n % 2}" for n in range(150)]
    table.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    overrides = [word for word in SMALL if not word.startswith("data.num_examples")]
    run_dir = cut_off(
        tmp_path / "runs",
        "data=table",
        f"data.path={table}",
        "data.labels=[0,1]",
        "data.max_length=16",
        words=overrides,
    )
    table.write_text("\n".join(["text,label", *rows[:70], "some texd 70,0", *rows[71:]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="Expected the examples of the run"):
        quietly(run_dir)


def test_an_older_copy_of_the_ledger_is_refused(tmp_path: Path) -> None:
    """Its lost rows were spent; the head in the checkpoint tells."""
    copies: list[bytes] = []
    real = fedlr.simulations.simulate.metrics_row

    def copying(*args: Any, **options: Any) -> Any:
        copies.append(next(tmp_path.rglob(LEDGER)).read_bytes())
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedlr.simulations.simulate, "metrics_row", copying)
        run_dir = cut_off(tmp_path / "runs")
    newest = (run_dir / LEDGER).read_bytes()
    assert copies[0] != newest and newest.startswith(copies[0])
    (run_dir / LEDGER).write_bytes(copies[0])
    with pytest.raises(InputError, match="older copy of the ledger"):
        quietly(run_dir)
    (run_dir / LEDGER).write_bytes(newest)
    quietly(run_dir)


def test_lines_that_were_lost_are_not_made_up(cut_run: Path) -> None:
    path = cut_run / "clients.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"Expected 3 lines of 1 rounds in .*clients\.jsonl, got 2"):
        quietly(cut_run)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(cut_run: Path, tmp_path: Path) -> None:
    shutil.copytree(cut_run, tmp_path / "copy")
    quietly(cut_run)
    (path,) = (tmp_path / "copy" / CHECKPOINTS / "round-00001").glob("adapter*")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    said: list[str] = []
    resume(tmp_path / "copy", say=said.append)
    assert any("round 1 is damaged" in line for line in said) and any("after round 0/2" in line for line in said)
    assert without_repeats(outcome(tmp_path / "copy")) == without_repeats(outcome(cut_run))
    shutil.rmtree(tmp_path / "copy" / "adapter")


def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path: Path) -> None:
    run_dir = cut_off(tmp_path / "runs", "tracking.checkpoint_every=null")
    assert not (run_dir / CHECKPOINTS).exists()
    with pytest.raises(InputError, match=r"got none \(tracking\.checkpoint_every is null\)"):
        quietly(run_dir)
    with pytest.raises(InputError, match=r"readable config\.yaml"):
        quietly(tmp_path)


def test_noise_of_the_operating_system_is_not_drawn_again(tmp_path: Path) -> None:
    """Whoever had paid for the lost round stays charged, and does not train in it for free."""
    run_dir = cut_off(tmp_path / "runs", "privacy.randomness=os", "seed=null")
    before = read_ledger(run_dir / LEDGER)[1].by_client
    said: list[str] = []
    resume(run_dir, say=said.append)
    assert any("3 clients were charged for rounds that were lost" in line for line in said)
    rows = [row for row in lines(run_dir / "clients.jsonl") if row["round_index"] == 1]
    assert [(row["status"], row["reason"]) for row in rows] == [("refused", "already_reserved")] * 3
    assert read_ledger(run_dir / LEDGER)[1].by_client == before
    metrics = lines(run_dir / "metrics.jsonl")
    statement = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    assert metrics[-1]["epsilon_max"] == statement["epsilon"]["maximum"]
    assert metrics[-1]["loss"] == metrics[-2]["loss"]


def test_clients_alone_that_were_cut_off_are_left_out_if_their_noise_cannot_be_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any, **options: Any) -> Any:
        raise Cut

    e = experiment(f"tracking.output_dir={tmp_path}", "tracking.run_alone=true", "privacy.randomness=os", "seed=null")
    with monkeypatch.context() as patch:
        patch.setattr(fedlr.simulations.simulate, "train_alone", dies)
        with pytest.raises(Cut):
            simulate(e, say=lambda line: None)
    monkeypatch.undo()  # the report is drawn
    said: list[str] = []
    with drawn_by(inline_svg):
        resume(only_run(tmp_path), say=said.append)
    assert any("left out" in line for line in said)
    assert (only_run(tmp_path) / "report.html").stat().st_size > 10_000
    assert not (only_run(tmp_path) / "baselines" / "alone.json").exists()


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        if any(tmp_path.rglob("round-00000")):  # the start was saved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    e = experiment(f"tracking.output_dir={tmp_path}", "privacy=none")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(InputError, match=r"got: No space left on device; what was written before"):
            simulate(e, say=lambda line: None)
    run_dir = only_run(tmp_path)
    assert [path.name for path in (run_dir / CHECKPOINTS).iterdir()] == ["round-00000"]
    quietly(run_dir)
    assert (run_dir / "summary.json").exists()


def no_memory(kept: Kept) -> dict[str, dict[Any, Any]]:
    return {"personal": {}, "memory": {}}


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "without what the clients keep": ("fedlr.rounds.pools.client_state.Kept.tensors", no_memory),
    "with lines of later rounds": (
        "fedlr.simulations.checkpoints.cut_lines",
        lambda path, stays: cut_lines(path, bool),
    ),
    "without who took part": ("fedlr.simulations.simulate.Counter", lambda rows: Counter()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_resumed_run_that_is_another_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    overrides = ["method=fedsa_lora", "cohort_size=4"]
    whole = simulate(experiment(f"tracking.output_dir={tmp_path / 'whole'}", *overrides), say=lambda line: None)
    monkeypatch.setattr(*MUTANTS[mutant])
    run_dir = cut_off(tmp_path / "cut", *overrides)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"rounds_completed": 2}) + "\n")  # its clients' lines were not written any more
    with pytest.raises((AssertionError, InputError)):
        quietly(run_dir)
        assert without_repeats(outcome(run_dir)) == without_repeats(outcome(whole))


def test_the_command_says_what_is_wrong_in_one_line(cut_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume_command([str(cut_run)]) == 0
    assert "report in" in capsys.readouterr().out
    assert resume_command([str(cut_run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
