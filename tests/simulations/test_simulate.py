"""A whole run: what it leaves behind, where its budget ends it, and what is left when it is cut off.

Mutants killed: a client that trains beyond its budget; a line or a folder that is half written.
"""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import fedlr.training.local as local
from fedlr.models.peft_state import read_adapter
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.sampling import PoissonSampler
from fedlr.runs.directory import LEDGER
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.simulate import simulate
from tests.simulations import small_runs
from tests.simulations.small_runs import (
    RUN_FILES,
    experiment,
    federation,
    leave_state_behind,
    lines,
    open_ledger,
    rounds,
)


def test_a_run_leaves_everything_behind_and_nothing_half_done(tmp_path: Path) -> None:
    said: list[str] = []
    e = experiment(f"tracking.output_dir={tmp_path}", "tracking.run_alone=true", "tracking.run_no_privacy=true")
    run = simulate(e, say=said.append)
    assert {path.name for path in run.iterdir()} == {*RUN_FILES, LEDGER, "baselines"}
    assert not list(run.rglob("*.partial"))
    metrics, clients = lines(run / "metrics.jsonl"), lines(run / "clients.jsonl")
    assert [row["rounds_completed"] for row in metrics] == [0, 1, 2]
    assert len(clients) == 6
    summary = json.loads((run / "summary.json").read_text())
    assert summary["adapter_sha256"] in (run / "adapter" / "README.md").read_text()
    assert summary["epsilon_max"] == metrics[-1]["epsilon_max"] <= 6
    alone = json.loads((run / "baselines" / "alone.json").read_text())
    assert [client["client_id"] for client in alone["clients"]] == [0, 1, 2, 3]
    assert all(0 < client["epsilon"] <= 6 for client in alone["clients"])
    bare = lines(run / "baselines" / "no_privacy" / "metrics.jsonl")
    assert [row["epsilon_max"] for row in bare] == [None] * 3
    assert bare[0]["loss"] == metrics[0]["loss"]  # both start from the same state
    assert any("round 2/2" in line for line in said)


def test_a_run_without_privacy_has_no_ledger_and_says_so(tmp_path: Path) -> None:
    run = simulate(experiment(f"tracking.output_dir={tmp_path}", "privacy=none"), say=lambda line: None)
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert json.loads((run / "summary.json").read_text())["privacy"] == "none"
    assert all(row["epsilon"] is None for row in lines(run / "clients.jsonl"))


def test_a_run_that_cannot_be_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_prefix"):
        simulate(experiment(f"tracking.output_dir={tmp_path}", "runtime.cache_prefix=true"), say=lambda line: None)
    assert not list(tmp_path.iterdir())


def spends_to_the_budget_and_no_further(f: object, folder: Path) -> None:
    """Each client trains as long as one more round fits its budget, then refuses; the run goes on."""
    _, metrics, clients = rounds(f, folder)
    event = PoissonSampler(f.mechanism.sample_rate).dp_event(f.mechanism.noise_multiplier)
    after = [epsilon([(event, 2 * n)], f.budget.delta, accountant="rdp") if n else 0.0 for n in range(7)]
    affordable = sum(spent <= f.budget.epsilon for spent in after[1:])
    assert 0 < affordable < 5, "the test needs a budget that ends within the run"
    turns = dict.fromkeys(range(f.experiment.num_clients), 0)
    for row in clients:
        fits = turns[row["client_id"]] < affordable
        turns[row["client_id"]] += fits
        assert row["status"] == ("trained" if fits else "refused")
        assert row["reason"] == (None if fits else "budget_exhausted")
        assert row["epsilon"] == pytest.approx(after[turns[row["client_id"]]])
        assert row["epsilon"] <= f.budget.epsilon
    assert [row["rounds_completed"] for row in metrics] == list(range(7))
    assert metrics[-1]["num_refused"] == 3
    assert metrics[-1]["loss"] == metrics[-2]["loss"]  # nobody trained: the adapter stays
    assert max(row["epsilon_max"] for row in metrics) <= f.budget.epsilon


TIGHT = ("num_rounds=6", "cohort_size=3", "num_clients=3")


@pytest.mark.parametrize("noise_multiplier", [0.8, 0.9])
def test_clients_refuse_exactly_when_the_next_round_would_exceed_the_budget(
    tmp_path: Path, noise_multiplier: float
) -> None:
    f = federation(*TIGHT, f"privacy.noise_multiplier={noise_multiplier}")
    spends_to_the_budget_and_no_further(f, tmp_path / "run")


