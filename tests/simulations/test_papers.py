"""docs/papers.md, run as it stands: from a grid to the table, its pictures and its lines.

Its runs are as on the page, but small, and one after the other: `--jobs` changes no result and starts processes.
"""

import csv
import re
import shlex
from pathlib import Path

import pytest

from fedlr.simulations import cli

PAGE = (Path(__file__).parents[2] / "docs" / "papers.md").read_text(encoding="utf-8")
LINES = re.search(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
SMALL = ("num_rounds=1", "trainer.num_steps=1", "data.num_examples=160", "data.num_test=40")


def words(line: str) -> list[str]:
    """The words of a command of the page, without `fedlr` and `--jobs N`; its runs have a round and few rows."""
    _, name, *rest = shlex.split(line)
    if "--jobs" in rest:
        place = rest.index("--jobs")
        rest = rest[:place] + rest[place + 2 :]
    return [name, *rest, *(SMALL if name in ("tune", "simulate") else ())]


def test_the_page_leads_from_a_grid_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    for line in LINES:
        name, *rest = words(line)
        if name == "report":
            rest = [str(next((tmp_path / "outputs" / "tiny").glob("*/summary.json")).parent)]
        assert getattr(cli, name)(rest) == 0, line
    table = (tmp_path / "table.tex").read_text()
    for told in ("held-out rows of synthetic", "seeds 0, 1, 2.", "Tuned: trainer.optimizer.lr=", "\\delta = 10^{-5}"):
        assert told in table, told
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert {(line["method"], line["seed"]) for line in lines} == {
        (method, seed) for method in ("fedsvd", "ffa_lora") for seed in "012"
    }
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        *("accuracy-runs.svg", "costs.svg", "final-accuracy.svg", "paired.svg")
    }
