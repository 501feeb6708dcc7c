"""`fedlr adapters` prints what it measured, fails where the registry is wrong, and its document names every entry.

Mutants this file kills: an entry or a refusal that the document does not name, or names with another form, path or
shipping; a command that writes although the figures disagree; a document without its marks that is written to.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.models.tuners import REFUSED, TUNERS, registry
from fedlr.simulations.adapters_command import COLUMNS, MEASURED, REFUSED_PART, adapters, marks

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"


def between(text: str, part: str) -> dict[str, dict[str, str]]:
    """The rows of one table by their first cell, each a mapping from its column."""
    start, end = marks(part)
    lines = [line for line in text.partition(start)[2].partition(end)[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the document with empty tables."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for part in (MEASURED, REFUSED_PART):
        start, end = marks(part)
        text = text.partition(start)[0] + start + "\n\n" + end + text.partition(end)[2]
    path = tmp_path_factory.mktemp("document") / "adapters.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_document_is_in_step_with_the_registry() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = between(text, MEASURED)
    assert list(table) == list(TUNERS)
    for name, entry in TUNERS.items():
        row = table[name]
        assert (row["system"], row["form"], row["gradients by"]) == (entry.title, entry.form, entry.path)
        assert (row["source"], row["note"]) == (entry.source, entry.note)
        assert all(block in row["one block alone"] for block in entry.blocks if len(entry.blocks) > 1)
        shipped, _, rebuilt = row["shipped once"].partition("; ")
        named = [] if shipped == "nothing" else re.sub(r" \(\d+ values\)$", "", shipped).split(", ")
        assert named == list(entry.ships) and rebuilt == entry.rebuilt
    assert {name: row["why"] for name, row in between(text, REFUSED_PART).items()} == dict(REFUSED)


def test_the_command_prints_and_writes_what_it_measured(
    few: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TUNERS", {name: TUNERS[name] for name in ("lora", "lora_xs", "c3a")})
    assert adapters(["--out", str(few)]) == 0
    table = between(few.read_text(encoding="utf-8"), MEASURED)
    assert list(table) == ["lora", "lora_xs", "c3a"]
    assert float(table["c3a"]["all blocks"]) < 1e-10 < 1e-3 < float(table["lora"]["all blocks"])
    assert table["lora_xs"]["trained"] == "48"
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lora_xs", *COLUMNS))


def test_the_command_fails_and_writes_nothing_where_the_figures_disagree(
    few: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = few.read_text(encoding="utf-8")
    monkeypatch.setattr(registry, "TUNERS", {"lora": replace(TUNERS["lora"], form="linear")})
    assert adapters(["--out", str(few)]) == 2
    assert "declared exact with all blocks" in capsys.readouterr().err
    assert few.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["osf"], "edits gradients in hooks"),
        (["verra"], "Expected vera"),
        (["--out"], "a file after --out"),
        (["--quick"], "--quick"),
        (["lora", "--out", str(DOCUMENT)], "leave the names out"),
        (["--out", "no/such/file.md"], "no file"),
        (["--out", str(DOCUMENT.parent / "methods.md")], "once, in this order"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters(words) == 2
    assert said in capsys.readouterr().err
