"""Every way not to be let in fails closed, with one sentence that says what to fix (against real SuperLinks).

Mutants killed: a client that does not verify the host, the dates or the authority; a SuperLink without node
authentication; a clock check that a wrong clock passes.
"""

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedlr.client.connection_errors import check_connection, diagnose, load_root_certificates
from fedlr.errors import InputError
from fedlr.flower.addresses import host_and_port
from fedlr.flower.node_key import create_node_key, load_node_key
from fedlr.server.certificates import write_certificates
from fedlr.server.enrol import SuperLink, register, unregister
from tests.server.live_superlink import QUIET, Running, free_port, proxy, superlink, trusting


@dataclass(frozen=True)
class Site:
    """A SuperLink with its proxy, and the folder of its certificates and of the keys of devices."""

    superlink: Running
    proxy: Running
    folder: Path

    @property
    def ca(self) -> bytes:
        return (self.folder / "ca.crt").read_bytes()

    def address(self, door: str) -> str:
        return getattr(self, door).address

    def node_statuses(self) -> set[str]:
        with ControlHttpClient.from_server_address(self.superlink.address, False, self.ca, interceptors=[]) as control:
            return {node.status for node in control.ListNodes(ListNodesRequest()).nodes_info}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    for name in ("enrolled", "stranger", "revoked"):
        create_node_key(folder / name)
    with superlink(folder) as behind, proxy(folder, behind) as door:
        control = SuperLink(behind.address, folder / "ca.crt")
        _, gone = register(control, [(folder / f"{name}.pub").read_text() for name in ("enrolled", "revoked")])
        unregister(control, [gone])
        yield Site(behind, door, folder)


def refusal(address: str, ca: bytes, key: Path) -> str:
    """What a device is told, checked to be one sentence."""
    with pytest.raises(InputError) as error:
        check_connection(address, ca, load_node_key(key))
    text = str(error.value)
    assert "\n" not in text and not re.search(r"[.!?] [A-Z]", text), text
    return text


DOORS = pytest.mark.parametrize("door", ["proxy", "superlink"])


@DOORS
def test_an_enrolled_device_comes_in_and_leaves_nothing_behind(site: Site, door: str) -> None:
    key = load_node_key(site.folder / "enrolled")
    node_ids = {check_connection(site.address(door), site.ca, key) for _ in range(2)}
    assert len(node_ids) == 1 and "online" not in site.node_statuses()


@DOORS
@pytest.mark.parametrize("name", ["stranger", "revoked"])
def test_a_key_that_is_not_enrolled_any_more_or_yet(site: Site, door: str, name: str) -> None:
    text = refusal(site.address(door), site.ca, site.folder / name)
    assert "never enrolled (send the operator its .pub line)" in text and "revoked (make a new key)" in text
    assert "online" not in site.node_statuses()


@DOORS
def test_a_stranger_cannot_enrol_itself(site: Site, door: str) -> None:
    with fleet_of(site, site.folder / "stranger", door) as fleet, pytest.raises(httpx.HTTPStatusError) as error:
        fleet.RegisterNode(RegisterNodeFleetRequest(public_key=public_pem(site.folder / "stranger")))
    assert "All SuperNodes must be registered" in diagnose(error.value, server=site.address(door))


@DOORS
@pytest.mark.parametrize(("off_s", "way"), [(600, "ahead of"), (-600, "behind"), (30, "ahead of")])
def test_a_clock_that_is_off(site: Site, door: str, off_s: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, off_s)
    text = refusal(site.address(door), site.ca, site.folder / "enrolled")
    found = re.search(rf"clock is (\d+) s {way} that of \S+: set it", text)
    assert found and abs(int(found[1]) - abs(off_s)) <= 2
    assert "online" not in site.node_statuses()


def test_a_clock_that_is_slow_within_the_window_is_no_hindrance(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, -250)
    assert check_connection(site.proxy.address, site.ca, load_node_key(site.folder / "enrolled"))


def set_clock(monkeypatch: pytest.MonkeyPatch, off_s: int) -> None:
    wrong = timedelta(seconds=off_s)
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: datetime.now(UTC) + wrong)


