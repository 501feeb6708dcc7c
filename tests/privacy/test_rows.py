"""A ledger row that no honest program writes is refused, hashes recomputed or not; no row lowers what was charged (S4).

Whoever can write the file can write its hashes. Mutants this file kills (`MUTANTS`): rows whose fields are not looked
at, rows that are not held against those before.
"""

from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import InputError
from fedlr.privacy import chain, charges
from fedlr.privacy.charges import Charges, read_ledger
from tests.privacy.ledger_rows import MECHANISM, new_ledger, open_ledger

TASK = "a" * 64
CONSTANTS = dict(vars(MECHANISM))
RESERVE = {"kind": "reserve", "round_index": 1, "num_steps": 5, "task": TASK, "client_id": 0, "mechanism": CONSTANTS}
SETTLE = {"kind": "settle", "round_index": 0, "client_id": 0, "steps_taken": 5}
REPEAT = {"kind": "repeat", "round_index": 0, "client_id": 0}
HONEST = [RESERVE, {**RESERVE, "announced_steps": 90}, SETTLE, REPEAT, {"kind": "torn", "fragment": ""}]


def constants(**change: object) -> dict[str, Any]:
    return {**RESERVE, "mechanism": {**CONSTANTS, **change}}


NUMBERS = [-1, -5, 1.0, "1", None, True, 2**60, [], {}]
NUMBERED = ("round_index", "client_id")
FIELDS: list[dict[str, Any]] = [
    *(
        {**row, key: bad}
        for row in (RESERVE, SETTLE, REPEAT)
        for key in ("round_index", "client_id")
        for bad in NUMBERS
    ),
    *({**SETTLE, "steps_taken": bad} for bad in [*NUMBERS, 6]),
    *({**RESERVE, "num_steps": bad} for bad in [*NUMBERS, 0, 10**8]),
    *({**RESERVE, "announced_steps": bad} for bad in [-1, 0, 1.5, "1", True, 10**8]),
    *({**RESERVE, "task": bad} for bad in ["", "A" * 64, "a" * 63, 1, []]),
    *({**RESERVE, "mechanism": bad} for bad in [None, [], 1, {}, {**CONSTANTS, "more": 1.0}]),
    *(constants(noise_multiplier=bad) for bad in [-20.0, 1e-160, 1e300, "20", None, True]),
    *(constants(sample_rate=bad) for bad in [0.0, -1.0, 1.5, "1", None]),
    *(constants(max_grad_norm=bad) for bad in [0.0, -1.0, 1e-45, 1e300, None]),
    *(constants(divisor=bad) for bad in [0.0, -8.0, 1e-300, 1e300, None]),
    *(constants(separation=bad) for bad in [0, -1, 1.5, None, True]),
    *(constants(bands=bad) for bad in [0, 2, 1.5, None]),
    *(constants(release_noise=bad) for bad in ["lattice", None, 1]),
    *(
        {key: value for key, value in row.items() if key != lost}
        for row in (RESERVE, SETTLE, REPEAT)
        for lost in row
        if lost != "task"
    ),
    *({**row, "more": 1} for row in HONEST),
    {"kind": "torn", "fragment": 5},
    {"kind": "gift"},
    {"kind": None},
    {"kind": ["reserve"]},
    {},
]
ORDER: list[list[dict[str, Any]]] = [
    [{**RESERVE, "round_index": 0, "num_steps": 1}],  # in place of the first
    [SETTLE, {**SETTLE, "steps_taken": 0}],
    [{**SETTLE, "steps_taken": 0}, REPEAT],
    [{**SETTLE, "round_index": 7}],
    [{**SETTLE, "client_id": 7}],
    [{**REPEAT, "round_index": 7}],
]


def forged(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A ledger of one reservation, and rows after it whose hashes are right."""
    path.unlink(missing_ok=True)
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    with chain.locked(path) as file:
        chain.append(file, ledger._tail, rows)
    return path


def forgeries_are_refused(path: Path, forgeries: list[list[dict[str, Any]]]) -> None:
    """The check that mutants fail."""
    for rows in forgeries:
        forged(path, rows)
        for read in (read_ledger, open_ledger):
            with pytest.raises(InputError, match=f"^row {1 + len(rows)} of ") as refusal:
                read(path)
            assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400, rows


def test_every_field_of_a_row_has_a_range(tmp_path: Path) -> None:
    forgeries_are_refused(tmp_path / "ledger.jsonl", [[row] for row in FIELDS])


def test_no_row_lowers_what_rows_before_it_charged(tmp_path: Path) -> None:
    forgeries_are_refused(tmp_path / "ledger.jsonl", ORDER)


def test_rows_that_are_written_are_read(tmp_path: Path) -> None:
    for row in HONEST:
        read_ledger(forged(tmp_path / "ledger.jsonl", [row]))


def test_a_header_with_another_range_or_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    new_ledger(path)
    rows, _, _ = chain.parse(path.read_bytes(), chain.Tail(), name="")
    honest = {key: value for key, value in rows[0].items() if key not in ("prev", "hash")}
    bad = {"epsilon": [0.0, -1.0, "2", None], "delta": [0.0, 1.0, None], "accountant": ["prv", None], "unit": ["a cat"]}
    bad |= {"relation": ["replace"], "dataset_id": ["", 5], "randomness": ["dice"], "version": [2, "1"]}
    for key, values in bad.items():
        for value in values:
            path.unlink()
            chain.create(path, {**honest, key: value})
            with pytest.raises(InputError):
                read_ledger(path)
    with pytest.raises(InputError, match="row 2 of .*header"):
        read_ledger(forged(path, [honest]))


def test_a_repeat_under_noise_of_the_operating_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = new_ledger(path, randomness="os")
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    with chain.locked(path) as file:
        chain.append(file, ledger._tail, [REPEAT])
    with pytest.raises(InputError, match="row 2 of .*repeat"):
        read_ledger(path)


def unrelated(self: Charges, row: chain.Row) -> None:
    charges.checked(row)


MUTANTS = {
    "fields are not looked at": (charges, "checked", lambda row: row),
    "rows before are not looked at": (Charges, "_take_in", unrelated),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_reader_that_looks_at_less_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError, ValueError, TypeError)):
        forgeries_are_refused(tmp_path / "ledger.jsonl", [*([row] for row in FIELDS), *ORDER])
