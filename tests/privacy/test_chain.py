"""A changed ledger is refused by row, and a torn one never reads as less spent (R-L5 without rollback, R-F6).

Mutants this file kills: hashes that are not checked, a chain that is not linked, hashes over parsed values only (so
that spelling may change), a torn line that is skipped, a torn settlement that is believed.
"""

import hashlib
import json
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.privacy import chain
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.ledger import PrivacyLedger
from tests.privacy.ledger_rows import BUDGET, MECHANISM, cost, new_ledger, open_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of 3 rounds and 2 clients: 8 rows after the header, the last one an open reservation."""
    path = tmp_path / "ledger.jsonl"
    ledger = new_ledger(path)
    for round_index in range(3):
        ledger.reserve(round_index, MECHANISM, 4, [0, 1])
        ledger.settle(round_index, 0, 4)
        if round_index == 0:
            ledger.settle(round_index, 1, 3)
    ledger.reserve(3, MECHANISM, 4, [1])
    return path


def readings(path: Path) -> list[float]:
    """Spending of both clients, by a ledger object and by a reader of the file."""
    header, charges, _ = read_ledger(path)
    read = [charges.epsilon(client, header) for client in (0, 1)]
    ledger = open_ledger(path)
    assert [ledger.spent(client) for client in (0, 1)] == read
    return read


def test_every_row_carries_the_hash_of_its_canonical_form_and_of_the_row_before(path: Path) -> None:
    """Recomputed here without the library, so that a second program can."""
    previous = "0" * 64
    for line in path.read_text().splitlines():
        row = json.loads(line)
        digest = row.pop("hash")
        assert row["prev"] == previous
        previous = hashlib.sha256(json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert digest == previous
    assert open_ledger(path).head() == previous


def test_the_header_says_what_the_ledger_is_about(path: Path) -> None:
    header = json.loads(path.read_text().splitlines()[0])
    assert header["unit"] == "one training example of one client"
    assert header["relation"] == "add or remove one example"
    assert (header["epsilon"], header["delta"], header["accountant"]) == (BUDGET.epsilon, BUDGET.delta, "rdp")
    assert (header["dataset_id"], header["randomness"]) == ("reviews", "seeded")


def test_any_flipped_bit_is_refused_by_row(path: Path) -> None:
    """Every byte of the file but the last line feed, one bit each; every 23rd through the file as well."""
    original = path.read_bytes()
    for position in range(len(original) - 1):
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 8
        row = original[:position].count(b"\n")
        with pytest.raises(InputError, match=f"row {row} "):
            chain.parse(bytes(flipped), chain.Tail(), name="ledger.jsonl")
        if position % 23 == 0:
            path.write_bytes(flipped)
            for read in (open_ledger, read_ledger):
                with pytest.raises(InputError, match=f"row {row} "):
                    read(path)
            assert path.read_bytes() == flipped, "a refused file is not touched"


def test_a_changed_last_line_feed_looks_like_a_crash_and_costs_nothing_less(path: Path) -> None:
    honest = readings(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    assert readings(path) == honest


@pytest.mark.parametrize("row", range(8))
def test_a_row_deleted_from_the_middle_is_refused(path: Path, row: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:row] + lines[row + 1 :]))
    with pytest.raises(InputError, match=f"row {row} "):
        open_ledger(path)


def test_rows_in_another_order_or_twice_are_refused(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (lines[:3] + [lines[4], lines[3]] + lines[5:], [*lines, lines[-1]], [*lines, b"\n"]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(InputError, match="hash chain"):
            open_ledger(path)


def test_a_row_spelled_otherwise_is_refused(path: Path) -> None:
    """The same values with one space more, or a number in another notation."""
    lines = path.read_bytes().splitlines(keepends=True)
    for change in ((b'":4', b'": 4'), (b":4,", b":4.0,"), (b":4,", b":4e999,")):
        changed = lines[1].replace(*change)
        assert changed != lines[1]
        path.write_bytes(b"".join([lines[0], changed, *lines[2:]]))
        with pytest.raises(InputError, match="row 1 "):
            open_ledger(path)


def test_an_open_ledger_notices_a_file_that_was_shortened_or_replaced(path: Path, tmp_path: Path) -> None:
    ledger = open_ledger(path)
    original = path.read_bytes()
    path.write_bytes(b"".join(original.splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="only grow"):
        ledger.reserve(5, MECHANISM, 1, [0])
    other = tmp_path / "other.jsonl"
    longer = new_ledger(other, budget=BUDGET)
    for client in range(20):
        longer.reserve(9, MECHANISM, 1, [client])
    path.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="hash chain"):
        ledger.spent(0)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"not json\n", b'{"kind":"hea', b"\xff\xfe\n"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    for read in (open_ledger, read_ledger):
        with pytest.raises(InputError, match="row 0 "):
            read(path)
    assert path.read_bytes() == content


def test_a_torn_line_never_reads_as_less_than_the_rows_before_it(path: Path) -> None:
    """The file cut at every ninth byte of its last rows: what remains whole is counted in full."""
    original = path.read_bytes()
    for cut in range(original.rindex(b'{"kind":"reserve_cohort","round_index":2'), len(original), 9):
        path.write_bytes(original[:cut].rpartition(b"\n")[0] + b"\n")
        whole = readings(path)
        path.write_bytes(original[:cut])
        assert all(found >= spent for found, spent in zip(readings(path), whole, strict=True))


def torn(path: Path, keep: float) -> PrivacyLedger:
    """Return the ledger after its last line lost its end."""
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, last[: int(keep * len(last))]]))
    return open_ledger(path)


def test_a_torn_reservation_is_charged_where_it_can_still_be_read(path: Path) -> None:
    """It was never acknowledged, but the file would look the same if somebody had shortened it."""
    assert torn(path, 0.999).spent(1) == cost(3 + 4 + 4 + 4)


def test_a_torn_reservation_that_cannot_be_read_had_reserved_nothing(path: Path) -> None:
    ledger = torn(path, 0.2)
    assert ledger.spent(1) == cost(3 + 4 + 4)
    assert ledger.reserve(3, MECHANISM, 4, [1]) == {1: None}, "it can be asked for again"


def test_a_torn_settlement_leaves_the_reservation_open(path: Path) -> None:
    open_ledger(path).settle(3, 1, 1)
    for keep in (0.999, 0.5):
        copy = path.with_name(f"{keep}.jsonl")
        copy.write_bytes(path.read_bytes())
        assert torn(copy, keep).spent(1) == cost(3 + 4 + 4 + 4)


def test_a_torn_line_stays_on_record_and_the_chain_goes_on(path: Path) -> None:
    ledger = torn(path, 0.5)
    ledger.reserve(4, MECHANISM, 1, [0])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["kind"] for row in rows][-2:] == ["torn", "reserve"]
    assert rows[-2]["fragment"].startswith('{"kind":"reserve"')
    assert open_ledger(path).spent(0) == cost(13) and read_ledger(path)[1].num_torn == 1


def test_a_reader_does_not_repair(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    assert read_ledger(path)[1].num_torn == 1
    assert path.read_bytes() == before
