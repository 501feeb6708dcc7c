"""`fedlr server proxy`: the one door of a federation: TLS in front, and behind it the Fleet API alone.

Flower 1.41 serves devices, the control of runs and the tasks of runs on one port, and the last two ask for no
identity: whoever holds the CA file could start a run of any code. So the SuperLink listens on loopback, and this
proxy stands in front of it. It writes down counts, never a body, a header or a path. docs/operator.md says when to
take nginx instead.
"""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn
from cryptography import x509

from fedlr.errors import InputError
from fedlr.flower.addresses import host_and_port
from fedlr.flower.node_key import require_private
from fedlr.runs.commands import Options, command
from fedlr.server.fleet_proxy import FleetProxy
from fedlr.server.proxy_limits import MEGABYTE, Limits, limited_protocol

KEEP_ALIVE_S = 15  # longer than Flower's client keeps an idle connection (5 s), so that the client closes first
UPSTREAM_KEEP_ALIVE_S = 2.0  # shorter than the SuperLink keeps one (5 s), for the same reason
REPORT_S = 60.0


@dataclass(frozen=True)
class Door:
    """Where the proxy listens, as whom, and what is behind it."""

    listen: str
    certificate: Path
    key: Path
    superlink: str
    superlink_ca: Path


@command
def proxy(arguments: list[str]) -> None:
    """Let devices reach the SuperLink, and nothing else: fedlr server proxy --listen HOST:PORT --superlink HOST:PORT

    --certificate FILE --key FILE   this server's, from `fedlr server certificate`
    --superlink-ca FILE             the authority that signed the SuperLink's certificate
    --max-body-mb N                 largest request, 6 by default, which holds any of Flower's
    --max-connections-per-peer N    32 by default: raise it where more than ten devices share an address
    --requests-per-second N         of one address on average, 200 by default
    """
    options, defaults = Options(), Limits()
    for name in ("--listen", "--superlink"):
        options.add_argument(name, required=True)
    for name in ("--certificate", "--key", "--superlink-ca"):
        options.add_argument(name, type=Path, required=True)
    options.add_argument("--max-body-mb", type=int, default=defaults.max_body // MEGABYTE)
    options.add_argument("--max-connections-per-peer", type=int, default=defaults.max_peer_connections)
    options.add_argument("--requests-per-second", type=float, default=defaults.requests_per_second)
    chosen = options.parse_args(arguments)
    require_range("--max-body-mb", chosen.max_body_mb, 1, 1024)
    require_range("--max-connections-per-peer", chosen.max_connections_per_peer, 1, 1000)
    require_range("--requests-per-second", chosen.requests_per_second, 1, 1e6)
    limits = Limits(
        max_body=chosen.max_body_mb * MEGABYTE,
        max_bodies=max(defaults.max_bodies, 8 * chosen.max_body_mb * MEGABYTE),
        max_peer_connections=chosen.max_connections_per_peer,
        requests_per_second=chosen.requests_per_second,
        burst=int(max(defaults.burst, 2 * chosen.requests_per_second)),
    )
    door = Door(chosen.listen, chosen.certificate, chosen.key, chosen.superlink, chosen.superlink_ca)
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()) as runner:
        runner.run(serve(door, limits, say=lambda line: print(line, flush=True)))


async def serve(door: Door, limits: Limits, *, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        say: gets a line at the start, and one a minute in which requests came.

    Raises:
        InputError: before anything is served, for files that do not fit each other or an address in use.
    """
    host_and_port(door.superlink)
    check_certificate(door.certificate, door.key)
    counts: Counter[str] = Counter()
    async with to_superlink(door, limits) as client:
        config = uvicorn.Config(
            FleetProxy(client, limits, counts),
            http=limited_protocol(limits, counts),
            ws="none",
            lifespan="off",
            ssl_certfile=door.certificate,
            ssl_keyfile=door.key,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
            access_log=False,
            log_config=None,  # the default one would close every handler of this process
            log_level="error",
            server_header=False,
            proxy_headers=False,
        )
        with listening(door.listen) as listener:
            say(f"proxy on {door.listen}: POST /v1/fleet/ goes to {door.superlink}, GET /health is answered, no more")
            reports = asyncio.create_task(report(counts, say))
            try:
                await uvicorn.Server(config).serve(sockets=[listener])
            finally:
                reports.cancel()


@asynccontextmanager
async def to_superlink(door: Door, limits: Limits) -> AsyncIterator[httpx.AsyncClient]:
    """Open the way to the SuperLink: TLS verified by its authority alone, no proxy of the environment, few at once."""
    try:
        verify = ssl.create_default_context(cafile=str(door.superlink_ca))
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"Expected --superlink-ca to be PEM certificates, got {door.superlink_ca}: {error}") from None
    async with httpx.AsyncClient(
        base_url=f"https://{door.superlink}",
        verify=verify,
        trust_env=False,
        timeout=limits.answer_timeout_s,
        headers={"accept-encoding": "identity"},
        limits=httpx.Limits(
            max_connections=limits.max_forwarded,
            max_keepalive_connections=limits.max_forwarded,
            keepalive_expiry=UPSTREAM_KEEP_ALIVE_S,
        ),
    ) as client:
        yield client


def check_certificate(certificate: Path, key: Path) -> None:
    """Refuse a server certificate that no client would trust now, or a key that others may read.

    Raises:
        InputError: naming the file.
    """
    require_private(key)
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise InputError(f"Expected a certificate and its key in {certificate} and {key}, got {error}") from None
    until = found.not_valid_after_utc
    if until < datetime.now(UTC):
        raise InputError(
            f"Expected a valid certificate in {certificate}, got one that ended {until:%Y-%m-%d}; renew it"
        )


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high].

    Raises:
        InputError: naming the option.
    """
    if not low <= value <= high:
        raise InputError(f"Expected {name} in [{low:g}, {high:g}], got {value:g}")


def listening(address: str) -> socket.socket:
    """Open the port, so that an address in use is said before anything else happens.

    Raises:
        InputError: if it cannot be opened.
    """
    host, port = host_and_port(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise InputError(f"Expected to listen on {address}, got {error.strerror or error}") from None


async def report(counts: Counter[str], say: Callable[[str], None]) -> None:
    """Say a line a minute about what passed and what did not, as long as something comes."""
    while True:
        await asyncio.sleep(REPORT_S)
        if counts:
            say("last minute: " + ", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
            counts.clear()
