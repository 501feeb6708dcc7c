"""What one peer may ask of the proxy before anybody knows who it is: connections, header bytes, requests a second.

uvicorn bounds none of the first two, and the SuperLink reads a whole body before it authenticates its sender.
"""

import asyncio
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """What the proxy lets through.

    Args:
        max_body: bytes of one request; Flower cuts arrays into objects of 5 MiB, so 6 MiB fit everything.
        max_bodies: bytes of all requests that are being read or answered; one peer gets half of them.
        max_forwarded: requests that the SuperLink has at once; it holds each body four times over.
        max_connections: open connections of all peers.
        max_peer_connections: open connections of one peer; a client needs 3. A peer is an IPv4 address or an
            IPv6 /64, so devices behind one address translation share their limits.
        requests_per_second: of one peer, on average; a client needs 6 when idle.
        burst: requests that one peer may send at once.
        max_header: bytes of a request's URL and headers.
        header_timeout_s: from the start of a connection, or of a request, to the end of its headers.
        body_timeout_s: from there to the end of the body.
        answer_timeout_s: from there to the SuperLink's answer.
    """

    max_body: int = 6 * MEGABYTE
    max_bodies: int = 128 * MEGABYTE
    max_forwarded: int = 4
    max_connections: int = 1000
    max_peer_connections: int = 32
    requests_per_second: float = 200.0
    burst: int = 1000
    max_header: int = 16 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    answer_timeout_s: float = 30.0


def peer_of(address: str) -> str:
    """Return whom a limit counts: the address, or for IPv6 its /64, which one site has as a whole.

    >>> peer_of("2001:db8::7"), peer_of("192.0.2.1"), peer_of("::ffff:192.0.2.1")
    ('2001:db8::/64', '192.0.2.1', '192.0.2.1')
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)


class RateLimit:
    """A token bucket a peer, of the `max_peers` seen last.

    Args:
        per_second: tokens that a peer gets back.
        burst: tokens that it can hold.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        *,
        max_peers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second, self._burst, self._max_peers, self._clock = per_second, burst, max_peers, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer: (tokens, when)

    def allows(self, peer: str) -> bool:
        """Take a token of the peer's, if it has one.

        >>> limit = RateLimit(1.0, 2, clock=lambda: 0.0)
        >>> [limit.allows("a") for _ in range(3)], limit.allows("b")
        ([True, True, False], True)
        """
        now = self._clock()
        tokens, since = self._buckets.pop(peer, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - since) * self._per_second)
        self._buckets[peer] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > self._max_peers:
            self._buckets.popitem(last=False)
        return tokens >= 1


def limited_protocol(limits: Limits, refused: Counter[str]) -> type[HttpToolsProtocol]:
    """Return uvicorn's HTTP protocol with bounds on connections, header bytes and the time headers take.

    Args:
        refused: gets a count by reason; a connection over a bound is closed without an answer.
    """
    open_connections: Counter[str] = Counter()

    class LimitedProtocol(HttpToolsProtocol):
        peer = ""
        in_header = True
        header_bytes = 0
        deadline: asyncio.TimerHandle

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.peer = peer_of(self.client[0] if self.client else "")
            open_connections[self.peer] += 1
            self.deadline = self.loop.call_later(limits.header_timeout_s, self.refuse, "slow header")
            if open_connections[self.peer] > limits.max_peer_connections:
                self.refuse("connections of a peer")
            elif open_connections.total() > limits.max_connections:
                self.refuse("connections")

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.deadline.cancel()
            open_connections[self.peer] -= 1
            if not open_connections[self.peer]:
                del open_connections[self.peer]

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.in_header:  # still: the parser keeps a header line without end to itself
                self.count(len(data))

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.in_header, self.header_bytes = True, 0
            self.deadline.cancel()
            self.deadline = self.loop.call_later(limits.header_timeout_s, self.refuse, "slow header")

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self.count(len(name) + len(value))

        def on_headers_complete(self) -> None:
            self.in_header = False
            self.deadline.cancel()
            if not self.transport.is_closing():
                super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing() and self.cycle.more_body:
                self.transport.abort()  # close() would go on to read what was refused, for half a minute

        def shutdown(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()  # close() would wait for the goodbye of a client that is asleep
            else:
                super().shutdown()

        def count(self, num_bytes: int) -> None:
            self.header_bytes += num_bytes
            if self.header_bytes > limits.max_header and not self.transport.is_closing():
                self.refuse("large header")

        def refuse(self, reason: str) -> None:
            refused[reason] += 1
            self.deadline.cancel()
            self.transport.abort()

    return LimitedProtocol
