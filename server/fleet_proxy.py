"""The one thing the proxy lets through: POST /v1/fleet/METHOD with a body that is not too large; the rest is refused.

A body is read to its end, or to the limit, before the SuperLink sees any of it: it would read it whole before it
asks who sent it. Only Flower's own headers are sent on, and nothing of a request is kept but a count.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterable

import httpx
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fedlr.server.proxy_limits import Limits, RateLimit, peer_of

FLEET = re.compile(rb"/v1/fleet/[a-z-]+")
HEALTH = b"/health"
FORWARDED = re.compile(r"flwr-[a-z0-9-]+|content-type|accept")  # both ways
DRAIN_S = 2.0


class Refused(Exception):
    """A request that is not read to its end: the status it gets, and why, for the counts."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class FleetProxy:
    """The ASGI application: one request in, the SuperLink's answer or a refusal out."""

    def __init__(self, superlink: httpx.AsyncClient, limits: Limits, counts: Counter[str]) -> None:
        self._superlink, self._limits, self._counts = superlink, limits, counts
        self._rate = RateLimit(limits.requests_per_second, limits.burst)
        self._held: Counter[str] = Counter()  # bytes of bodies in memory, by peer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            response = await self._answer(scope, receive)
        except Refused as refusal:
            self._counts[refusal.reason] += 1
            await refuse(refusal.status, scope, receive, send, drain=self._limits.max_body)
        else:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        peer = peer_of(scope["client"][0] if scope["client"] else "")
        if not self._rate.allows(peer):
            raise Refused(429, "rate")
        method, path = scope["method"], scope["raw_path"]
        if method == "GET" and path == HEALTH:
            return await self._health()
        if method != "POST" or not FLEET.fullmatch(path) or scope["query_string"]:
            raise Refused(404, "other path")
        headers, chunks = Headers(scope=scope), list[bytes]()
        try:
            await self._read(chunks, peer, headers, receive)
            body = b"".join(chunks)
            chunks[:] = [body]  # held once
            return await self._forward(path.decode("ascii"), body, headers)
        finally:
            self._held[peer] -= sum(map(len, chunks))
            self._held += Counter()  # forgets peers that hold nothing

    async def _read(self, chunks: list[bytes], peer: str, headers: Headers, receive: Receive) -> None:
        """Read a body that may be as large as the limit, however its length was announced."""
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._limits.max_body:
            raise Refused(413, "large body")
        num_bytes, more = 0, True
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise Refused(400, "cut off")
                    chunk, more = event.get("body", b""), event.get("more_body", False)
                    num_bytes += len(chunk)
                    if num_bytes > self._limits.max_body:
                        raise Refused(413, "large body")
                    self._held[peer] += len(chunk)
                    chunks.append(chunk)
                    if self._held.total() > self._limits.max_bodies or 2 * self._held[peer] > self._limits.max_bodies:
                        raise Refused(503, "memory for bodies")
        except TimeoutError:
            raise Refused(408, "slow body") from None

    async def _forward(self, path: str, body: bytes, headers: Headers) -> Response:
        """Return the SuperLink's answer, or a status after which Flower's client tries again."""
        try:
            answer = await self._superlink.post(path, content=body, headers=forwarded(headers.items()))
        except httpx.TransportError as error:
            status, reason = unanswered(error)
            self._counts[reason] += 1
            return Response(status_code=status)
        self._counts["passed"] += 1
        return Response(answer.content, answer.status_code, forwarded(answer.headers.items()))

    async def _health(self) -> Response:
        try:
            answer = await self._superlink.get("/health", timeout=2.0)
            alive = answer.is_success
        except httpx.TransportError:
            alive = False
        return JSONResponse({"proxy": "ok", "superlink": "ok" if alive else "no answer"}, 200 if alive else 503)


async def refuse(status: int, scope: Scope, receive: Receive, send: Send, *, drain: int) -> None:
    """Answer with a status alone and close the connection.

    Up to `drain` bytes of a body still on its way are read and dropped first: a connection closed on unread
    bytes is reset, and the sender would see that instead of the status.
    """
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-length", b"0"), (b"connection", b"close")],
    }
    await send(start)
    await send({"type": "http.response.body", "body": b"", "more_body": True})
    try:
        async with asyncio.timeout(DRAIN_S):
            event: Message = {"more_body": True}
            while drain > 0 and event.get("more_body", False):
                event = await receive()
                drain -= len(event.get("body", b""))
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def unanswered(error: httpx.TransportError) -> tuple[int, str]:
    """Return the status, and the reason for the counts, when the SuperLink did not answer."""
    match error:
        case httpx.PoolTimeout():
            return 503, "busy"
        case httpx.TimeoutException():
            return 504, "no answer from the SuperLink"
    return 502, "no SuperLink"


def forwarded(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Keep what Flower's two ends say to each other, and no hop-by-hop header, cookie or address.

    >>> forwarded([("flwr-timestamp", "now"), ("transfer-encoding", "chunked"), ("x-forwarded-for", "a lie")])
    {'flwr-timestamp': 'now'}
    """
    return {name: value for name, value in headers if FORWARDED.fullmatch(name)}
