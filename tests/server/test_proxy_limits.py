"""What one peer may take from the proxy: each limit bites, and what stays below it is served.

Mutants killed: a limit per process instead of per peer; a header without end; memory for bodies that is never given
back; a header of the sender's own that reaches the SuperLink.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from fedlr.server.certificates import write_certificates
from fedlr.server.fleet_proxy import FleetProxy
from fedlr.server.proxy import Door, report, serve
from fedlr.server.proxy_limits import Limits, RateLimit
from tests.server.live_superlink import free_port, trusting

PULL = "http://proxy/v1/fleet/pull-messages"


def through(answer: Callable[[httpx.Request], Awaitable[httpx.Response]], limits: Limits, counts: Counter[str]):
    """A client whose requests go through the proxy's application to a SuperLink that answers like this."""
    behind = httpx.AsyncClient(base_url="https://superlink", transport=httpx.MockTransport(answer))
    return httpx.AsyncClient(transport=httpx.ASGITransport(FleetProxy(behind, limits, counts)))


async def echo(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=request.content, headers={"set-cookie": "a=b", "content-type": "x/y"})


def test_a_peer_that_asks_too_often_waits_and_another_does_not() -> None:
    now = 0.0
    limit = RateLimit(2.0, 3, max_peers=2, clock=lambda: now)
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("b")
    now = 0.5
    assert [limit.allows("a") for _ in range(2)] == [True, False]
    now = 100.0
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("c") and limit.allows("b")  # a is the one forgotten


def test_too_many_requests_are_429_and_counted() -> None:
    async def scenario() -> list[int]:
        async with through(echo, Limits(burst=2, requests_per_second=0.001), counts) as client:
            return [(await client.post(PULL)).status_code for _ in range(3)]

    counts: Counter[str] = Counter()
    assert asyncio.run(scenario()) == [200, 200, 429]
    assert counts == {"passed": 2, "rate": 1}


def test_flowers_headers_alone_are_sent_on_both_ways() -> None:
    seen: dict[str, str] = {}

    async def behind(request: httpx.Request) -> httpx.Response:
        seen.update(request.headers)
        return await echo(request)

    async def scenario() -> httpx.Response:
        sent = {"flwr-timestamp": "now", "content-type": "application/protobuf", "accept": "application/protobuf"}
        other = {"x-forwarded-for": "192.0.2.1", "cookie": "a=b", "authorization": "Bearer x", "host": "evil"}
        async with through(behind, Limits(), Counter()) as client:
            return await client.post(PULL, content=b"body", headers=sent | other)

    answer = asyncio.run(scenario())
    assert answer.content == b"body" and answer.headers["content-type"] == "x/y" and "set-cookie" not in answer.headers
    assert seen["flwr-timestamp"] == "now" and seen["accept"] == seen["content-type"] == "application/protobuf"
    assert not {"x-forwarded-for", "cookie", "authorization"} & seen.keys() and seen["host"] == "superlink"


def test_memory_for_bodies_is_shared_and_given_back() -> None:
    held, free = asyncio.Event(), asyncio.Event()

    async def behind(request: httpx.Request) -> httpx.Response:
        held.set()
        await free.wait()
        return await echo(request)

    async def scenario() -> list[int]:
        async with through(behind, Limits(max_body=8, max_bodies=20), Counter()) as client:
            first = asyncio.create_task(client.post(PULL, content=b"12345678"))
            await held.wait()
            statuses = [(await client.post(PULL, content=b"12345678")).status_code]
            free.set()
            statuses.append((await first).status_code)
            return statuses + [(await client.post(PULL, content=b"12345678")).status_code for _ in range(3)]

    assert asyncio.run(scenario()) == [503, 200, 200, 200, 200]


@pytest.mark.parametrize(
    ("error", "status"), [(httpx.ConnectError, 502), (httpx.ReadTimeout, 504), (httpx.PoolTimeout, 503)]
)
def test_a_superlink_that_fails_is_an_answer_that_flower_retries(error: type[httpx.HTTPError], status: int) -> None:
    async def behind(request: httpx.Request) -> httpx.Response:
        raise error("")

    async def scenario() -> int:
        async with through(behind, Limits(), Counter()) as client:
            return (await client.post(PULL)).status_code

    assert asyncio.run(scenario()) == status


