"""A caller's side of the view: the address, a channel that carries the token, and failures as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

from fedlr.errors import InputError
from fedlr.server.view.access import Token, is_loopback
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2_grpc import OperatorViewStub

ANSWER_S = 20.0
CERTIFICATE_PROBLEMS = {
    "CERTIFICATE_VERIFY_FAILED": "a certificate that {authority} did not sign, or that has ended",
    "Hostname Verification Check failed": "a certificate for another host name",
    "WRONG_VERSION_NUMBER": "plain text; start the view with --certificate and --key, or leave --ca out on loopback",
}


@dataclass(frozen=True)
class ViewAddress:
    """Where a view is and how to be admitted. Without `ca` on loopback the channel is plain text."""

    host: str
    port: int
    token: Token
    ca: Path | None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @contextmanager
    def connected(self) -> Iterator[OperatorViewStub]:
        """Open a connection; calls still need `metadata=` of the token."""
        with open_channel(self) as channel:
            yield OperatorViewStub(channel)


def open_channel(address: ViewAddress) -> grpc.Channel:
    """Open a channel: plain text to loopback without a CA file, else TLS, by the system's authorities without one.

    Raises:
        InputError: if the CA file cannot be read.
    """
    options = [
        ("grpc.enable_http_proxy", 0),  # the token goes to the view and to nobody between
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", Limits.max_message_bytes),
        ("grpc.keepalive_time_ms", int(Limits.ping_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(Limits.ping_s * 1000)),
    ]
    if address.ca is None and is_loopback(address.host):
        return grpc.insecure_channel(str(address), options)
    try:
        roots = None if address.ca is None else address.ca.read_bytes()
    except OSError as error:
        raise InputError(
            f"Expected --ca to be a file of certificates, got {str(address.ca)!r}: {error.strerror}"
        ) from None
    return grpc.secure_channel(str(address), grpc.ssl_channel_credentials(roots), options)


def refuse(error: grpc.RpcError, address: ViewAddress) -> NoReturn:
    """Raise what a caller can do about a failed call.

    Raises:
        InputError: always.
    """
    code, details = error.code(), printable(error.details() or "")
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            got = "a refusal of the token; use the --token-file that the view was started with"
        case grpc.StatusCode.UNAVAILABLE:
            authority = address.ca or "the system's authorities"
            known = [text for sign, text in CERTIFICATE_PROBLEMS.items() if sign in details]
            got = known[0].format(authority=authority) if known else f"no connection ({details}); {_hint(address)}"
        case grpc.StatusCode.NOT_FOUND | grpc.StatusCode.DATA_LOSS | grpc.StatusCode.RESOURCE_EXHAUSTED:
            got = details
        case _:
            got = f"{code.name}: {details}"
    raise InputError(f"Expected an answer of the view at {address}, got {got}") from None


def printable(text: str) -> str:
    """Return text of a server so that a terminal shows it and obeys nothing in it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _hint(address: ViewAddress) -> str:
    plain = address.ca is None and is_loopback(address.host)
    return "is it running, and does it use TLS (--ca)?" if plain else "is it running, and does it use TLS?"
