"""A whole federation on this machine: SuperLink, proxy, devices and server, each a process, over TLS with keys.

What runs are the commands an operator and an edge engineer type; here they are typed for them, in the right order, and
watched: whatever ends before the run is done is started again, as systemd would (deploy/).

    devices -> proxy (TLS, Fleet only) -> SuperLink (TLS, loopback) <- fedlr server run
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import make_folder
from fedlr.flower.node_key import OWNER_ONLY, write_new
from fedlr.simulations.devices import write_devices

# Nothing calls home, and nothing is installed or fetched while we run.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SUPERLINK, PROXY, SERVER = "superlink", "proxy", "server"
POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass
class Watched:
    """One process that is started again when it ends; its output is in a file."""

    name: str
    command: Sequence[str]
    log: Path
    num_starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, once more if it was started before."""
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process, which then ends the others in order.
            self.process = subprocess.Popen(
                list(self.command),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.num_starts += 1

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return None if self.process is None else self.process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to whatever it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self, *, patience_s: float = 10.0) -> None:
        """End it; after some patience, whether it wants or not."""
        if self.process is None:
            return
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.process.wait()


class Rehearsal:
    """A federation of processes for one experiment; a context manager that leaves none behind.

    Args:
        experiment: with runtime=superlink; its deployment section is filled in here.
        overrides: what the experiment was composed from, for the server's own command line.
        folder: of everything that is written: keys, devices, logs, and `run/`, the run's directory.
        say: told one line at a time.
        spare: see `write_devices`.
    """

    def __init__(
        self,
        experiment: Experiment,
        overrides: Sequence[str],
        folder: Path,
        *,
        say: Callable[[str], None],
        spare: float = 1.0,
    ) -> None:
        if experiment.seed is None:
            raise InputError("Expected a seed for a rehearsal, got null: devices and simulation share one partition")
        self.experiment, self.folder, self.say = experiment, folder.absolute(), say
        self.run_dir, self.keys, self.logs = self.folder / "run", self.folder / "keys", self.folder / "logs"
        self.superlink_address, self.address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self._overrides, self._spare = list(overrides), spare
        self.processes: dict[str, Watched] = {}
        self._told = 0  # bytes of the server's log
        self.settings: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def devices(self) -> list[Watched]:
        """The devices' processes, by client."""
        return [self.processes[path.stem] for path in self.settings]

    def watch(self, *, timeout_s: float) -> None:
        """Wait for the end of the run; restart what ends before.

        Raises:
            InputError: it took too long, or the server says that it cannot go on; the text ends as its log does.
        """
        deadline = time.monotonic() + timeout_s
        while not self.step():
            if time.monotonic() > deadline:
                raise InputError(f"Expected the run to end within {timeout_s:g} s, got none of it: {self._end(SERVER)}")
            time.sleep(POLL_S)

    def step(self) -> bool:
        """Start again what has ended, pass on what the server said; return whether the run is done."""
        server = self.processes[SERVER]
        self._pass_on(server.log)
        if server.code == 0:
            return True
        if server.code == 2:
            raise InputError(f"Expected the server to run, got: {self._end(SERVER)}")
        for process in self.processes.values():
            if process.code is not None:
                self.say(f"  {process.name} ended ({process.code}); it is started again")
                process.start()
        return False

    def stop(self) -> None:
        """End everything, the server first."""
        for name in [SERVER, *(path.stem for path in self.settings), PROXY, SUPERLINK]:
            if name in self.processes:
                self.processes[name].stop()

    def _start(self) -> None:
        make_folder(self.logs)
        e, keys = self.experiment, self.keys
        fedlr("server", "certificate", "--host", "127.0.0.1", "--host", "localhost", "--out", str(keys))
        secret = keys / "superexec.secret"
        write_new(secret, os.urandom(32).hex().encode(), mode=OWNER_ONLY)
        self._launch(SUPERLINK, superlink_command(self.superlink_address, keys, self.folder / "superlink.db"))
        self.say(f"SuperLink on {self.superlink_address}, this machine only")
        assert e.seed is not None
        self.settings = write_devices(
            e,
            self.folder / "devices",
            seed=e.seed,
            address=self.address,
            root_certificates=keys / "ca.crt",
            spare=self._spare,
        )
        wait_for_port(self.superlink_address)
        self._launch(PROXY, proxy_command(self.address, self.superlink_address, keys))
        for settings in self.settings:
            public = settings.with_suffix("") / "device.key.pub"
            superlink = ("--superlink", self.superlink_address, "--superlink-ca", str(keys / "ca.crt"))
            roster = ("--roster", str(keys / "roster.json"))
            fedlr("server", "enrol", *superlink, *roster, "--name", settings.stem, str(public))
        wait_for_port(self.address)
        self.say(f"proxy on {self.address}: devices reach the Fleet interface through it, and nothing else")
        for settings in self.settings:
            self._launch(settings.stem, [sys.executable, "-m", "fedlr", "client", "run", str(settings)])
        self.say(f"{len(self.settings)} devices, each with its own key, rows, policy and ledger")
        self._launch(SERVER, self.server_command())

    def server_command(self) -> list[str]:
        """Return the command that starts the run, and goes on with it."""
        where = [
            "deployment.rehearsal=true",
            f"deployment.superlink={self.superlink_address}",
            f"deployment.root_certificates={self.keys / 'ca.crt'}",
            f"deployment.superexec_secret={self.keys / 'superexec.secret'}",
            f"deployment.roster={self.keys / 'roster.json'}",
        ]
        run = [sys.executable, "-m", "fedlr", "server", "run", "--run-dir", str(self.run_dir)]
        return [*run, *self._overrides, *where]

    def _launch(self, name: str, command: Sequence[str]) -> None:
        self.processes[name] = Watched(name, command, self.logs / f"{name}.log")
        self.processes[name].start()

    def _pass_on(self, log: Path) -> None:
        with log.open("rb") as file:
            file.seek(self._told)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._told += len(whole + newline)
        for line in whole.decode(errors="replace").splitlines():
            self.say(line)

    def _end(self, name: str) -> str:
        lines = (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"{name} said nothing"


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that watches it is gone, however it went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def superlink_command(address: str, keys: Path, database: Path) -> list[str]:
    """Return Flower's server process: on loopback, with node keys, and with no process of its own making."""
    host, _, port = address.partition(":")
    certificates = [f"--ssl-{key}={keys / name}" for key, name in SUPERLINK_FILES.items()]
    return [
        str(Path(sys.executable).with_name("flower-superlink")),
        f"--host={host}",
        f"--port={port}",
        *certificates,
        "--enable-supernode-auth",
        f"--database={database}",
        "--isolation=process",
        f"--superexec-auth-secret-file={keys / 'superexec.secret'}",
        "--disable-runtime-dependency-installation",
    ]


SUPERLINK_FILES = {"ca-certfile": "ca.crt", "certfile": "superlink.crt", "keyfile": "superlink.key"}


def proxy_command(address: str, superlink: str, keys: Path) -> list[str]:
    """Return the public door."""
    own = ["--certificate", str(keys / "server.crt"), "--key", str(keys / "server.key")]
    behind = ["--superlink", superlink, "--superlink-ca", str(keys / "ca.crt")]
    return [sys.executable, "-m", "fedlr", "server", "proxy", "--listen", address, *own, *behind]


def fedlr(*words: str) -> None:
    """Run a fedlr command to its end.

    Raises:
        InputError: it failed; the text is its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fedlr", *words], capture_output=True, text=True, env={**os.environ, **QUIET}
    )
    if done.returncode != 0:
        raise InputError(f"Expected fedlr {' '.join(words[:2])} to work, got: {done.stderr.strip()[-300:]}")


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(address: str, *, timeout_s: float = 60.0) -> None:
    """Wait until somebody listens.

    Raises:
        InputError: nobody does in time.
    """
    host, _, port = address.partition(":")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(POLL_S)
    raise InputError(f"Expected something to listen on {address} within {timeout_s:g} s, got nothing; look at the logs")
