"""SIGTERM ends a command as Ctrl-C does: exit code 143, a whole ledger, and a run that goes on as if nothing had been.

Mutants killed: a handler that nobody set (it is looked for first: the process of the tests would die); one that stays
after the command; another exit code.
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlr.config.schema import Experiment
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.runs.commands import Terminated, command, ending_by_signal
from fedlr.simulations import cli, simulate, sweep
from tests.simulations.small_runs import SMALL

WORDS = [*SMALL, "seed=3", "tracking.checkpoint_every=1"]
NOT_COMPARED = {"seconds", "train_s", "aggregate_s", "evaluate_s"}


def terminate_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Send SIGTERM to this process before the call of that number."""
    original, calls = getattr(owner, name), 0

    def called(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN), "it would kill the tests"
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, called)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli.simulate([*WORDS, f"tracking.output_dir={folder}"]) == 0
    return next(folder.glob("tiny/2*"))


PLACES: Sequence[tuple[Any, str, int]] = [
    (PrivacyLedger, "reserve", 2),
    (simulate, "metrics_row", 2),
    (simulate, "leave_behind", 1),
]


@pytest.mark.parametrize(("owner", "name", "number"), PLACES)
def test_a_run_that_is_terminated_is_whole_and_goes_on(
    owner: Any,
    name: str,
    number: int,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        terminate_at(patched, owner, name, number)
        assert cli.simulate([*WORDS, f"tracking.output_dir={tmp_path}"]) == 143
    assert "fedlr resume RUN_DIR" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    (run_dir,) = tmp_path.glob("tiny/2*")
    read_ledger(run_dir / "ledger.jsonl")  # every row of it, verified
    assert not (run_dir / "summary.json").exists()
    assert cli.resume([str(run_dir)]) == 0
    assert metrics(run_dir) == metrics(undisturbed)
    told, as_ever = (json.loads((path / "privacy.json").read_text()) for path in (run_dir, undisturbed))
    assert told["epsilon"] == as_ever["epsilon"]


def test_a_sweep_that_is_terminated_begins_no_other_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int | None] = []

    def run_job(experiment: Experiment, unfinished: Path | None, *, say: object) -> Path:
        begun.append(experiment.seed)
        os.kill(os.getpid(), signal.SIGTERM)
        return Path()

    monkeypatch.setattr(sweep, "run_job", run_job)
    assert cli.simulate([*SMALL, "-m", "seed=3,4"]) == 143
    assert begun == [3] and "--skip-done finishes what is left" in capsys.readouterr().out


Body = Callable[[list[str]], None]


def ended(body: Body) -> int:
    return command(body)([])


def test_it_is_raised_once_told_apart_from_ctrl_c_and_another_handler_stays() -> None:
    def terminated(arguments: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while what is in hand ends: not a second time

    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    assert ended(terminated) == 143 and ended(interrupted) == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with ending_by_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM] and issubclass(Terminated, KeyboardInterrupt)
