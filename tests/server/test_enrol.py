"""Enrolling and revoking against a real SuperLink: the roster and the SuperLink never say different things for good."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlr.client.connection_errors import check_connection
from fedlr.errors import InputError
from fedlr.flower.node_key import create_node_key, load_node_key
from fedlr.server.enrol import SuperLink, enrol, enrol_again, enrol_one, register, revoke, unregister
from fedlr.server.roster import Roster, load_roster
from tests.server.live_superlink import Running, free_port, superlink


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with superlink(tmp_path_factory.mktemp("superlink")) as server:
        yield server


@pytest.fixture
def control(running: Running) -> SuperLink:
    return SuperLink(running.address, running.log.parent / "ca.crt")


def joins(control: SuperLink, key: Path) -> int:
    return check_connection(control.address, control.root_certificates.read_bytes(), load_node_key(key))


def test_an_enrolled_device_joins_and_a_revoked_one_never_again(control: SuperLink, tmp_path: Path, capsys) -> None:
    options = ["--superlink", control.address, "--superlink-ca", str(control.root_certificates)]
    options += ["--roster", str(tmp_path / "roster.json")]
    for name in ("a", "b"):
        create_node_key(tmp_path / name)
        assert enrol([*options, "--name", name, str(tmp_path / f"{name}.pub")]) == 0
    roster = load_roster(tmp_path / "roster.json")
    assert [joins(control, tmp_path / name) for name in ("a", "b")] == [entry.node_id for entry in roster.clients]

    assert revoke([*options, "--name", "b"]) == 0
    assert "b (client 1) is shut out" in capsys.readouterr().out
    with pytest.raises(InputError, match="revoked"):
        joins(control, tmp_path / "b")
    with pytest.raises(InputError, match="never revoked"):
        register(control, [(tmp_path / "b.pub").read_text()])
    assert enrol([*options, "--name", "b", str(tmp_path / "b.pub")]) == 2
    assert joins(control, tmp_path / "a") == roster.named("a").node_id


def test_a_call_that_was_cut_off_can_be_repeated(control: SuperLink, tmp_path: Path) -> None:
    line = create_node_key(tmp_path / "key").read_text()
    (lost,) = register(control, [line])  # the roster was never written
    assert enrol_one(control, Roster(), "a", line).named("a").node_id == lost
    unregister(control, [lost])
    unregister(control, [lost, 12345])


def test_a_superlink_that_lost_its_database_learns_the_roster_again(control: SuperLink, tmp_path: Path) -> None:
    lines = [create_node_key(tmp_path / name).read_text() for name in ("a", "b")]
    old = Roster().with_client("a", lines[0], 1).with_client("b", lines[1], 2).without_client("a")
    new = enrol_again(control, old)
    assert new.revoked == old.revoked and new.named("b").client_id == 1
    assert joins(control, tmp_path / "b") == new.named("b").node_id != 2
    with pytest.raises(InputError, match="join"):
        joins(control, tmp_path / "a")


def test_a_bad_name_or_key_never_reaches_the_superlink(tmp_path: Path) -> None:
    nobody = SuperLink("localhost:1", tmp_path / "ca.crt")
    line = create_node_key(tmp_path / "key").read_text()
    with pytest.raises(InputError, match=r"client\.name"):
        enrol_one(nobody, Roster(), "../a", line)
    with pytest.raises(InputError, match="nistp384"):
        enrol_one(nobody, Roster(), "a", "ssh-rsa AAAA")


def test_no_superlink_and_no_authority_are_one_line(control: SuperLink, tmp_path: Path, capsys) -> None:
    line = create_node_key(tmp_path / "key").read_text()
    with pytest.raises(InputError, match="is it running here"):
        register(SuperLink(f"localhost:{free_port()}", control.root_certificates), [line])
    with pytest.raises(InputError, match="ca.crt"):
        register(SuperLink(control.address, tmp_path / "ca.crt"), [line])
    options = ["--superlink", "a:1", "--superlink-ca", "ca.crt", "--roster", str(tmp_path / "roster.json")]
    for wrong in ([], ["--name", "a"], ["--all", "--name", "a"], ["--name", "a", str(tmp_path / "none.pub")]):
        assert enrol([*options, *wrong]) == 2
    assert revoke([*options, "--name", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 5


def test_a_roster_is_not_touched_when_the_superlink_refuses(control: SuperLink, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_text(json.dumps({"clients": []}))
    create_node_key(tmp_path / "a")
    options = ["--superlink", "localhost:1", "--superlink-ca", str(control.root_certificates), "--roster", str(path)]
    assert enrol([*options, "--name", "a", str(tmp_path / "a.pub")]) == 2
    assert json.loads(path.read_text()) == {"clients": []}
