"""Whether this device can reach its server, trusts it and is known to it; for `fedlr client doctor`."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedlr.client.connection_errors import check_connection, diagnose, load_root_certificates
from fedlr.client.findings import Finding, found
from fedlr.client.settings import Settings
from fedlr.errors import InputError
from fedlr.flower.node_key import load_node_key

TIMEOUT_S = 10.0


def server_findings(settings: Settings, *, join: bool) -> Iterator[Finding]:
    """Look at the way to the server, the clock and the key, as far as each can be known.

    Args:
        join: ask the server whether it knows the key, which disturbs a client that runs with the same key.
    """
    try:
        date = date_of_server(settings)
    except InputError as error:
        yield Finding("server", str(error), is_ok=False)
        return
    yield Finding("server", f"{settings.server.address} answers over TLS, with a certificate that is trusted here")
    if date is not None:
        yield found("clock", clock_text, date)
    if join:
        yield found("key", membership_text, settings)


def date_of_server(settings: Settings) -> datetime | None:
    """Connect over TLS, trusting the named authorities alone, and return what the server takes for the time.

    None: it does not say. Nothing is signed and nothing is sent but a request for "/".

    Raises:
        InputError: it cannot be reached or trusted, with what to change.
    """
    address = settings.server.address
    trusted = ssl.create_default_context(
        cadata=load_root_certificates(settings.server.root_certificates).decode("ascii")
    )
    try:
        answer = httpx.get(f"https://{address}/", verify=trusted, timeout=TIMEOUT_S)
        return parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):  # no date, or none that can be read
        return None
    except (httpx.HTTPError, OSError) as error:
        raise InputError(diagnose(error, server=address)) from error


def clock_text(server: datetime, own: datetime | None = None) -> str:
    """Say how far this device's clock is from the server's, which compares it with every signature.

    Raises:
        InputError: it is outside what the server accepts.
    """
    ahead_s = ((own or datetime.now(UTC)) - server).total_seconds()
    text = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
    if not -TIMESTAMP_TOLERANCE <= ahead_s <= SYSTEM_TIME_TOLERANCE:
        raise InputError(f"{text}, which accepts -{TIMESTAMP_TOLERANCE} to +{SYSTEM_TIME_TOLERANCE} s; set it (NTP)")
    return f"{text} (accepted: -{TIMESTAMP_TOLERANCE} to +{SYSTEM_TIME_TOLERANCE} s)"


def membership_text(settings: Settings) -> str:
    """Join and leave again with this device's key.

    Raises:
        InputError: the server does not know the key, or takes it for online.
    """
    key = load_node_key(settings.server.private_key)
    node_id = check_connection(settings.server.address, load_root_certificates(settings.server.root_certificates), key)
    return f"enrolled: the server knows this key as node {node_id}"
