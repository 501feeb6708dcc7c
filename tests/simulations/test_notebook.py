"""fedlr from Python: docs/python.md as it stands, and what is refused.

Mutants this file kills: rounds that train with privacy and write no ledger; an own file that takes the place of one of
fedlr's in silence; a lambda that is named by a path which leads elsewhere.
"""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlr
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.statement import privacy_statement
from fedlr.simulations.methods_command import names
from fedlr.simulations.notebook import words_of

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = re.findall(r"^`([\w/.]+)`:\n```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
MAX_LINES = 30
SMALL = ("num_clients=3", "cohort_size=3", "data.num_examples=60", "data.num_test=20", "runtime.num_workers=1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # a run sets them itself: restored after the test
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Iterator[dict[str, Any]]:
    """The names of a notebook that ran all blocks of the page."""
    module = types.ModuleType("page_of_python")
    sys.modules[module.__name__] = module
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), module.__dict__)
    yield module.__dict__
    del sys.modules[module.__name__]


def test_the_page_runs_as_it_stands(page: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == 7 and all(len(block.splitlines()) < MAX_LINES for block in BLOCKS)
    assert len(page["frame"]) == 4 and 0 < page["frame"]["epsilon_max"].iloc[-1] < 6
    assert len(page["scores"]) == 3 and "noise_multiplier" in (folder / "ledger.jsonl").read_text()
    kept = [json.loads(path.read_text())["method"] for path in sorted(folder.glob("outputs/*/*/summary.json"))]
    assert kept.count("ffa_lora") == 1 and len(kept) == 6
    # A folder of one's own: its files are options like fedlr's, and its module is imported from there.
    for path, text in FILES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    rules = types.ModuleType("rules")
    rules.__dict__["coordinate_median"] = page["coordinate_median"]
    monkeypatch.setitem(sys.modules, "rules", rules)
    run = fedlr.simulate("experiment=mine", *SMALL, say=None)
    assert run.summary["method"] == "my_median" and "my_median" in repr(run)
    assert "my_median" in names() and "fedit" in names()
    assert fedlr.read_run(str(run.folder)).metrics.equals(run.metrics)


def test_words_give_what_the_command_gives(folder: Path) -> None:
    hashes = [fedlr.simulate("experiment=tiny", "num_rounds=1", "seed=3", *SMALL, say=None).summary for _ in range(2)]
    assert hashes[0]["adapter_sha256"] == hashes[1]["adapter_sha256"]
    f = fedlr.federation("experiment=tiny", "num_rounds=1", "seed=3", *SMALL, say=None)
    (state, _), *more = fedlr.train(f, ledger=folder / "ledger.jsonl")
    assert not more and fedlr.score(f, state).accuracy == hashes[0]["final_accuracy"]


def test_private_rounds_without_a_ledger_are_refused_before_any_training(folder: Path) -> None:
    f = fedlr.federation("experiment=tiny", "num_rounds=1", *SMALL, say=None)
    with pytest.raises(InputError, match="Expected a ledger with privacy, got none"):
        next(fedlr.train(f))
    ledger = folder / "ledger.jsonl"
    list(fedlr.train(f, ledger=ledger))
    with pytest.raises(InputError, match=r"ledger\.jsonl"):
        next(fedlr.train(f, ledger=ledger))
    three = fedlr.federation("experiment=tiny", "num_rounds=3", *SMALL, say=None)
    loop = fedlr.train(three, ledger=folder / "left.jsonl")
    assert next(loop)[0].round_index == 1  # and no further
    loop.close()
    assert len(list(fedlr.train(three, ledger=folder / "all.jsonl"))) == 3
    left, done = (privacy_statement(folder / name, range(3))["epsilon"] for name in ("left.jsonl", "all.jsonl"))
    assert left == done
    whole = fedlr.federation("experiment=tiny", "privacy=client", "num_rounds=1", *SMALL, say=None)
    with pytest.raises(InputError, match="Expected a server_ledger with privacy, got none"):
        next(fedlr.train(whole))
    assert len(list(fedlr.train(whole, server_ledger=folder / "server.jsonl"))) == 1


def test_what_no_path_leads_to_is_refused() -> None:
    def local() -> None:
        """Lie in a function."""

    for function in (lambda: None, local, 3):
        with pytest.raises(InputError, match="Expected a function or class at the top of a module or notebook"):
            words_of({"data": function})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="which has no summary.json"):
        fedlr.read_run("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedlr.simulat  # noqa: B018
    assert {"simulate", "train"} <= set(dir(fedlr))
    assert all(getattr(fedlr, name).__doc__ for name in fedlr.__all__)


@pytest.mark.parametrize("name", ["plain", "it's a folder, of mine"])
def test_an_own_file_adds_an_option_and_replaces_none(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder / name
    (own / "configs" / "partition").mkdir(parents=True)
    monkeypatch.chdir(own)
    (own / "configs" / "partition" / "four_fifths.yaml").write_text("_target_: dirichlet\nalpha: 0.8\n")
    assert compose_experiment(["experiment=tiny", "partition=four_fifths"]).partition.section()["alpha"] == 0.8
    with pytest.raises(InputError, match="four_fifths"):
        compose_experiment(["experiment=tiny", "partition=four_fifth"])
    (own / "configs" / "partition" / "iid.yaml").write_text("_target_: dirichlet\nalpha: 0.8\n")
    with pytest.raises(
        InputError, match=r"Expected partition=iid to be one file, got fedlr's and configs/partition/iid"
    ):
        compose_experiment(["experiment=tiny", "partition=iid"])
