"""Key pairs of devices: OpenSSH's own tool and Flower's own loader read them, and nobody else may.

Mutants killed: a key file that is readable for a moment, or for good; a key written over an older one.
"""

import os
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedlr.client.key import key
from fedlr.errors import InputError
from fedlr.flower.node_key import canonical_public_key, create_node_key, load_node_key, load_public_key, write_new


def test_the_pair_is_a_pair_in_the_formats_that_flower_reads(tmp_path: Path) -> None:
    public_path = create_node_key(tmp_path / "node", comment="a device")
    private = load_node_key(tmp_path / "node")
    assert public_path == tmp_path / "node.pub" and public_path.read_text().endswith(" a device\n")
    assert private.public_key() == load_public_key(public_path.read_text())
    assert load_ssh_private_key((tmp_path / "node").read_bytes(), None).private_numbers() == private.private_numbers()
    assert canonical_public_key(f"  {public_path.read_text()}") == canonical_public_key(
        public_path.read_text().replace("a device", "the same")
    )


def test_ssh_keygen_derives_the_same_public_key(tmp_path: Path) -> None:
    public_path = create_node_key(tmp_path / "node")
    try:
        derived = subprocess.run(["ssh-keygen", "-y", "-f", tmp_path / "node"], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert derived.stdout.split() == public_path.read_bytes().split()


def test_only_the_owner_has_rights_on_the_private_key_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_node_key(tmp_path / "node")
    finally:
        os.umask(before)
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o600
    (tmp_path / "node").chmod(0o640)
    with pytest.raises(InputError, match="mode 0640; chmod 600"):
        load_node_key(tmp_path / "node")


@pytest.mark.parametrize("existing", ["node", "node.pub"])
def test_no_key_is_ever_written_over(existing: str, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(InputError, match="exists"):
        create_node_key(tmp_path / "node")
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    with pytest.raises(InputError, match="File exists"):
        write_new(tmp_path / existing, b"other", mode=0o600)
    assert (tmp_path / existing).read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_private_key_is_one_line(content: bytes, tmp_path: Path) -> None:
    write_new(tmp_path / "node", content, mode=0o600)
    with pytest.raises(InputError, match=r"^Expected a private key[^\n]*$"):
        load_node_key(tmp_path / "node")
    with pytest.raises(InputError, match="No such file"):
        load_node_key(tmp_path / "none")


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFmF", "ecdsa-sha2-nistp384 AAAA", "text"])
def test_what_is_no_p384_key_is_refused(line: str) -> None:
    with pytest.raises(InputError, match="ecdsa-sha2-nistp384"):
        load_public_key(line)


def test_the_command_shows_the_line_for_the_operator_and_no_secret(tmp_path: Path, capsys) -> None:
    assert key(["--out", str(tmp_path / "node"), "--comment", "site-a"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "node.pub").read_text() in out and "PRIVATE" not in out
    assert key(["--out", str(tmp_path / "node")]) == 2
