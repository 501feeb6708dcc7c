"""The proxy, ours or nginx, lets devices reach the Fleet API of a real SuperLink, and nothing else of it.

What is asked of both takes `doors`; without nginx on this machine its half is skipped. Mutants killed: a prefix
instead of a whole path; a limit that only believes Content-Length; a proxy that sends on what it was
not asked to; a log that repeats what it was sent.
"""

import http.client
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient

from fedlr.client.connection_errors import check_connection
from fedlr.errors import InputError
from fedlr.flower.node_key import create_node_key, load_node_key
from fedlr.server.certificates import write_certificates
from fedlr.server.enrol import SuperLink, register, unregister
from fedlr.server.proxy import proxy as proxy_command
from tests.server.live_superlink import Running, free_port, nginx, proxy, superlink, trusting

MEGABYTE = 2**20
Site = tuple[Running, Running]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with superlink(folder) as behind, proxy(folder, behind, "--max-body-mb", "2") as door:
        yield behind, door


@pytest.fixture(scope="module", params=["proxy", "nginx"])
def doors(request: pytest.FixtureRequest, site: Site) -> Iterator[Site]:
    if request.param == "proxy":
        yield site
    elif shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    else:
        with nginx(folder_of(site[0]), site[0], max_body_mb=2) as door:
            yield site[0], door


def folder_of(server: Running) -> Path:
    return server.log.parent


def connected(server: Running) -> ssl.SSLSocket:
    """TLS by the CA file alone: all that an outsider has who found a device."""
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    return trusting(folder_of(server) / "ca.crt").wrap_socket(plain, server_hostname="localhost")


def status_of(server: Running, request: bytes) -> int:
    """Send bytes as they are, and return the status of the answer, 0 for none."""
    with connected(server) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
        except (http.client.BadStatusLine, ConnectionError):
            return 0
        return answer.status


def asked(server: Running, path: str, method: str = "POST", *, host: str = "localhost") -> int:
    return status_of(server, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())


def routes(server: Running) -> list[tuple[str, str]]:
    """Every method and path that this SuperLink serves, by its own word."""
    with httpx.Client(verify=trusting(folder_of(server) / "ca.crt"), trust_env=False) as client:
        paths = client.get(f"https://{server.address}/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_the_control_api_is_open_to_whoever_holds_the_ca_file_unless_the_proxy_is_in_front(doors: Site) -> None:
    behind, door = doors
    ca = (folder_of(behind) / "ca.crt").read_bytes()
    with ControlHttpClient.from_server_address(behind.address, False, ca, interceptors=[]) as control:
        control.ListNodes(ListNodesRequest())  # the hole that the proxy is there for
    with (
        ControlHttpClient.from_server_address(door.address, False, ca, interceptors=[]) as control,
        pytest.raises(httpx.HTTPStatusError, match="404"),
    ):
        control.ListNodes(ListNodesRequest())


def test_of_all_routes_of_the_superlink_the_fleet_alone_passes(doors: Site) -> None:
    behind, door = doors
    found = routes(behind)
    apis = {path.split("/")[2] for _, path in found if path.startswith("/v1/")}
    assert apis >= {"fleet", "control", "runtime"} and len(found) > 40
    before = requests_seen(behind)
    for method, path in found:
        if (method, path) != ("GET", "/health"):
            answer = asked(door, path, method)
            assert (answer != 404) == path.startswith("/v1/fleet/"), path
    fleet = {path for _, path in found if path.startswith("/v1/fleet/")}
    assert {line.split()[1] for line in requests_seen(behind)[len(before) :]} == fleet


def requests_seen(server: Running) -> list[str]:
    """Request lines in the SuperLink's access log."""
    text = server.log.read_text(errors="replace")
    return [part.split('"')[1] for part in text.splitlines() if '"' in part and "HTTP/1.1" in part]


DISGUISES = [
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet//../control/list-nodes",
    "/v1/fleet/..\\control\\list-nodes",
    "/v1/fleet/x/../../control/list-nodes",
    "/v1/%66leet/../control/list-nodes",
    "//v1/control/list-nodes",
    "/V1/CONTROL/LIST-NODES",
    "/v1/control/list-nodes?/v1/fleet/pull-messages",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/",
    "https://localhost/v1/control/list-nodes",
    "http://localhost/v1/runtime/acquire-task",
    "*",
]


@pytest.mark.parametrize("path", DISGUISES)
def test_a_path_in_disguise_does_not_pass(doors: Site, path: str) -> None:
    behind, door = doors
    before = requests_seen(behind)
    assert asked(door, path) in (400, 404)
    assert requests_seen(behind) == before


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "PATCH"])
def test_only_post_passes(doors: Site, method: str) -> None:
    behind, door = doors
    before = requests_seen(behind)
    assert asked(door, "/v1/fleet/pull-messages", method) in (0, 400, 404, 405)
    assert requests_seen(behind) == before


def test_a_second_request_cannot_hide_in_the_first(doors: Site) -> None:
    behind, door = doors
    inner = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n"
    before = requests_seen(behind)
    for framing in (
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"Content-Length: 0\r\n\r\n",
    ):
        status_of(door, head + framing + inner)
    assert not [line for line in requests_seen(behind)[len(before) :] if "control" in line]