@DOORS
def test_a_server_of_another_authority(site: Site, door: str, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"])
    text = refusal(site.address(door), (tmp_path / "ca.crt").read_bytes(), site.folder / "enrolled")
    assert "not signed by this device's root certificates: ask the operator for the right ca.crt" in text


def test_a_server_under_another_name_or_address(site: Site, tmp_path: Path) -> None:
    text = refusal(f"127.0.0.1:{site.proxy.port}", site.ca, site.folder / "enrolled")
    assert "names other hosts" in text and "127.0.0.1" in text
    (site.folder / "other").mkdir()
    for name in ("ca.crt", "ca.key"):
        (site.folder / "other" / name).write_bytes((site.folder / name).read_bytes())
    (site.folder / "other" / "ca.key").chmod(0o600)
    write_certificates(site.folder / "other", ["fl.example.org"])
    with proxy(site.folder, site.superlink, certificate="other/server") as door:
        assert "'localhost'" in refusal(door.address, site.ca, site.folder / "enrolled")


def test_an_expired_certificate(site: Site, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"], days=1, now=datetime.now(UTC) - timedelta(days=2))
    with superlink(tmp_path) as expired:
        text = refusal(expired.address, (tmp_path / "ca.crt").read_bytes(), site.folder / "enrolled")
    assert "has expired by this device's clock" in text and "renew the certificate" in text


@DOORS
def test_plain_http_to_a_server_that_wants_tls(site: Site, door: str) -> None:
    address = site.address(door)
    with (
        FleetHttpClient.from_server_address(address, True, None, interceptors=[]) as fleet,
        pytest.raises(httpx.HTTPError) as error,
    ):
        fleet.ActivateNode(ActivateNodeRequest())
    assert "spoke plain HTTP" in diagnose(error.value, server=address)


def test_tls_to_a_server_that_has_none_or_is_not_there(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")).start()
        text = refusal(f"localhost:{listener.getsockname()[1]}", site.ca, site.folder / "enrolled")
    assert "does not speak TLS" in text
    assert "Nothing listens" in refusal(f"localhost:{free_port()}", site.ca, site.folder / "enrolled")
    assert "no address here" in refusal("no-such-host.invalid:8443", site.ca, site.folder / "enrolled")


def test_a_key_that_is_revoked_while_its_client_is_connected(site: Site, tmp_path: Path) -> None:
    line, control = (
        create_node_key(tmp_path / "key").read_text(),
        SuperLink(site.superlink.address, site.folder / "ca.crt"),
    )
    (node_id,) = register(control, [line])
    with fleet_of(site, tmp_path / "key") as fleet:
        fleet.ActivateNode(ActivateNodeRequest(public_key=public_pem(tmp_path / "key"), heartbeat_interval=30))
        fleet.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        unregister(control, [node_id])
        with pytest.raises(httpx.HTTPStatusError) as error:
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
    assert "the key was revoked" in diagnose(error.value, server=site.proxy.address)


def test_a_killed_client_is_back_at_once_if_it_knows_its_node_id(site: Site) -> None:
    key = site.folder / "enrolled"
    with fleet_of(site, key) as fleet:
        request = ActivateNodeRequest(public_key=public_pem(key), heartbeat_interval=30)
        node_id = fleet.ActivateNode(request).node_id  # and killed: never deactivated
    assert "was online" in refusal(site.proxy.address, site.ca, key)
    assert check_connection(site.proxy.address, site.ca, load_node_key(key), last_node_id=node_id) == node_id
    assert check_connection(site.proxy.address, site.ca, load_node_key(key), last_node_id=node_id) == node_id


@pytest.mark.parametrize(("words", "refused"), [((), range(14, 17)), (("--max-connections-per-peer", "96"), range(1))])
def test_26_devices_behind_one_address_are_told_of_the_limit_or_all_let_in(
    site: Site, tmp_path: Path, words: Sequence[str], refused: range
) -> None:
    """Each takes up to three connections: it asks, it says that it is there, it sends; 32 are enough for ten."""
    keys = [tmp_path / str(number) for number in range(26)]
    register(SuperLink(site.superlink.address, site.folder / "ca.crt"), [create_node_key(k).read_text() for k in keys])
    told = dict[int, str]()
    with proxy(site.folder, site.superlink, *words) as door, ExitStack() as held:
        for number, key in enumerate(keys):
            try:
                check_connection(door.address, site.ca, load_node_key(key))
            except InputError as error:
                told[number] = str(error)
                continue
            for _ in range(3):
                with suppress(OSError):  # the eleventh device's may be too many
                    plain = held.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=20))
                    held.enter_context(trusting(site.folder / "ca.crt").wrap_socket(plain, server_hostname="localhost"))
    assert len(told) in refused and min(told, default=10) >= 10
    assert [text for text in told.values() if "\n" in text or "--max-connections-per-peer (32)" not in text] == []


def fleet_of(site: Site, key: Path, door: str = "proxy") -> FleetHttpClient:
    private = load_node_key(key)
    signer = node_auth_http_interceptor.NodeAuthHttpInterceptor(private, private.public_key())
    return FleetHttpClient.from_server_address(site.address(door), False, site.ca, interceptors=[signer])


def public_pem(key: Path) -> bytes:
    return public_key_to_bytes(load_node_key(key).public_key())


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "not as a federation's server"), (413, "max-body-mb"), (429, "too many requests"), (500, "HTTP 500")]
    + [(status, "not the SuperLink behind it") for status in (502, 503, 504)],
)
def test_every_status_of_a_proxy_has_its_sentence(status: int, expected: str) -> None:
    request = httpx.Request("POST", "https://fl.example.org:8443/v1/fleet/pull-messages")
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))
    assert expected in diagnose(error, server="fl.example.org:8443")


