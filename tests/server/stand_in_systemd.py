"""Stands for systemd in tests: reads the very unit files, runs their ExecStart, and starts again what ends."""

import configparser
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.server.live_superlink import QUIET, ROOT


def service(unit: Path) -> dict[str, str]:
    """The [Service] section; of a key that stands twice, the last."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(unit.read_text().replace("\\\n", " "))
    return dict(parser["Service"])


def environment(text: str) -> dict[str, str]:
    """Variables of an EnvironmentFile; quotes around a value are taken off, as systemd does."""
    found = re.findall(r"^([A-Z_]+)=(.*)$", text, flags=re.MULTILINE)
    return {name: re.sub(r'^"(.*)"$', r"\1", value) for name, value in found}


@dataclass
class Unit:
    """One unit file, and its process."""

    name: str  # such as fedlr-server@ward
    folder: Path  # of unit files
    log: Path
    num_starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        template, _, instance = self.name.partition("@")
        path = self.folder / (f"{template}@.service" if instance else f"{template}.service")
        self.keys = service(path)
        variables = dict(os.environ) | QUIET | {"PYTHONPATH": str(ROOT)}
        for line in re.findall(r"^Environment(?:File)?=(.*)$", path.read_text(), flags=re.MULTILINE):
            line = line.replace("%i", instance)
            text = Path(line).read_text() if line.startswith("/") else "\n".join(line.split())
            variables |= environment(text)
        words = []
        for word in shlex.split(self.keys["ExecStart"]):
            word = word.replace("%i", instance)
            words += variables[word[1:]].split() if word.startswith("$") else [word]  # systemd splits at blanks
        home = Path(variables["HOME"]) if "WorkingDirectory" in self.keys else self.log.parent
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=variables, cwd=home, start_new_session=True
            )
        self.started, self.num_starts = time.monotonic(), self.num_starts + 1

    @property
    def code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    @property
    def is_down(self) -> bool:
        """Whether it has ended and systemd would start it again."""
        if self.code is None or time.monotonic() < self.started + 1:
            return False
        failed = self.code != 0 and str(self.code) not in self.keys.get("RestartPreventExitStatus", "").split()
        return self.keys["Restart"] == "always" or (self.keys["Restart"] == "on-failure" and failed)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Systemd:
    """Runs units; a context manager that leaves no process behind."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder, self.logs = folder, logs
        self.units: dict[str, Unit] = {}
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._watch = threading.Thread(target=self._restart, daemon=True)

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()
        for unit in reversed(self.units.values()):
            unit.stop()

    def start(self, name: str) -> None:
        unit = Unit(name, self.folder, self.logs / f"{name}.log")
        with self._lock:
            unit.start()
            self.units[name] = unit

    def _restart(self) -> None:
        while not self._ended.wait(0.1):
            with self._lock:
                for unit in self.units.values():
                    if unit.is_down:
                        unit.start()
