"""Why a device cannot reach its server, in one sentence that says what to do; everything here fails closed.

TLS errors are told apart by OpenSSL's verify codes, refusals by the SuperLink's status and error codes
(flwr 1.41: 412 with code 2004 for a key that may not join now, 401 for a signature outside -5 to +305 s).
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    HEARTBEAT_PATIENCE,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlr.errors import InputError
from fedlr.flower.addresses import host_and_port

EXPIRED, NOT_YET_VALID = 10, 9
UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
WRONG_HOST = (62, 64)
ONLINE_FOR_S = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL  # how long the server believes in a silent device


def check_connection(
    server: str, root_certificates: bytes, key: ec.EllipticCurvePrivateKey, *, last_node_id: int | None = None
) -> int:
    """Join and leave again; return the node id by which the server knows this key.

    Call it before `flwr.supernode.fleet_http_connection.http_request_response`, which ends the whole process on
    a refusal, by SIGINT or by exit. It leaves nothing behind.

    Args:
        server: HOST:PORT.
        root_certificates: PEM, as `load_root_certificates` returns it.
        last_node_id: what an earlier call returned. The session that a killed client with this key left behind
            is ended first; otherwise the server refuses the key until that client has been silent for 60 s.

    Raises:
        InputError: with what `diagnose` says.
    """
    host_and_port(server)
    public_key = public_key_to_bytes(key.public_key())
    interceptors = [NodeAuthHttpInterceptor(key, key.public_key())]
    request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    try:
        with FleetHttpClient.from_server_address(server, False, root_certificates, interceptors) as fleet:
            if last_node_id is not None:
                _leave(fleet, last_node_id)
            node_id = int(fleet.ActivateNode(request).node_id)
            fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
            return node_id
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise InputError(diagnose(error, server=server)) from error


def refusal_now(
    server: str, root_certificates: bytes, key: ec.EllipticCurvePrivateKey, *, node_id: int
) -> httpx.HTTPStatusError | None:
    """Ask the server to end a session that is over, and return how it refused the signature; None where it did not."""
    interceptors = [NodeAuthHttpInterceptor(key, key.public_key())]
    try:
        with FleetHttpClient.from_server_address(server, False, root_certificates, interceptors) as fleet:
            fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except httpx.HTTPStatusError as error:
        return error if error.response.status_code == httpx.codes.UNAUTHORIZED else None
    except (httpx.HTTPError, OSError, ValueError):
        return None
    return None


def is_shut_out(error: BaseException) -> bool:
    """Say whether a server that let this device in does not any more: it refuses a signature made by a right clock."""
    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code != httpx.codes.UNAUTHORIZED:
        return False
    ahead_s = _seconds_ahead(error)
    return ahead_s is not None and -TIMESTAMP_TOLERANCE <= ahead_s <= SYSTEM_TIME_TOLERANCE


def load_root_certificates(path: Path) -> bytes:
    """Read the authorities that this device trusts.

    Raises:
        InputError: if the file cannot be read or holds no certificate.
    """
    try:
        content = path.read_bytes()
        x509.load_pem_x509_certificates(content)
        content.decode("ascii")
    except OSError as error:
        raise InputError(f"Expected root certificates in {path}, got {error.strerror}; ask for ca.crt") from None
    except ValueError:
        raise InputError(f"Expected PEM certificates in {path}, got something else; ask for ca.crt") from None
    return content


def diagnose(error: BaseException, *, server: str) -> str:
    """Say in one sentence why a call to the server failed and what to do about it.

    Args:
        error: what the call raised; its causes are looked at too.
        server: HOST:PORT, for the sentence.
    """
    if _spoke_plain_http(error):
        return f"This device spoke plain HTTP to {server}, which is refused: remove insecure and name root certificates"
    for cause in causes_of(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return _of_certificate(cause, server)
            case ssl.SSLError():
                reason = cause.reason or cause
                return f"{server} does not speak TLS ({reason}): check the port, it must be that of the server's proxy"
            case httpx.HTTPStatusError():
                return _of_status(cause, server)
            case socket.gaierror():
                return f"The host of {server} has no address here: check the name, then this device's DNS"
            case ConnectionRefusedError():
                return f"Nothing listens on {server}: check the port, then ask the operator whether the proxy runs"
            case httpx.TimeoutException() | TimeoutError():
                return f"{server} did not answer in time: check the network, and firewalls on the way to that port"
    first = str(error).partition("\n")[0] or "no further text"
    return (
        f"The connection to {server} failed ({type(error).__name__}: {first}): check the network; where more than ten "
        "devices share an address, ask the operator to raise the proxy's --max-connections-per-peer (32)"
    )


def _leave(fleet: FleetHttpClient, node_id: int) -> None:
    """End a session that may have ended already; what is wrong with the connection shows at the next call."""
    with suppress(httpx.HTTPStatusError):
        fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


def _of_certificate(error: ssl.SSLCertVerificationError, server: str) -> str:
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if error.verify_code == EXPIRED:
        return (
            f"The certificate of {server} has expired by this device's clock ({now}): set the clock if it is wrong, "
            "else ask the operator to renew the certificate with `fedlr server certificate`"
        )
    if error.verify_code == NOT_YET_VALID:
        return f"The certificate of {server} begins after this device's clock ({now}): set the clock, it is behind"
    if error.verify_code in WRONG_HOST:
        return (
            f"The certificate of {server} names other hosts ({error.verify_message.rstrip('.')}): connect by a name "
            "that it has, or ask the operator for one made with `--host` and this name"
        )
    if error.verify_code in UNKNOWN_AUTHORITY:
        return (
            f"The certificate of {server} is not signed by this device's root certificates: "
            "ask the operator for the right ca.crt, and do not connect before you have it"
        )
    return f"The certificate of {server} cannot be trusted ({error.verify_message}): ask the operator for a new one"


def _of_status(error: httpx.HTTPStatusError, server: str) -> str:
    status = error.response.status_code
    refusal = FlowerError.from_json(_text(error.response))
    if status == httpx.codes.UNAUTHORIZED:
        return _of_signature(error, server)
    if refusal is not None and refusal.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            f"{server} does not let this device's key join: it was never enrolled (send the operator its .pub line), "
            "or was revoked (make a new key), or a client with it is or just was online (stop that one, and wait "
            f"{ONLINE_FOR_S} s)"
        )
    if refusal is not None:
        return f"{server} refused this device (code {refusal.code}: {refusal.message}): ask the operator"
    match status:
        case httpx.codes.NOT_FOUND:
            return f"{server} answers, but not as a federation's server: check the host and the port"
        case httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            return f"The proxy of {server} found a message too large: ask the operator to raise --max-body-mb"
        case httpx.codes.TOO_MANY_REQUESTS:
            return f"The proxy of {server} counts too many requests from this address: wait, or ask to raise its limit"
        case httpx.codes.BAD_GATEWAY | httpx.codes.SERVICE_UNAVAILABLE | httpx.codes.GATEWAY_TIMEOUT:
            return f"The proxy of {server} answers, but not the SuperLink behind it (HTTP {status}): wait, then ask"
    return f"{server} answered HTTP {status}, which this client does not expect: ask the operator for the server's log"


def _of_signature(error: httpx.HTTPStatusError, server: str) -> str:
    ahead_s = _seconds_ahead(error)
    if ahead_s is not None and not -TIMESTAMP_TOLERANCE <= ahead_s <= SYSTEM_TIME_TOLERANCE:
        way = "ahead of" if ahead_s > 0 else "behind"
        return f"This device's clock is {abs(ahead_s):.0f} s {way} that of {server}: set it (NTP), then try again"
    return (
        f"{server} refused this device's signature although its clock is right: the key was revoked or "
        "enrolled anew, or a proxy on the way drops headers; ask the operator to enrol this device's public key"
    )


def _seconds_ahead(error: httpx.HTTPStatusError) -> float | None:
    """How far the signed timestamp was ahead of the server's Date, to 1 s; None without either."""
    try:
        signed_at = datetime.fromisoformat(error.request.headers[TIMESTAMP_HEADER])
        answered_at = parsedate_to_datetime(error.response.headers["date"])
        return (signed_at - answered_at).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None


def _spoke_plain_http(error: BaseException) -> bool:
    """Whether the other side answered a request without TLS by hanging up or by an error."""
    if not isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.HTTPStatusError):
        return False
    try:
        return error.request.url.scheme == "http"
    except RuntimeError:
        return False


def _text(response: httpx.Response) -> str:
    try:
        return response.text
    except httpx.ResponseNotRead:
        return ""


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
