"""Processes of a test that are forked from one that has imported everything (`fork_server.py`): 0.1 s a start, not 8.

Each has a session, environment, folder and log of its own, is killed and waited for as any, and runs the command it is
given to the interpreter's end. What differs from a command that is typed: no import, and one hash seed for all. The
commands as they are typed are started by tests/test_nothing_calls_home.py and tests/server/test_recipes.py.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import InputError
from fedlr.simulations import loopback
from fedlr.simulations.loopback import QUIET

ROOT = Path(__file__).parents[2]
POLL_S = 0.02


class ForkServer:
    """The process that forks, asked by one test at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.server.fork_server"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
        )
        self._one_at_a_time = threading.Lock()
        atexit.register(self.close)

    def ask(self, **asked: Any) -> Any:
        """Return the answer to one question."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and with it what it forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@functools.cache
def fork_server() -> ForkServer:
    """Return the one of this process of tests, started when it is first needed."""
    return ForkServer()


class Forked:
    """A process, as `subprocess.Popen` has it: `pid`, `poll`, `wait`, `send_signal`, `kill`."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self.args, self.returncode = list(command), None
        words = [str(word) for word in command]
        log.open("ab").close()  # it is there from the first moment, as with Popen
        self.pid: int = fork_server().ask(command=words, log=str(log), environment=dict(env), folder=str(cwd))

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        if self.returncode is None:
            self.returncode = fork_server().ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when there is one.

        Raises:
            subprocess.TimeoutExpired: there was none in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and timeout is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


@contextmanager
def rehearsals() -> Iterator[None]:
    """Fork what a `Rehearsal` starts."""

    def start(watched: loopback.Watched) -> None:
        process = Forked(watched.command, log=watched.log, env={**os.environ, **QUIET}, cwd=Path.cwd())
        watched.process, watched.num_starts = process, watched.num_starts + 1  # type: ignore[assignment]

    def fedlr(*words: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            log, command = Path(folder) / "log", [sys.executable, "-m", "fedlr", *words]
            if Forked(command, log=log, env={**os.environ, **QUIET}, cwd=Path.cwd()).wait(60) != 0:
                raise InputError(f"Expected fedlr {' '.join(words[:2])} to work, got: {log.read_text()[-300:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopback.Watched, "start", start)
        patch.setattr(loopback, "fedlr", fedlr)
        yield
