"""Federations in processes of their own: started, warmed, then told to train; an error of any of them is fatal.

A process runs `fedlr.simulations.bench.worker` and answers one JSON line for each line that it is told. So ours and the
rival each have their own interpreter, allocator and threads, and wait without using the processor while the other
works.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.simulations.bench.outcome import BenchmarkFailed

CLIENTS_A_MESSAGE = 4  # small enough that two processes end together
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    # Nothing here may call home.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Process:
    """One federation in a process of its own."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", dir=scratch)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedlr.simulations.bench.worker", str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            BenchmarkFailed: the process answered with an error, or not at all.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended: {self._last_words()}"}
        if "error" in answer:
            raise BenchmarkFailed(f"{self.name}, asked to {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_words(self) -> str:
        self._process.wait(timeout=20)
        self._errors.seek(0)
        return f"exit code {self._process.returncode}, {self._errors.read()[-2000:].strip() or 'nothing said'}"


class Contestant:
    """One federation in one process, or the same one in several that share out its clients.

    Several processes take clients from one queue, a few at a time, as the workers of a pool do: the time is that of the
    last one to end.
    """

    def __init__(self, name: str, scratch: Path, overrides: Sequence[str], *, num_processes: int = 1) -> None:
        self.name = name
        self.told: dict[str, Any] = {}  # what the first process says of its federation
        self._folder = Path(tempfile.mkdtemp(dir=scratch))
        with ExitStack() as stack:
            self._processes = [
                stack.enter_context(Process(f"{name} {n}" if num_processes > 1 else name, self._folder))
                for n in range(num_processes)
            ]
            answers = self._all("assemble", [{"overrides": list(overrides)}] * num_processes)
            self.told = answers[0]
            self._stack = stack.pop_all()

    def train(self, round_index: int, clients: Sequence[int], *, keep: str = "") -> None:
        """Train these clients in one round; with `keep`, leave their tensors in files of that name."""
        if len(self._processes) == 1:
            self._processes[0].ask("train", round_index=round_index, clients=list(clients), keep=keep)
            return
        waiting: SimpleQueue[list[int]] = SimpleQueue()
        for start in range(0, len(clients), CLIENTS_A_MESSAGE):
            waiting.put(list(clients[start : start + CLIENTS_A_MESSAGE]))

        def work(process: Process) -> None:
            while True:
                try:
                    some = waiting.get_nowait()
                except Empty:
                    return
                process.ask("train", round_index=round_index, clients=some, keep=keep)

        in_threads([(work, (process,)) for process in self._processes])

    def updates(self, keep: str) -> dict[int, dict[Slot, Tensor]]:
        """Return the tensors that `train` left under a name, by client, and delete the files."""
        found = {}
        for path in sorted(self._folder.glob(f"*/{keep}-*.safetensors")):
            found[int(path.stem.rpartition("-")[2])] = by_slot(load_file(path))
            path.unlink()
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask the only process."""
        (process,) = self._processes
        return process.ask(do, **arguments)

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self, do: str, arguments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in self._processes]

        def ask(place: int) -> None:
            answers[place] = self._processes[place].ask(do, **arguments[place])

        in_threads([(ask, (place,)) for place in range(len(self._processes))])
        return answers


def in_threads(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """Make all calls at once and wait for the last; the first error of any is raised."""
    errors: list[BaseException] = []

    def call(function: Any, arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=one) for one in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def by_slot(tensors: Mapping[str, Tensor]) -> dict[Slot, Tensor]:
    """Return tensors by slot from a file that `worker.by_name` wrote."""
    return {Slot(*name.rsplit("|", 1)): tensor for name, tensor in tensors.items()}
