"""A real view on loopback for tests: TLS, a token, and a run directory that the test writes as a server does."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedlr.runs.directory import append_lines, write_json
from fedlr.server.certificates import write_certificates
from fedlr.server.view.access import Token, server_credentials
from fedlr.server.view.connection import ViewAddress
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2_grpc import OperatorViewStub
from fedlr.server.view.serving import serve

SECRET = "0123456789abcdef" * 4
HASTY = Limits(poll_s=0.01, requests_per_s=1000.0, burst=1000)


@dataclass(frozen=True)
class RunWriter:
    """A run directory, written in the order in which a server writes it."""

    path: Path

    def configure(self, *, num_rounds: int = 3) -> None:
        text = json.dumps({"name": "ward", "method": {"name": "fedsvd"}, "num_rounds": num_rounds})
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def clients(self, rounds_completed: int, **refused: str) -> None:
        append_lines(self.path / "clients.jsonl", client_lines(rounds_completed, refused))

    def metrics(self, rounds_completed: int, *, num_refused: int = 0, accuracy: float | None = None) -> None:
        append_lines(self.path / "metrics.jsonl", [metrics_line(rounds_completed, num_refused, accuracy)])

    def round(self, rounds_completed: int) -> None:
        self.metrics(rounds_completed)
        if rounds_completed:
            self.clients(rounds_completed)

    def end(self) -> None:
        write_json(self.path / "summary.json", {"num_rounds": 3})


@dataclass(frozen=True)
class Certificates:
    """Of one authority, as `fedlr server certificate` makes them."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.folder / "server.crt", self.folder / "server.key"


def metrics_line(rounds_completed: int, num_refused: int, accuracy: float | None) -> dict[str, Any]:
    scores = {"accuracy": rounds_completed / 10 if accuracy is None else accuracy, "loss": None}
    epsilons = {"epsilon_max": rounds_completed / 2, "epsilon_median": rounds_completed / 4, "epsilon_min": 0.0}
    counts = {
        "num_trained": (2 if rounds_completed else 0) - num_refused,
        "num_refused": num_refused,
        "num_rejected": 0,
    }
    return {"rounds_completed": rounds_completed, **scores, **epsilons, **counts, "singular_values": {}}


def client_lines(rounds_completed: int, refused: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for client in (3, 8):
        reason = refused.get(f"client_{client}")
        yield {
            "round_index": rounds_completed - 1,
            "client_id": client,
            "status": "refused" if reason else "trained",
            "reason": reason,
            "epsilon": 0.5,
            "seconds": 12.5,
        }


def token_file(folder: Path, *, secret: str = SECRET) -> Path:
    path = folder / f"{secret[:4]}.token"
    path.touch(mode=0o600)
    path.write_text(secret + "\n", encoding="ascii")
    return path


def new_certificates(folder: Path) -> Certificates:
    write_certificates(folder, ["127.0.0.1"])
    return Certificates(folder)


@contextmanager
def shown(
    run_dir: Path, certificates: Certificates | None = None, *, limits: Limits = HASTY, port: int = 0
) -> Iterator[ViewAddress]:
    """Serve a run directory from a thread of this process; yield where, with what a caller needs."""
    token = Token(SECRET)
    pair = certificates.pair if certificates else (None, None)
    credentials = server_credentials("127.0.0.1", *pair)
    listening, stop, ports = threading.Event(), threading.Event(), []

    def started(port: int) -> None:
        ports.append(port)
        listening.set()

    kept = {"token": token, "credentials": credentials, "limits": limits, "started": started, "stop": stop}
    thread = threading.Thread(target=serve, args=[run_dir], kwargs={"host": "127.0.0.1", "port": port, **kept})
    thread.start()
    try:
        assert listening.wait(20)
        yield ViewAddress("127.0.0.1", ports[0], token, certificates.ca if certificates else None)
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def asked(address: ViewAddress) -> Iterator[tuple[OperatorViewStub, dict[str, Any]]]:
    """Yield a stub and what each call needs besides its request: the token, and a limit so that no test hangs."""
    with address.connected() as stub:
        yield stub, {"metadata": address.token.metadata(), "timeout": 20}


def refused(address: ViewAddress, call: str, request: Any, **kept: Any) -> tuple[str, str]:
    """Make a call that must fail; return its code and its details."""
    with asked(address) as (stub, usual), pytest.raises(grpc.RpcError) as failure:
        answer = getattr(stub, call)(request, **{**usual, **kept})
        list(answer)
    return failure.value.code().name, failure.value.details()
