"""Trackers get the numbers of metrics.jsonl and nothing else, and no run dies of one.

Mutants this file kills: a tracker that gets the configuration; a failing one that stops the run; a missing library that
is found after the rounds.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.runs import trackers
from fedlr.runs.trackers import check_tracker, numbers, tracked
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import SMALL, experiment


class Heard:
    """A tracker that remembers, and fails from a step on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.lines: dict[int, Mapping[str, float]] = {}
        self.fails_at, self.is_closed = fails_at, False

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route")
        self.lines[step] = values

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    tracker = Heard()
    monkeypatch.setattr(trackers, "OPENERS", {"tensorboard": lambda run_dir, is_offline: tracker})
    monkeypatch.setattr("fedlr.simulations.simulate.check_tracker", lambda name, is_offline: None)
    return tracker


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_the_numbers_of_every_line_and_nothing_else(heard: Heard, tmp_path: Path) -> None:
    e = experiment(f"tracking.output_dir={tmp_path}", "tracking.tracker=tensorboard", "tracking.run_no_privacy=true")
    run_dir = simulate(e, say=lambda line: None)
    assert heard.lines == {row["rounds_completed"]: numbers(row) for row in rows(run_dir)} and len(heard.lines) == 3
    assert heard.is_closed and all(isinstance(x, float) for line in heard.lines.values() for x in line.values())


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(heard: Heard, tmp_path: Path) -> None:
    heard.fails_at, said = 1, list[str]()
    run_dir = simulate(experiment(f"tracking.output_dir={tmp_path}", "tracking.tracker=tensorboard"), say=said.append)
    notes = [line for line in said if "gets nothing more of this run" in line]
    assert notes == ["note: tensorboard gets nothing more of this run (ConnectionError: no route)"]
    assert len(rows(run_dir)) == 3 and list(heard.lines) == [0]


def test_one_that_cannot_be_opened_or_closed_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(run_dir: Path, is_offline: bool) -> Heard:
        raise OSError("closed")

    said: list[str] = []
    monkeypatch.setattr(trackers, "OPENERS", {"wandb": closed})
    with tracked("wandb", tmp_path, is_offline=True, say=said.append) as line:
        line({"rounds_completed": 0, "accuracy": 0.5})
    assert said == ["note: wandb gets nothing more of this run (OSError: closed)"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_not_there_is_told_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError, match=rf"tracking.tracker={name} .*pip install 'fedlr\[{name}\]'"):
        simulate(experiment(f"tracking.output_dir={tmp_path}", f"tracking.tracker={name}"), say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_an_offline_run_sends_nothing_to_a_server_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI to be a folder .* got 'https://mlflow.example.org'"):
        check_tracker("mlflow", is_offline=True)
    check_tracker("mlflow", is_offline=False)


def test_other_runtimes_have_no_tracker() -> None:
    with pytest.raises(InputError, match="tracking.tracker=null with runtime=flower"):
        compose_experiment([*SMALL, "runtime=flower", "tracking.tracker=wandb"])


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an optional package: pip install 'fedlr[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = simulate(
        experiment(f"tracking.output_dir={tmp_path}", "tracking.tracker=tensorboard"), say=lambda line: None
    )
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("accuracy")}
    assert found == pytest.approx({row["rounds_completed"]: row["accuracy"] for row in rows(run_dir)})
    assert "seconds/train" in events.Tags()["scalars"]


def test_mlflow_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="an optional package: pip install 'fedlr[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracked("mlflow", tmp_path / "tiny" / "now", is_offline=True, say=pytest.fail) as line:
        line({"rounds_completed": 0, "accuracy": 0.5})
        line({"rounds_completed": 1, "accuracy": 0.75, "reasons": {}})
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("fedlr").experiment_id])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "accuracy")] == [0.5, 0.75]
    assert run.info.status == "FINISHED" and run.data.params == {}


def test_weights_and_biases_writes_into_the_run_when_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="an optional package: pip install 'fedlr[wandb]'")
    with tracked("wandb", tmp_path, is_offline=True, say=pytest.fail) as line:
        line({"rounds_completed": 0, "accuracy": 0.5})
    assert any(path.suffix == ".wandb" for path in tmp_path.rglob("*"))
