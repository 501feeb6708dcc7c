"""Certificates: what they name is what a TLS client accepts, for as long as they say, and secrets stay secret."""

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.server.certificates import certificate, load_authority, write_certificates

FILES = {f"{name}.{kind}" for name in ("ca", "server", "superlink") for kind in ("crt", "key")}


def shaken_hands(folder: Path, name: str, host: str, *, ca: Path | None = None) -> None:
    """Raise what a client of `host` raises when a server with this certificate answers: TLS over memory."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    client = ssl.create_default_context(cafile=str(ca or folder / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].cipher()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    assert certificate(["--host", "fl.example.org", "--host", "192.0.2.7", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("server", "fl.example.org"),
        ("server", "192.0.2.7"),
        ("superlink", "localhost"),
        ("superlink", "127.0.0.1"),
        ("superlink", "::1"),
    ],
)
def test_a_strict_client_accepts_each_name(folder: Path, name: str, host: str) -> None:
    shaken_hands(folder, name, host)


@pytest.mark.parametrize(("name", "host"), [("server", "localhost"), ("superlink", "fl.example.org")])
def test_no_certificate_is_good_for_another_name(folder: Path, name: str, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        shaken_hands(folder, name, host)


def test_a_client_of_another_authority_refuses(folder: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["fl.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken_hands(folder, "server", "fl.example.org", ca=tmp_path / "ca.crt")


def test_a_certificate_ends(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["fl.example.org"], days=1, now=datetime.now(UTC) - timedelta(days=1, minutes=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shaken_hands(tmp_path, "server", "fl.example.org")


def test_a_server_certificate_signs_nothing(folder: Path) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-in", folder / "server.crt", "-noout", "-text"], capture_output=True, text=True, check=True
    ).stdout
    assert "CA:FALSE" in shown and "TLS Web Server Authentication" in shown and "Certificate Sign" not in shown


def test_only_the_owner_has_rights_on_keys(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert {modes[name] for name in FILES if name.endswith(".key")} == {0o600}


def test_renewal_keeps_the_authority_that_devices_trust(tmp_path: Path, capsys) -> None:
    arguments = ["--host", "fl.example.org", "--out", str(tmp_path)]
    assert certificate(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert certificate(arguments) == 2
    assert "exists; move it away" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in [*tmp_path.glob("server.*"), *tmp_path.glob("superlink.*")]:
        path.unlink()
    assert certificate(arguments) == 0
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]
    assert (tmp_path / "server.crt").read_bytes() != before["server.crt"]
    shaken_hands(tmp_path, "server", "fl.example.org")


@pytest.mark.parametrize(
    "host", ["https://fl.example.org", "fl.example.org:8443", "", "a b", "-a", "*.example.org", "é"]
)
def test_a_host_that_is_no_host_is_refused_before_anything_is_written(host: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="host name or an IP address"):
        write_certificates(tmp_path, ["good.example.org", host])
    assert not list(tmp_path.iterdir())


def test_an_authority_that_cannot_sign_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="days"):
        write_certificates(tmp_path, ["localhost"], days=0)
    with pytest.raises(InputError, match="private key"):
        load_authority(tmp_path)
    write_certificates(tmp_path, ["localhost"])
    (tmp_path / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    with pytest.raises(InputError, match="another one"):
        load_authority(tmp_path)
    (tmp_path / "ca.crt").write_text("nothing")
    with pytest.raises(InputError, match="authority"):
        load_authority(tmp_path)
