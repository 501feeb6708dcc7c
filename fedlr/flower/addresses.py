"""HOST:PORT, as a user types it for a server, a proxy or a view."""

from fedlr.errors import InputError


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        InputError: for anything else, a URL among it.

    >>> host_and_port("fl.example.org:8443"), host_and_port("[::1]:8443")
    (('fl.example.org', 8443), ('::1', 8443))
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or "/" in bare or (":" in bare and bare == host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"Expected HOST:PORT without https://, such as fl.example.org:8443, got {address!r}")
    return bare, int(port)