def test_a_run_that_spends_too_much_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = federation(*TIGHT, "privacy.noise_multiplier=0.9")
    richer = replace(f, budget=replace(f.budget, epsilon=100.0))
    monkeypatch.setattr(small_runs, "create_ledger", lambda _, path: create_ledger(richer, path))
    with pytest.raises(AssertionError):
        spends_to_the_budget_and_no_further(f, tmp_path / "run")


def test_calibrated_noise_lasts_for_all_rounds(tmp_path: Path) -> None:
    _, metrics, clients = rounds(federation(*TIGHT), tmp_path / "run")
    assert {row["status"] for row in clients} == {"trained"}
    assert 5.9 < metrics[-1]["epsilon_max"] <= 6


def test_a_run_that_fails_leaves_whole_lines_and_a_ledger_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, calls, real = federation("trainer.engine=opacus"), [], local.privatise

    def fails_late(total: object, **arguments: object) -> object:
        calls.append(None)
        if len(calls) == 3 * 2 + 4:  # the second client of the second round, in its second step
            raise OSError("no space left")
        return real(total, **arguments)

    monkeypatch.setattr(local, "privatise", fails_late)
    with pytest.raises(OSError, match="no space left"):
        rounds(f, tmp_path / "run")
    survives(tmp_path / "run", f)
    charges = read_ledger(tmp_path / "run" / LEDGER)[1]
    assert sum(charge.settled_steps is None for c in range(4) for charge in charges.of(c).values()) >= 1
    assert [row["rounds_completed"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def survives(folder: Path, f: object) -> None:
    """Whatever is there is whole, and the ledger holds at least what the lines say."""
    ledger = open_ledger(folder / LEDGER, f) if (folder / LEDGER).exists() else None
    if (folder / "metrics.jsonl").exists():
        lines(folder / "metrics.jsonl")
    asked = lines(folder / "clients.jsonl") if (folder / "clients.jsonl").exists() else []
    for row in asked:
        assert ledger.spent(row["client_id"]) >= row["epsilon"]
        assert ledger.participations(row["client_id"]) >= row["participations"]
    for name in ("privacy.json", "summary.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text(encoding="utf-8"))
    if (folder / "adapter").exists():
        found = {path.name for path in (folder / "adapter").iterdir()}
        assert found == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


# Imports once, then forks one run after another and kills each the moment its files have come that far.
KILLER = """
    import os, signal, sys, time
    from pathlib import Path
    from fedlr.training.threads import torch_threads
    from fedlr.runs.directory import LEDGER
    from fedlr.simulations.ledgers import create_ledger
    from fedlr.simulations.simulate import run
    from tests.simulations.small_runs import SMALL, federation, quiet

    def lines(path):
        return path.read_bytes().count(b"\\n") if path.exists() else 0

    REACHED = {
        "reserved": lambda d: lines(d / "ledger.jsonl") >= 2,
        "settling": lambda d: lines(d / "ledger.jsonl") >= 5,
        "asked": lambda d: lines(d / "clients.jsonl") >= 1,
        "second": lambda d: lines(d / "ledger.jsonl") >= 9,
        "exported": lambda d: (d / "adapter.partial").exists() or (d / "adapter").exists(),
    }
    f = federation("num_rounds=4")
    for name, reached in REACHED.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        child = os.fork()
        if child == 0:
            with torch_threads(1):
                run(f, folder, ledger=create_ledger(f, folder / LEDGER), progress=quiet(f.experiment))
            os._exit(0)
        while not reached(folder):
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), name
"""


def test_a_run_that_is_killed_leaves_whole_files_and_a_ledger_that_counts(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLER), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    f = federation("num_rounds=4")
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["asked", "exported", "reserved", "second", "settling"]
    for folder in folders:
        survives(folder, f)
        ledger = open_ledger(folder / LEDGER, f)
        assert max(ledger.spent(client) for client in range(4)) > 0
        assert not (folder / "summary.json").exists()


def test_what_is_exported_is_the_last_state(tmp_path: Path) -> None:
    f = federation()
    before = read_adapter(f.model).fingerprint()
    rounds(f, tmp_path / "run")
    leave_state_behind(f, tmp_path / "run", f.start)
    assert f.start.adapter.fingerprint() in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert read_adapter(f.model).fingerprint() == before
