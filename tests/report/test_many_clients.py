"""With thousands of clients pictures and tables show how these are spread: the page stays short, quick and true.

Mutant killed: a page that still draws and lists each client.
"""

import re
from pathlib import Path

import pytest

from fedlr.runs.report import client_pictures, learning_pictures, overview, write_report
from fedlr.runs.report.picture import MOST_CLIENTS
from fedlr.runs.report.run_files import read_run
from tests.report.run_directory import write_run

LABELS = [f"label {i}" for i in range(12)]


def page_of(folder: Path, num_clients: int) -> str:
    return write_report(write_run(folder / str(num_clients), num_clients=num_clients)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("few"), MOST_CLIENTS)


def is_short(page: str, few: str) -> None:
    assert len(page) < len(few)


def test_a_page_of_two_thousand_clients_is_shorter_than_that_of_two_hundred(tmp_path: Path, few: str) -> None:
    page = page_of(tmp_path, 2000)
    is_short(page, few)
    for told in ("2,000 clients alone, by tenths", "clients alone, lowest to highest", "the upright line all clients"):
        assert told in page
    assert "one by one" not in page and "one cross a client" not in page
    assert "200 clients alone, one by one" in few


def test_a_page_that_shows_each_of_many_clients_is_seen(
    tmp_path: Path, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (client_pictures, learning_pictures, overview):
        monkeypatch.setattr(module, "MOST_CLIENTS", 10**9)
    with pytest.raises(AssertionError):
        is_short(page_of(tmp_path, MOST_CLIENTS + 50), few)


def test_captions_of_many_clients_say_what_the_files_say(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_clients=500, labels=LABELS))
    spent = client_pictures.epsilon_by_client(run)
    assert "1 of 500 clients have spent nothing" in spent.caption  # the last is never asked
    assert spent.svg and ">Epsilon spent</text>" in spent.svg
    held = client_pictures.label_distribution(run)
    sizes = [sum(counts) for counts in run.partition.label_counts.values()]
    assert f"{min(sizes):,} to {max(sizes):,} examples" in held.caption
    assert held.svg and all(f">{label}</text>" in held.svg for label in LABELS)


def test_the_tenths_of_clients_alone_are_those_of_the_files(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_clients=501))
    rows = re.findall(r"<tr><td>(\d) of 10</td><td[^>]*>([\d.]+)", "".join(overview.worth(run)))
    alone = sorted(one.accuracy for one in run.alone)
    assert [(int(n), float(told)) for n, told in rows] == [(n, round(100 * alone[50 * n], 1)) for n in range(1, 10)]


@pytest.mark.parametrize("privacy", ["none", "example_level"])
@pytest.mark.parametrize("public", [True, False])
def test_many_clients_of_any_run_can_be_shown(tmp_path: Path, privacy: str, public: bool) -> None:
    run = write_run(tmp_path / "run", num_clients=300, privacy=privacy, public=public)
    page = write_report(run).read_text(encoding="utf-8")
    assert ("withheld" in page) == (not public)
