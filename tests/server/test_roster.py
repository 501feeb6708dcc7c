"""The roster: two devices are never taken for one another, and a client number is given once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.flower.node_key import create_node_key
from fedlr.server.roster import Roster, load_roster, save_roster


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("keys")
    return [create_node_key(folder / str(index), comment="x").read_text() for index in range(4)]


@pytest.fixture
def roster(keys: list[str]) -> Roster:
    return Roster().with_client("a", keys[0], 11).with_client("b", keys[1], 22).with_client("c", keys[2], 33)


def test_a_roster_comes_back_from_its_file(roster: Roster, tmp_path: Path) -> None:
    changed = roster.without_client("b")
    save_roster(changed, tmp_path / "roster.json")
    assert load_roster(tmp_path / "roster.json") == changed
    assert changed.client_of_node == {11: 0, 33: 2}
    assert [path.name for path in tmp_path.iterdir()] == ["roster.json"]
    plain = json.loads((tmp_path / "roster.json").read_text())
    assert set(plain["clients"][0]) == {"client_id", "name", "public_key", "node_id"}


def test_the_number_of_a_revoked_device_is_not_given_again(roster: Roster, keys: list[str]) -> None:
    assert roster.without_client("c").with_client("c", keys[3], 44).named("c").client_id == 3


def test_a_revoked_key_does_not_come_back(roster: Roster, keys: list[str]) -> None:
    with pytest.raises(InputError, match="public_key once"):
        roster.without_client("b").with_client("b2", keys[1], 55)


@pytest.mark.parametrize("field", ["client_id", "name", "public_key", "node_id"])
def test_two_devices_that_share_anything_are_refused(roster: Roster, field: str) -> None:
    first, second, *rest = roster.clients
    twin = second.model_copy(update={field: getattr(first, field)})
    with pytest.raises(InputError, match=f"every {field} once"):
        replace(roster, clients=(first, twin, *rest))


def test_a_key_with_another_comment_is_the_same_key(roster: Roster, keys: list[str]) -> None:
    with pytest.raises(InputError, match="public_key once"):
        roster.with_client("d", keys[0].replace(" x", " y"), 44)


@pytest.mark.parametrize(("name", "node_id"), [("", 1), ("a b", 1), ("../a", 1), ("d\n", 1), ("d", 0), ("d", 2**64)])
def test_a_bad_entry_is_refused(roster: Roster, keys: list[str], name: str, node_id: int) -> None:
    with pytest.raises(InputError, match="client"):
        roster.with_client(name, keys[3], node_id)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"clients": [{"client_id": 0}]}',
        '{"clients": [], "extra": 1}',
        '{"clients": [{"client_id": "0", "name": "a", "public_key": "k", "node_id": 1}]}',
        '{"clients": [{"client_id": true, "name": "a", "public_key": "k", "node_id": 1}]}',
    ],
)
def test_a_file_that_is_no_roster_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(InputError, match=r"^Expected a roster in [^\n]*$"):
        load_roster(tmp_path / "roster.json")


def test_an_unknown_name_lists_the_known(roster: Roster) -> None:
    with pytest.raises(InputError, match="enrolled: a, b, c"):
        roster.without_client("z")
