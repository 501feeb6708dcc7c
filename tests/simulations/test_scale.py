"""Enrolled clients cost their row numbers and nothing else: no copy of a text, no lock, no line, no draw.

Mutants killed: a federation that copies each client's rows; a run that asks the ledger about every enrolled client.
"""

import fcntl
import json
from pathlib import Path

import numpy as np
import pytest

from fedlr.simulations.federation import Federation, describe
from fedlr.tasks.examples import Share
from tests.simulations.small_runs import federation, open_ledger, rounds

MANY = ("num_clients=1000", "data.num_examples=3024")


def shares_one_table(f: Federation) -> None:
    table = f.clients[0].table
    assert all(client.table is table for client in f.clients)
    rows = np.concatenate([client.rows for client in f.clients])
    assert len(np.unique(rows)) == len(rows) <= len(table)
    assert all((np.diff(client.rows) > 0).all() for client in f.clients)


def test_a_thousand_clients_share_one_table() -> None:
    f = federation(*MANY)
    shares_one_table(f)
    assert sum(client.rows.nbytes for client in f.clients) <= 8 * len(f.clients[0].table)


def test_clients_with_copies_of_their_own_are_seen() -> None:
    f = federation(*MANY)
    copies = tuple(Share.whole(client.table.subset(client.rows)) for client in f.clients)
    f = Federation(**{**vars(f), "clients": copies})
    with pytest.raises(AssertionError):
        shares_one_table(f)


def test_the_partition_file_has_a_line_a_client_that_adds_up() -> None:
    f = federation(*MANY)
    told = describe(f)["clients"]
    assert [client["client_id"] for client in told] == list(range(1000))
    assert sum(client["num_examples"] for client in told) == sum(len(client) for client in f.clients)
    assert all(sum(client["label_counts"]) == client["num_examples"] for client in told)


def locks_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    locked = []
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda file, kind, real=fcntl.flock: (locked.append(kind), real(file, kind)))
        _, metrics, clients = rounds(federation(*overrides), folder)
    assert [row["num_trained"] for row in metrics] == [0, 3, 3]
    assert len(clients) == 6
    assert all(0 < row["epsilon"] <= metrics[-1]["epsilon_max"] for row in clients)
    return len(locked)


def test_the_ledger_is_asked_about_the_cohort_and_not_about_all_enrolled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = locks_of_a_run(tmp_path / "few", monkeypatch)
    many = locks_of_a_run(tmp_path / "many", monkeypatch, *MANY)
    assert many == few <= 30
    lines = (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epsilon_median"] == 0.0  # most of a thousand clients were never asked


def test_what_clients_have_spent_is_the_ledgers_word(tmp_path: Path) -> None:
    f = federation("num_rounds=4", "privacy.max_participations=4")
    _, metrics, clients = rounds(f, tmp_path / "run")
    latest = {row["client_id"]: row["epsilon"] for row in clients}
    spent = open_ledger(tmp_path / "run" / "ledger.jsonl", f).spent_all(range(4))
    assert spent == {client: latest.get(client, 0.0) for client in range(4)}
    assert metrics[-1]["epsilon_max"] == max(spent.values())
    assert metrics[-1]["epsilon_min"] == min(spent.values())
