"""The key pair by which a server knows a device: EC P-384, in OpenSSH's formats (as `ssh-keygen -t ecdsa -b 384`).

The private key is made on the device and never leaves it; the public key, one line of text, goes to the operator.
"""

import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlr.errors import InputError
from fedlr.files import create_whole

OWNER_ONLY = 0o600
READ_BY_ALL = 0o644


def create_node_key(path: Path, *, comment: str = "") -> Path:
    """Make a key pair: the private key at `path` (mode 0600), the public one beside it; return the latter's path.

    Raises:
        InputError: if one of the two files exists; a key is never overwritten.
    """
    private_key = ec.generate_private_key(ec.SECP384R1())
    public = private_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public_path = path.with_name(path.name + ".pub")
    refuse_existing(path, public_path)
    write_new(path, private_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=OWNER_ONLY)
    write_new(public_path, public + f" {comment}".rstrip().encode() + b"\n", mode=READ_BY_ALL)
    return public_path


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        InputError: if the file is missing, is no unencrypted EC key in OpenSSH's format, or others may read it.
    """
    require_private(path)
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"Expected a private key of `fedlr client key` in {path}, got {_first_line(error)}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"Expected an EC key in {path}, got {type(key).__name__}; make one: fedlr client key")
    return key


def load_public_key(line: str) -> ec.EllipticCurvePublicKey:
    """Read a public key from the line of text in a .pub file.

    Raises:
        InputError: if it is no EC P-384 key.
    """
    shown = line.strip()[:40]
    try:
        key = load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"Expected a line that begins with ecdsa-sha2-nistp384, got {shown!r}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InputError(f"Expected a line that begins with ecdsa-sha2-nistp384, got {shown!r}")
    return key


def canonical_public_key(line: str) -> str:
    """Return the public key without its comment: equal for equal keys, whoever wrote the line."""
    return load_public_key(line).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def require_private(path: Path) -> None:
    """Refuse a secret that is missing or that another user of this machine may read.

    Raises:
        InputError: naming the file and the command that mends it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"Expected a private key in {path}, got {error.strerror}") from None
    if mode & 0o077:
        raise InputError(f"Expected only the owner to have rights on {path}, got mode {mode:04o}; chmod 600 {path}")


def refuse_existing(*paths: Path) -> None:
    """Refuse to begin when one of the files is already there.

    Raises:
        InputError: naming the file.
    """
    for path in paths:
        if path.exists():
            raise InputError(f"Expected a new file, got {path}, which exists; move it away to have a new one")


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that must not exist, with its rights from its first byte on.

    Raises:
        InputError: if the file exists or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_whole(path, content, mode=mode)
    except OSError as error:
        raise InputError(f"Expected {path} to be a new file, got {error.strerror}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
