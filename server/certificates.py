"""A certificate authority of one's own, and the two server certificates of a federation that it signs.

`server.crt` names the hosts that devices and operators connect to (the proxy, the operator's view);
`superlink.crt` names loopback alone, for the SuperLink behind the proxy, so that the two processes can run as
different users with different keys. Devices get `ca.crt`; `ca.key` is needed for renewal only and belongs offline.
All keys are EC (RFC 5480), all files new, private keys of mode 0600 (requirement R-S7).
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlr.errors import InputError
from fedlr.flower.node_key import OWNER_ONLY, READ_BY_ALL, refuse_existing, require_private, write_new
from fedlr.runs.commands import Options, command

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397
BACKDATED = timedelta(days=1)  # a device whose clock is some hours behind must not see a certificate of the future
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True)
class Signed:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the private key as PEM, not encrypted."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@command
def certificate(arguments: list[str]) -> None:
    """Make the certificates of a server: fedlr server certificate --host NAME [--host NAME ...] --out DIR [--days N]

    NAME is a host name or IP address under which devices reach this server. DIR gets ca.crt (for the devices),
    ca.key (keep it offline), server.crt and server.key (for the proxy and the view), superlink.crt and
    superlink.key (loopback only). With an authority already in DIR, that one signs: to renew, move the old
    server.* and superlink.* away and call this again; devices keep their ca.crt. Nothing is overwritten.
    """
    options = Options()
    options.add_argument("--host", action="append", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--days", type=int, default=CERTIFICATE_DAYS)
    chosen = options.parse_args(arguments)
    for path, what in write_certificates(chosen.out, chosen.host, days=chosen.days).items():
        print(f"{path}: {what}")


def write_certificates(
    folder: Path, hosts: Sequence[str], *, days: int = CERTIFICATE_DAYS, now: datetime | None = None
) -> dict[Path, str]:
    """Write both server certificates, and the authority if the folder has none; return what each new file is.

    Args:
        days: how long the server certificates are valid from `now`, the present if None.

    Raises:
        InputError: for a host that is no name or address, days outside [1, 3650], or a file that exists.
    """
    if not 1 <= days <= AUTHORITY_DAYS:
        raise InputError(f"Expected --days in [1, {AUTHORITY_DAYS}], got {days}")
    names = [alternative_name(host) for host in hosts]
    now = now or datetime.now(UTC)
    servers = {"server": names, "superlink": [alternative_name(host) for host in LOOPBACK]}
    refuse_existing(*(folder / f"{name}.{kind}" for name in servers for kind in ("crt", "key")))
    written: dict[Path, str] = {}
    if not (folder / "ca.crt").exists():
        authority = create_authority(now=now)
        written |= _write(
            folder, "ca", authority, "for every device and operator", "signs certificates: keep it offline"
        )
    else:
        authority = load_authority(folder)
    for name, for_names in servers.items():
        signed = issue(authority, for_names, days=days, now=now)
        until = f"{signed.certificate.not_valid_after_utc:%Y-%m-%d}"
        hosts_text = ", ".join(str(n.value) for n in for_names)
        written |= _write(folder, name, signed, f"valid until {until} for {hosts_text}", "its private key")
    return written


def create_authority(*, now: datetime) -> Signed:
    """Make a certificate authority that may sign server certificates and no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedlr authority of {now:%Y-%m-%d}")])
    builder = _builder(name, name, key.public_key(), now=now, days=AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return Signed(builder.add_extension(identifier, critical=False).sign(key, hashes.SHA384()), key)


def load_authority(folder: Path) -> Signed:
    """Read the authority that `write_certificates` left in a folder.

    Raises:
        InputError: if its key is missing, readable by others or no match, or if its certificate has ended.
    """
    require_private(folder / "ca.key")
    try:
        found = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"Expected ca.crt and ca.key of an authority in {folder}, got {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != found.public_key():
        raise InputError(f"Expected ca.key to be the key of ca.crt in {folder}, got another one")
    if found.not_valid_after_utc < datetime.now(UTC):
        raise InputError(f"Expected a valid authority in {folder}, got one that ended {found.not_valid_after_utc}")
    return Signed(found, key)


def issue(authority: Signed, names: Sequence[x509.GeneralName], *, days: int, now: datetime) -> Signed:
    """Sign a certificate for a server under these names, valid for `days` from `now` or as long as the authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
    builder = _builder(subject, authority.certificate.subject, key.public_key(), now=now, days=days)
    if now + timedelta(days=days) > authority.certificate.not_valid_after_utc:
        raise InputError(f"Expected --days to end before the authority does, got {days}")
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return Signed(builder.add_extension(issuer, critical=False).sign(authority.key, hashes.SHA384()), key)


def alternative_name(host: str) -> x509.GeneralName:
    """Return a host name or IP address as a certificate names it.

    Raises:
        InputError: for anything else, such as a URL or a host with a port.

    >>> alternative_name("fl.example.org").value, str(alternative_name("::1").value)
    ('fl.example.org', '::1')
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST_NAME.fullmatch(host.lower()):
            raise InputError(f"Expected --host to be a host name or an IP address alone, got {host!r}") from None
        return x509.DNSName(host.lower())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, now: datetime, days: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATED).not_valid_after(now + timedelta(days=days))


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, name: str, signed: Signed, certificate_is: str, key_is: str) -> dict[Path, str]:
    """Write the key first: a certificate without its key would look finished."""
    write_new(folder / f"{name}.key", signed.key_pem(), mode=OWNER_ONLY)
    try:
        write_new(folder / f"{name}.crt", signed.certificate_pem(), mode=READ_BY_ALL)
    except InputError:
        (folder / f"{name}.key").unlink()  # half of a pair would stand in the way of a whole one
        raise
    return {folder / f"{name}.crt": certificate_is, folder / f"{name}.key": key_is}
