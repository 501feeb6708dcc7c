"""How much a caller may ask for: sizes, rates and times, all bounded."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

MAX_PEERS = 1024


@dataclass(frozen=True)
class Limits:
    """Bounds of the service. Times in seconds, sizes in bytes."""

    requests_per_s: float = 5.0  # of one address, after a burst
    burst: int = 20
    max_calls: int = 64  # at a time, of all callers
    max_streams: int = 16  # of those, calls that go on: the rest is for questions with one answer
    max_connections: int = 256
    max_request_bytes: int = 4096
    max_message_bytes: int = 16 << 20  # a round with some 500,000 clients
    chunk_bytes: int = 1 << 20
    stall_s: float = 60.0  # a caller that does not read for as long is dropped
    idle_connection_s: float = 300.0  # a connection without a call
    handshake_s: float = 10.0
    ping_s: float = 30.0  # finds callers that are gone
    poll_s: float = 0.25  # of the run's files

    def server_options(self) -> list[tuple[str, int]]:
        """Return those that gRPC itself keeps, as channel arguments."""
        return [
            ("grpc.so_reuseport", 0),  # a second service on this port must fail, not take half of the calls
            ("grpc.max_receive_message_length", self.max_request_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", 8192),
            ("grpc.max_concurrent_streams", self.max_calls),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_connection_idle_ms", int(self.idle_connection_s * 1000)),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.ping_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.ping_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]


class RequestRate:
    """A token bucket for each address: a burst of requests, then so many a second."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock, self._lock = limits, clock, threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def allows(self, address: str) -> bool:
        """Take a request out of an address's bucket; False if it is empty."""
        limits = self._limits
        with self._lock:
            now = self._clock()
            left, then = self._buckets.pop(address, (float(limits.burst), now))
            left = min(float(limits.burst), left + (now - then) * limits.requests_per_s)
            allowed = left >= 1.0
            self._buckets[address] = (left - allowed, now)
            if len(self._buckets) > MAX_PEERS:
                self._buckets.popitem(last=False)
        return allowed


def address_of(peer: str) -> str:
    """Return the address of a gRPC peer without its port.

    >>> address_of("ipv4:127.0.0.1:53412"), address_of("ipv6:%5B::1%5D:53412")
    ('127.0.0.1', '::1')
    """
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
