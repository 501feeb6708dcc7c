"""A row about a cohort proves what a row for each of its clients proves, whole or cut off.

Mutants this file kills: a cohort of which only the first is charged, a settlement of one that settles all, clients
named twice, a torn cohort that is forgotten, a last number that lost digits and charges a stranger.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import InputError
from fedlr.privacy import chain, charges
from fedlr.privacy.charges import Charges, read_ledger
from fedlr.privacy.rows import by_client, checked, of_clients
from tests.privacy.ledger_rows import BUDGET, MECHANISM, cost, new_ledger, open_ledger

TASK = "ab" * 32
CLIENTS = [12, 3, 117, 40]


def history(path: Path) -> None:
    """Write every kind of row about several clients."""
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 4, CLIENTS, TASK)
    ledger.settle_all(0, {12: 4, 3: 2, 117: 4})
    ledger.reserve(1, MECHANISM, 3, CLIENTS, TASK, announced_steps=9)
    ledger.settle_all(1, dict.fromkeys(CLIENTS, 3))
    ledger.reserve(1, MECHANISM, 3, [3, 12], TASK)  # a repeat
    ledger.reserve(2, MECHANISM, 1, [40])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_by_one(path: Path, folder: Path) -> Path:
    """Write the same ledger as it was before there were rows of cohorts."""
    head, *rest = ({k: v for k, v in row.items() if k not in ("prev", "hash")} for row in rows_of(path))
    old = folder / "old.jsonl"
    chain.create(old, head)
    with chain.locked(old) as file:
        tail = chain.parse(old.read_bytes(), chain.Tail(), name="old")[1]
        chain.append(file, tail, [single for row in rest for single in by_client(row)])
    return old


def check_equal(path: Path, folder: Path) -> None:
    """What the mutants fail: both forms tell the same charges of the same clients."""
    old = one_by_one(path, folder)
    assert len(old.read_bytes().splitlines()) == 19 and len(rows_of(path)) == 8
    (header, new, _), (_, single, _) = read_ledger(path), read_ledger(old)
    assert new.by_client == single.by_client and set(new.by_client) == set(CLIENTS)
    spent = {client: new.epsilon(client, header) for client in CLIENTS}
    assert spent == open_ledger(old).spent_all(CLIENTS) == open_ledger(path).spent_all(CLIENTS)
    assert [len(new.of(client)) for client in CLIENTS] == [2, 2, 2, 3]


def test_an_old_ledger_and_one_with_rows_of_cohorts_tell_the_same_and_go_on_alike(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    history(path)
    check_equal(path, tmp_path)
    for ledger in (open_ledger(path), open_ledger(tmp_path / "old.jsonl")):
        assert ledger.reserve(1, MECHANISM, 3, [40, 117], TASK) == {40: None, 117: None}
        refused = ledger.reserve(1, MECHANISM, 2, CLIENTS, TASK)
        assert {one.reason for one in refused.values() if one} == {"already_reserved"}
        with pytest.raises(ValueError, match="open reservation"):
            ledger.settle_all(0, {12: 4})


MUTANTS: dict[str, Callable[[dict], list]] = {
    "the first alone": lambda row: by_client(row)[:1],
    "the last alone": lambda row: by_client(row)[-1:],
    "all but settlements": lambda row: [] if row["kind"] == "settle_cohort" else by_client(row),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_reader_that_takes_less_from_a_cohort_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    history(path)
    monkeypatch.setattr(charges, "by_client", MUTANTS[name])
    with pytest.raises((AssertionError, InputError)):
        check_equal(path, tmp_path)


RESERVE = {
    "kind": "reserve_cohort",
    "round_index": 5,
    "num_steps": 2,
    "mechanism": {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.5, "divisor": 1.0},
    "client_ids": [1, 2],
}
SETTLE = {"kind": "settle_cohort", "round_index": 0, "steps_taken": 4, "client_ids": [12, 3]}
WRONG = [
    {**RESERVE, "client_ids": []},
    {**RESERVE, "client_ids": [1, 1]},
    {**RESERVE, "client_ids": [1, -2]},
    {**RESERVE, "client_ids": [1, True]},
    {**RESERVE, "client_ids": [1, 2.0]},
    {**RESERVE, "client_ids": "12"},
    {**RESERVE, "client_id": 1},
    {**RESERVE, "round_index": 0, "client_ids": [1, 12]},  # 12 was charged
    {**RESERVE, "num_steps": 0},
    {key: value for key, value in RESERVE.items() if key != "client_ids"},
    SETTLE,  # settled before
    {**SETTLE, "client_ids": [40, 41]},  # a stranger
    {**SETTLE, "client_ids": [40, 40]},
    {**SETTLE, "client_ids": [40], "steps_taken": 5},
    {"kind": "repeat_cohort", "round_index": 0, "client_ids": [12, 3]},  # 3 was not charged in full
    {"kind": "repeat_cohort", "round_index": 2, "client_ids": [40]},  # without a task
]


@pytest.mark.parametrize("row", WRONG, ids=range(len(WRONG)))
def test_a_cohort_that_does_not_follow_is_refused_by_its_row(tmp_path: Path, row: dict) -> None:
    path = tmp_path / "ledger.jsonl"
    history(path)
    with chain.locked(path) as file:
        tail = chain.parse(path.read_bytes(), chain.Tail(), name="")[1]
        chain.append(file, tail, [row])
    for read in (read_ledger, open_ledger):
        with pytest.raises(InputError, match="row 8 "):
            read(path)


def check_torn(path: Path, original: bytes) -> None:
    """What the mutants fail: of a last line cut anywhere, exactly those are charged who are still named whole."""
    start = original.rindex(b'{"kind":"reserve_cohort"')
    names = original.index(b"[", start)
    for cut in range(start + 1, len(original) - 1):
        path.write_bytes(original[:cut])
        found = {client for client, rounds in read_ledger(path)[1].by_client.items() if 7 in rounds}
        told = original[names + 1 : max(cut, names + 1)]
        listed = told.partition(b"]")[0] if b"]" in told else told.rpartition(b",")[0]
        assert found == {int(one) for one in listed.split(b",") if one}, cut
    assert found == set(CLIENTS)


def test_of_a_torn_cohort_those_are_charged_who_are_still_named_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    new_ledger(path).reserve(7, MECHANISM, 4, CLIENTS, TASK)
    original = path.read_bytes()
    check_torn(path, original)
    path.write_bytes(original[: original.index(b"117") + 2])
    ledger = open_ledger(path)
    assert [ledger.spent(client) for client in (12, 3, 11, 117)] == [cost(4), cost(4), 0.0, 0.0]
    assert [row["kind"] for row in rows_of(path)[1:]] == ["torn", "reserve_cohort"]


@pytest.mark.parametrize("name", ["forgotten", "half a number"])
def test_a_worse_reading_of_a_torn_cohort_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def half(fragment: bytes) -> chain.Row | None:
        told, separator, clients = fragment.partition(b'"client_ids":[')
        return chain.decoded(told + separator + clients.partition(b"]")[0].rstrip(b",") + b"]}") if separator else None

    monkeypatch.setattr(charges, "_torn_cohort", half if name == "half a number" else lambda fragment: None)
    path = tmp_path / "ledger.jsonl"
    new_ledger(path).reserve(7, MECHANISM, 4, CLIENTS, TASK)
    with pytest.raises(AssertionError):
        check_torn(path, path.read_bytes())


def test_ten_thousand_clients_are_a_row_of_a_few_bytes_each(tmp_path: Path) -> None:
    row = {**RESERVE, "client_ids": list(range(10_000))}
    assert len(json.dumps(checked(row).model_dump()["client_ids"])) < 6 * 10_000
    assert [one["client_id"] for one in by_client(row)] == row["client_ids"]
    single = {"kind": "settle", "round_index": 0, "steps_taken": 1}
    assert of_clients(single, []) == [] and of_clients(single, [4]) == [{**single, "client_id": 4}]
    taken = Charges()
    path = tmp_path / "ledger.jsonl"
    new_ledger(path, budget=BUDGET)
    taken.take_in([rows_of(path)[0], row])
    assert len(taken.by_client) == 10_000
