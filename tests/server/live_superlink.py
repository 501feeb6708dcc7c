"""A real SuperLink (and other servers) on loopback for tests: started on a free port, ended by its process id."""

import getpass
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlr.server.certificates import write_certificates

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "NO_PROXY": "localhost,127.0.0.1",
}
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
SECRET = b"0123456789abcdef0123456789abcdef"


# Below what the system hands out to others, and other ones for every process of tests.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(20_000 + 500 * (_WORKER % 20), 20_500 + 500 * (_WORKER % 20)))


def free_port() -> int:
    """Return a port of loopback that nobody listens on, and that no other test is given meanwhile."""
    for port in _PORTS:
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


@dataclass(frozen=True)
class Running:
    """A server that listens: where, and as which process."""

    port: int
    pid: int
    log: Path

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"


def trusting(ca: Path) -> ssl.SSLContext:
    """Return what verifies servers by this authority alone."""
    return ssl.create_default_context(cafile=str(ca))


@contextmanager
def running(
    command: Sequence[str], *, port: int, log: Path, ending: signal.Signals = signal.SIGKILL
) -> Iterator[Running]:
    """Start a server, wait until it listens, end it and wait for its end."""
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)
    try:
        deadline = time.monotonic() + 240  # a busy machine may need a minute; one that ended is seen at once
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield Running(port, process.pid, log)
    finally:
        process.send_signal(ending)
        process.wait(30)


@contextmanager
def superlink(folder: Path, *arguments: str) -> Iterator[Running]:
    """Run a SuperLink as the recipes do: node authentication, secret, isolation, TLS with the folder's files."""
    if not (folder / "ca.crt").exists():
        write_certificates(folder, ["localhost"])
    secret, port = folder / "secret", free_port()
    secret.write_bytes(SECRET)
    command = [
        *(str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"),
        *("--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "superlink.crt")),
        *("--ssl-keyfile", str(folder / "superlink.key"), "--superexec-auth-secret-file", str(secret)),
        *("--enable-supernode-auth", *arguments),
    ]
    with running(command, port=port, log=folder / "superlink.log") as server:
        yield server


@contextmanager
def proxy(folder: Path, behind: Running, *arguments: str, certificate: str = "server") -> Iterator[Running]:
    """Run `fedlr server proxy` in front of a SuperLink of the same folder."""
    port = free_port()
    command = [
        *(sys.executable, "-c", "import sys; from fedlr.server.proxy import proxy; sys.exit(proxy(sys.argv[1:]))"),
        *("--listen", f"127.0.0.1:{port}", "--superlink", behind.address),
        *("--certificate", str(folder / f"{certificate}.crt"), "--key", str(folder / f"{certificate}.key")),
        *("--superlink-ca", str(folder / "ca.crt"), *arguments),
    ]
    with running(command, port=port, log=folder / f"proxy-{port}.log") as server:
        yield server


@contextmanager
def nginx(folder: Path, behind: Running, *, max_body_mb: int) -> Iterator[Running]:
    """Run deploy/nginx.conf in front of a SuperLink: other ports and paths, and a limit that is quick to reach."""
    port, text = free_port(), (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in {
        "listen [::]:8443 ssl;": "",
        "listen 8443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "127.0.0.1:8000": f"127.0.0.1:{behind.port}",
        "/etc/fedlr/proxy": str(folder),
        "client_max_body_size 6m": f"client_max_body_size {max_body_mb}m",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = f"daemon off; user {getpass.getuser()}; pid {folder}/nginx.pid; events {{}} http {{ {paths}\n{text} }}"
    (folder / "nginx.conf").write_text(whole)
    command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    with running(command, port=port, log=folder / f"nginx-{port}.log", ending=signal.SIGTERM) as server:
        yield server