def test_an_enrolled_device_comes_in(doors: Site, tmp_path: Path) -> None:
    behind, door = doors
    ca = folder_of(behind) / "ca.crt"
    (node_id,) = register(SuperLink(behind.address, ca), [create_node_key(tmp_path / "key").read_text()])
    assert check_connection(door.address, ca.read_bytes(), load_node_key(tmp_path / "key")) == node_id
    unregister(SuperLink(behind.address, ca), [node_id])
    with pytest.raises(InputError, match="revoked"):
        check_connection(door.address, ca.read_bytes(), load_node_key(tmp_path / "key"))


def test_health_tells_whether_the_superlink_answers(site: Site) -> None:
    behind, door = site
    with httpx.Client(verify=trusting(folder_of(door) / "ca.crt"), trust_env=False) as client:
        answer = client.get(f"https://{door.address}/health")
        assert answer.status_code == 200 and answer.json() == {"proxy": "ok", "superlink": "ok"}
        with proxy(folder_of(door), Running(free_port(), 0, door.log)) as lonely:
            answer = client.get(f"https://{lonely.address}/health")
            assert answer.status_code == 503 and answer.json()["superlink"] == "no answer"
            assert client.post(f"https://{lonely.address}/v1/fleet/pull-messages").status_code == 502


def test_a_false_superlink_gets_nothing(site: Site, tmp_path: Path) -> None:
    behind, door = site
    write_certificates(tmp_path, ["localhost"])
    seen = requests_seen(behind)
    with proxy(tmp_path, behind) as distrustful, httpx.Client(verify=trusting(tmp_path / "ca.crt")) as client:
        assert client.post(f"https://{distrustful.address}/v1/fleet/pull-messages").status_code == 502
    assert requests_seen(behind) == seen


def chunks(num_bytes: int) -> Iterable[bytes]:
    for _ in range(num_bytes // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("num_bytes", "passes"), [(2 * MEGABYTE, True), (2 * MEGABYTE + 2**16, False)])
def test_a_body_over_the_limit_is_not_for_the_superlink(
    doors: Site, announced: bool, num_bytes: int, passes: bool
) -> None:
    behind, door = doors
    before = requests_seen(behind)
    headers = {"content-length": str(num_bytes)} if announced else {}
    with httpx.Client(verify=trusting(folder_of(door) / "ca.crt"), trust_env=False) as client:
        answer = client.post(f"https://{door.address}/v1/fleet/push-object", content=chunks(num_bytes), headers=headers)
    assert (answer.status_code != 413) == passes
    assert len(requests_seen(behind)) == len(before) + passes


def test_a_length_that_is_no_number_is_refused(doors: Site) -> None:
    for length in ("-1", "1e9", "0x10", "99999999999999999999"):
        request = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        assert status_of(doors[1], request.encode()) in (0, 400, 413)


def test_nothing_of_a_request_is_written_down(doors: Site) -> None:
    secret = b"planted-6f1c"
    head = b"POST /v1/fleet/%s HTTP/1.1\r\nHost: localhost\r\nFlwr-Signature: %s\r\nContent-Length: %d\r\n\r\n%s"
    assert status_of(doors[1], head % (b"pull-messages", secret, len(secret), secret)) >= 400
    assert status_of(doors[1], head % (secret + b"/x", secret, len(secret), secret)) == 404
    assert secret not in doors[1].log.read_bytes()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_and_frees_the_port(site: Site, ending: signal.Signals) -> None:
    with proxy(folder_of(site[1]), site[0]) as door, connected(door):
        os.kill(door.pid, ending)
        os.waitid(os.P_PID, door.pid, os.WEXITED | os.WNOWAIT)
        with socket.create_server(("127.0.0.1", door.port)):
            pass


def options(folder: Path, **changed: str) -> list[str]:
    given = {
        "listen": f"127.0.0.1:{free_port()}",
        "superlink": "localhost:1",
        "certificate": str(folder / "server.crt"),
        "key": str(folder / "server.key"),
        "superlink-ca": str(folder / "ca.crt"),
    } | changed
    return [word for name, value in given.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"listen": "8443"}, "Expected HOST:PORT"),
        ({"listen": "localhost:0"}, "Expected HOST:PORT"),
        ({"listen": "192.0.2.1:8443"}, "Expected to listen on"),
        ({"superlink": "http://localhost:8000"}, "Expected HOST:PORT"),
        ({"certificate": "none.crt"}, "Expected a certificate and its key"),
        ({"certificate": "FOLDER/superlink.crt"}, "Expected a certificate and its key"),
        ({"key": "FOLDER/server.crt"}, "chmod 600"),
        ({"key": "none.key"}, "Expected a private key"),
        ({"superlink-ca": "none.crt"}, "--superlink-ca"),
        ({"superlink-ca": "FOLDER/empty"}, "--superlink-ca"),
        ({"max-body-mb": "0"}, "--max-body-mb in [1, 1024]"),
        ({"max-body-mb": "many"}, "invalid int"),
        ({"requests-per-second": "nan"}, "--requests-per-second"),
        ({"max-connections-per-peer": "-1"}, "--max-connections-per-peer"),
        ({"superlink-insecure": "yes"}, "nrecognized arguments"),
    ],
)
def test_what_cannot_be_served_safely_is_refused_at_once(changed, expected, tmp_path: Path, capsys) -> None:
    write_certificates(tmp_path, ["localhost"])
    (tmp_path / "empty").touch()
    changed = {name: value.replace("FOLDER", str(tmp_path)) for name, value in changed.items()}
    assert proxy_command(options(tmp_path, **changed)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_an_address_in_use_is_refused(site: Site, capsys) -> None:
    assert proxy_command(options(folder_of(site[1]), listen=f"127.0.0.1:{site[1].port}")) == 2
    assert "Address already in use" in capsys.readouterr().err
