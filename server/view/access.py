"""Who may ask: the shared token, and the addresses that need TLS."""

import hmac
import ipaddress
import ssl
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import grpc

from fedlr.errors import InputError
from fedlr.flower.node_key import require_private

MIN_TOKEN_LENGTH = 32
AUTHORIZATION = "authorization"


class Token:
    """A secret that every caller sends with every call. Its value is in no text of this object."""

    def __init__(self, value: str) -> None:
        self._value = value

    def matches(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Say whether a call carries the token; takes the same time whatever it carries."""
        sent = [value for key, value in metadata if key == AUTHORIZATION]
        # Hashed, because compare_digest tells lengths apart; == on the count says only what the caller knows.
        return len(sent) == 1 and hmac.compare_digest(_digest(sent[0]), _digest(self._header))

    def metadata(self) -> list[tuple[str, str]]:
        """Return what a caller sends along."""
        return [(AUTHORIZATION, self._header)]

    @property
    def _header(self) -> str:
        return f"Bearer {self._value}"


def read_token(path: Path) -> Token:
    """Read a token: one word of at least 32 characters in a file that only its owner may read.

    Raises:
        InputError: for anything else; the text does not hold the token.
    """
    make = f"make one: (umask 077; openssl rand -hex 32 > {path})"
    if not path.is_file():
        raise InputError(f"Expected --token-file to be a file, got {str(path)!r}; {make}")
    require_private(path)
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        raise InputError(f"Expected a token of plain letters and digits in {path}, got other bytes; {make}") from None
    if len(words) != 1 or len(words[0]) < MIN_TOKEN_LENGTH or not words[0].isprintable():
        lengths = [len(word) for word in words]
        raise InputError(
            f"Expected one word of {MIN_TOKEN_LENGTH} or more characters in {path}, got words of {lengths}; {make}"
        )
    return Token(words[0])


def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine only.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.7", "fl.example.org")]
    [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_credentials(host: str, certificate: Path | None, key: Path | None) -> grpc.ServerCredentials | None:
    """Return the TLS identity of the service; None for plain text, which loopback alone may have.

    Raises:
        InputError: without a certificate on another address, or for a pair that TLS cannot use.
    """
    if certificate is None or key is None:
        if certificate is not key:
            raise InputError("Expected --certificate and --key together, got one of them")
        if not is_loopback(host):
            raise InputError(f"Expected --certificate and --key for an address that is not loopback, got {host!r}")
        return None
    require_private(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror
        raise InputError(f"Expected a certificate and its key in {certificate} and {key}, got {reason}") from None
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])


def _digest(value: str | bytes) -> bytes:
    return sha256(value.encode() if isinstance(value, str) else value).digest()
