"""A flood of bodies from nobody in particular (R-S6): the proxy keeps it from the SuperLink's memory.

The SuperLink alone reads a body whole, twice over, before it asks who sent it. Mutant killed: a proxy without limits.
"""

import os
import shutil
import socket
import ssl
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.server.live_superlink import Running, nginx, proxy, spawned, superlink, trusting

MEGABYTE = 2**20


def connected(server: Running) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    return trusting(server.log.parent / "ca.crt").wrap_socket(plain, server_hostname="localhost")


def taken(server: Running, *, announced: bool) -> int:
    """Push a gigabyte at the door; return how many megabytes went before it shut."""
    head = "Content-Length: 1000000000" if announced else "Transfer-Encoding: chunked"
    block = bytes(MEGABYTE) if announced else b"100000\r\n" + bytes(MEGABYTE) + b"\r\n"
    num_blocks = 0
    try:
        with connected(server) as connection:
            connection.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
            while num_blocks < 953:
                connection.sendall(block)
                num_blocks += 1
    except OSError:
        pass
    return num_blocks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["proxy", "nginx"])
def test_a_flood_before_authentication_fills_neither_memory(kind: str, tmp_path: Path) -> None:
    """20 unauthenticated posts of 1 GB, then 40 of as much as passes: the SuperLink grows by less than 200 MB."""
    if kind == "nginx" and shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with superlink(tmp_path, start=spawned) as behind, door_of(kind, tmp_path, behind) as door:
        before = resident_mb(behind.pid)
        with ThreadPoolExecutor(20) as pool:
            went = list(pool.map(lambda number: taken(door, announced=number % 2 == 0), range(20)))
        if kind == "proxy":  # nginx reads on, and drops it, for five seconds
            assert max(went) < 50
        assert resident_mb(behind.pid, "VmHWM") - before < 10
        body, headers = os.urandom(6 * MEGABYTE - 1024), {"content-type": "application/protobuf"}

        def push(number: int) -> int:
            with httpx.Client(verify=trusting(tmp_path / "ca.crt"), trust_env=False, timeout=120) as client:
                url = f"https://{door.address}/v1/fleet/push-object"
                return client.post(url, content=body, headers=headers).status_code

        with ThreadPoolExecutor(40) as pool:
            statuses = Counter(pool.map(push, range(40)))
        assert statuses[400] >= 5 and set(statuses) <= {400, 502, 503}  # read, or no room for it
        assert resident_mb(behind.pid, "VmHWM") - before < 200
        assert resident_mb(door.pid, "VmHWM") < 600
        with httpx.Client(verify=trusting(tmp_path / "ca.crt"), trust_env=False) as client:
            assert client.get(f"https://{door.address}/health").status_code == 200


def door_of(kind: str, folder: Path, behind: Running) -> AbstractContextManager[Running]:
    if kind == "nginx":
        return nginx(folder, behind, max_body_mb=6)
    return proxy(folder, behind, "--max-connections-per-peer", "50", start=spawned)  # a memory of its own


def resident_mb(pid: int, field: str = "VmRSS") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