def test_the_report_is_a_line_of_counts_and_silent_when_nothing_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlr.server.proxy.REPORT_S", 0.01)
    lines: list[str] = []

    async def scenario() -> None:
        reports = asyncio.create_task(report(Counter(passed=3, rate=1), lines.append))
        while not lines:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # time for lines that must not come
        reports.cancel()

    asyncio.run(scenario())
    assert lines == ["last minute: 3 passed, 1 rate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    write_certificates(folder, ["localhost"])
    return folder


Connect = Callable[[], Awaitable[tuple]]


@asynccontextmanager
async def served(folder: Path, limits: Limits) -> AsyncIterator[Connect]:
    """The proxy in this process, in front of nothing; gives a way to connect to it."""
    door = Door(
        listen=f"127.0.0.1:{free_port()}",
        certificate=folder / "server.crt",
        key=folder / "server.key",
        superlink=f"localhost:{free_port()}",
        superlink_ca=folder / "ca.crt",
    )
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(door, limits, say=lambda line: ready.set()))
    await ready.wait()
    port = int(door.listen.split(":")[1])
    verify = trusting(folder / "ca.crt")
    try:
        yield lambda: asyncio.open_connection("localhost", port, ssl=verify)
    finally:
        serving.cancel()
        await asyncio.wait([serving])


def conversation(folder: Path, limits: Limits, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Everything that comes back for some bytes, sent one part after the other; b"" for a connection cut off."""

    async def scenario() -> bytes:
        async with served(folder, limits) as connect:
            reader, writer = await connect()
            try:
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
                return await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)
            except TimeoutError:
                return b"no end"
            except (OSError, asyncio.IncompleteReadError):
                return b""
            finally:
                writer.transport.abort()

    return asyncio.run(scenario())


HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n"
QUICK = Limits(header_timeout_s=0.5, body_timeout_s=0.5, max_header=4096)


def test_what_keeps_to_the_limits_is_served(folder: Path) -> None:
    assert b"502" in conversation(
        folder, Limits(max_header=4096), HEAD, b"Flwr-X: " + bytes(2000).hex()[:3000].encode() + b"\r\n\r\n"
    )


def test_a_peer_cannot_say_that_it_is_another(folder: Path) -> None:
    async def scenario() -> list[bytes]:
        async with served(folder, Limits(burst=2, requests_per_second=0.001)) as connect:
            reader, writer = await connect()
            lines = []
            for number in range(3):
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 192.0.2.%d\r\n\r\n" % number)
                lines.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
                if lines[-1] == b"503":
                    await reader.readexactly(len('{"proxy":"ok","superlink":"no answer"}'))
            writer.transport.abort()
            return lines

    assert asyncio.run(scenario()) == [b"503", b"503", b"429"]


def test_headers_that_do_not_end_are_cut_off(folder: Path) -> None:
    assert conversation(folder, QUICK) == b""
    assert conversation(folder, QUICK, HEAD) == b""
    assert conversation(folder, QUICK, *[b"P", b"O", b"S", b"T"] * 4, pause_s=0.1) == b""
    endless = Limits(header_timeout_s=60, max_header=4096)
    assert conversation(folder, endless, HEAD + b"X: ", *[b"x" * 1000] * 8) == b""
    assert conversation(folder, endless, HEAD, *[b"X: y\r\n" * 100] * 20) == b""


def test_a_body_that_does_not_come_is_408(folder: Path) -> None:
    assert b"408" in conversation(folder, Limits(body_timeout_s=0.5), HEAD + b"Content-Length: 10\r\n\r\n12345")


@pytest.mark.parametrize("limits", [Limits(max_peer_connections=3), Limits(max_connections=3)])
def test_a_connection_too_many_is_cut_off_until_another_ends(folder: Path, limits: Limits) -> None:
    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b"503" in await reader.readuntil(b"\r\n")
        except (OSError, asyncio.IncompleteReadError):
            return False

    async def answered_if_let_in(connect: Connect) -> bool:
        try:
            return await answered(*await connect())
        except (OSError, ssl.SSLError):
            return False

    async def scenario() -> list[bool]:
        async with served(folder, limits) as connect:
            ends = [await connect() for _ in range(3)]
            seen = [await answered(*end) for end in ends]
            seen.append(await answered_if_let_in(connect))
            ends[0][1].transport.abort()
            while not await answered_if_let_in(connect):
                await asyncio.sleep(0.01)  # until the server has seen that it ended
            return seen

    assert asyncio.run(scenario()) == [True, True, True, False]
