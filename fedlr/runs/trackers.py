"""Curves elsewhere: the numbers of metrics.jsonl, line by line, to TensorBoard, Weights & Biases or MLflow by name.

Each through its own library, which is imported only here and only when it is asked for. Nothing is sent that
metrics.jsonl does not hold: no configuration, no text, no name of a label; a run is called as its folder. With
`runtime.offline` everything stays on this machine. A tracker that fails is said once and then left alone: no run dies
of a chart, and metrics.jsonl has it all.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedlr.errors import InputError
from fedlr.errors.messages import one_line

PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "fedlr"
STEP = "rounds_completed"
Line = Callable[[Mapping[str, Any]], None]


class Tracker(Protocol):
    """Where the numbers of a run go."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the numbers of one line."""

    def close(self) -> None:
        """Send what is left."""


def check_tracker(name: str | None, *, is_offline: bool) -> None:
    """Refuse a tracker whose library is not there, or that would leave this machine in an offline run.

    Raises:
        InputError: which says what to install or to change.
    """
    if name is None:
        return
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise InputError(
            f"Expected tracking.tracker={name} with its library installed, got none: pip install 'fedlr[{name}]', or "
            f"pip install {PACKAGES[name]}"
        )
    if name == "mlflow" and is_offline and not is_local(uri := os.environ.get("MLFLOW_TRACKING_URI", "")):
        raise InputError(
            f"Expected MLFLOW_TRACKING_URI to be a folder or file: with runtime.offline=true, got {uri!r}: unset it, "
            "or set runtime.offline=false"
        )


def is_local(uri: str) -> bool:
    """Return whether an address of MLflow is on this machine's disk; without one it is.

    >>> is_local("./mlruns"), is_local("file:///srv/mlruns"), is_local("https://mlflow.example.org")
    (True, True, False)
    """
    return "://" not in uri or uri.startswith(("file:", "sqlite:"))


def numbers(row: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by dotted name; lists, texts and what is null are left out.

    >>> numbers({"accuracy": 0.5, "loss": None, "seconds": {"train": 2}, "confusion": [[1]]})
    {'accuracy': 0.5, 'seconds.train': 2.0}
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and not prefix:
            found |= numbers(value, prefix=f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and f"{prefix}{key}" != STEP:
            found[f"{prefix}{key}"] = float(value)
    return found


def nowhere(row: Mapping[str, Any]) -> None:
    """Send a line of metrics.jsonl nowhere."""


@contextmanager
def tracked(name: str | None, run_dir: Path, *, is_offline: bool, say: Callable[[str], None]) -> Iterator[Line]:
    """Give what sends a line of metrics.jsonl; of a run that goes on all lines are sent again, so curves are whole."""
    tracker = None
    if name is not None:
        try:
            tracker = OPENERS[name](run_dir, is_offline)
        except Exception as error:
            _give_up(name, error, say=say)

    def line(row: Mapping[str, Any]) -> None:
        nonlocal tracker
        if tracker is not None:
            try:
                tracker.log(numbers(row), step=row[STEP])
            except Exception as error:
                tracker = None
                _give_up(str(name), error, say=say)

    try:
        yield line
    finally:
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                _give_up(str(name), error, say=say)


def _give_up(name: str, error: Exception, *, say: Callable[[str], None]) -> None:
    say(f"note: {name} gets nothing more of this run ({type(error).__name__}: {one_line(error)[:200]})")


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir outputs`."""

    def __init__(self, run_dir: Path, is_offline: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=0)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Write the numbers of one line."""
        for key, value in values.items():
            self._writer.add_scalar(key.replace(".", "/", 1), value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline it lies in the run's folder, for `wandb sync`."""

    def __init__(self, run_dir: Path, is_offline: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=f"{run_dir.parent.name}/{run_dir.name}",
            dir=str(run_dir),
            mode="offline" if is_offline else None,
            # Else it sends the command line, the commit, the host and what the terminal shows.
            settings=wandb.Settings(
                disable_git=True, disable_code=True, console="off", x_disable_meta=True, x_disable_stats=True
            ),
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the numbers of one line."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in mlflow.db of the output folder."""

    def __init__(self, run_dir: Path, is_offline: bool) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir.parents[1] / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment_id = found.experiment_id if found else self._client.create_experiment(PROJECT)
        run = self._client.create_run(experiment_id, run_name=f"{run_dir.parent.name}/{run_dir.name}")
        self._run_id: str = run.info.run_id

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the numbers of one line."""
        for key, value in values.items():
            self._client.log_metric(self._run_id, key, value, step=step)

    def close(self) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._run_id)


OPENERS: Mapping[str, Callable[[Path, bool], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