def test_a_refusal_without_a_date_is_not_blamed_on_the_clock() -> None:
    request = httpx.Request("POST", "https://a:1", headers={TIMESTAMP_HEADER: "yesterday"})
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(401, request=request))
    assert "enrol this device's public key" in diagnose(error, server="a:1")


@pytest.mark.parametrize("server", ["https://fl.example.org:8443", "fl.example.org", ":8443", "a:b", "a:0", "a:8443/x"])
def test_an_address_that_is_none_is_refused(server: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        host_and_port(server)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_root_certificates_that_are_none_are_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(InputError, match="ask for ca.crt"):
        load_root_certificates(tmp_path / "ca.crt")


STOCK_CLIENT = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from fedlr.flower.node_key import load_node_key
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_connection import http_request_response
address, ca, key, off_s = sys.argv[1:]
node_auth_http_interceptor.now = lambda: datetime.now(UTC) + timedelta(seconds=int(off_s))
private = load_node_key(Path(key))
keys = (private, private.public_key())
with http_request_response(address, False, Path(ca).read_bytes(), keys, max_retries=0) as (node_id, *_):
    print("joined as", node_id)
"""


@pytest.mark.slow
def test_flowers_own_connection_fails_closed_too(site: Site, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"])
    good = (site.proxy.address, site.folder / "ca.crt", site.folder / "enrolled", 0)
    bad = [
        (site.proxy.address, tmp_path / "ca.crt", site.folder / "enrolled", 0),
        (f"127.0.0.1:{site.proxy.port}", site.folder / "ca.crt", site.folder / "enrolled", 0),
        *((site.proxy.address, site.folder / "ca.crt", site.folder / name, 0) for name in ("stranger", "revoked")),
        *((site.proxy.address, site.folder / "ca.crt", site.folder / "enrolled", off_s) for off_s in (-600, 600)),
    ]
    for arguments in [*bad, good]:
        command = [sys.executable, "-c", STOCK_CLIENT, *map(str, arguments)]
        ended = subprocess.run(command, env=QUIET, cwd=Path(__file__).parents[2], capture_output=True, timeout=60)
        assert (ended.returncode == 0) == (arguments is good), ended.stderr.decode()
        assert (b"joined" in ended.stdout) == (arguments is good)
        assert "online" not in site.node_statuses()
