"""The view as a server: its port, its health, its end."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from fedlr.errors import InputError
from fedlr.server.view.access import Token
from fedlr.server.view.gate import Gate
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2 import DESCRIPTOR
from fedlr.server.view.operator_pb2_grpc import add_OperatorViewServicer_to_server
from fedlr.server.view.service import OperatorView

# What the health protocol can be asked about: the whole server, and the service by its name.
SERVICES = ("", DESCRIPTOR.services_by_name["OperatorView"].full_name)
HEALTH_PERIOD_S = 1.0


def serve(
    run_dir: Path,
    *,
    host: str,
    port: int,
    token: Token,
    credentials: grpc.ServerCredentials | None,
    limits: Limits,
    started: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Show a run until `stop` is set; `started` is called with the port, the one that was free for port 0.

    Raises:
        InputError: if the address cannot be listened on.
    """
    threads = ThreadPoolExecutor(limits.max_calls, thread_name_prefix="view")
    server = grpc.server(
        threads,
        interceptors=[Gate(token, limits)],
        options=limits.server_options(),
        maximum_concurrent_rpcs=limits.max_calls,
    )
    add_OperatorViewServicer_to_server(OperatorView(run_dir, limits), server)
    health = HealthServicer()
    add_HealthServicer_to_server(health, server)
    report_health(health, run_dir)
    port = bind(server, host, port, credentials)
    server.start()
    try:
        started(port)
        while not stop.wait(HEALTH_PERIOD_S):
            report_health(health, run_dir)
    finally:
        server.stop(grace=None).wait()
        threads.shutdown()


def bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Listen on an address and return the port.

    Raises:
        InputError: if that cannot be done.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return int(server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address))
    except RuntimeError:
        raise InputError(
            f"Expected to listen on {address}, got a refusal: is the port taken, or the address not of this machine?"
        ) from None


def report_health(health: HealthServicer, run_dir: Path) -> None:
    """Say SERVING while the run directory can be read."""
    status = HealthCheckResponse.SERVING if is_readable(run_dir) else HealthCheckResponse.NOT_SERVING
    for service in SERVICES:
        health.set(service, status)


def is_readable(folder: Path) -> bool:
    """Say whether a folder can be listed."""
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return True
