"""The rule of your own in docs/methods.md, taken from the document as it stands: short, running, and what it says.

Mutants this file kills: an example that grew, was renamed, or names what is no more; a step that is not cut; a short
step that is stretched.
"""

import importlib
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from fedlr.adapters.state import LORA_B, ClientUpdate, Slot
from fedlr.config.build import build_method
from fedlr.config.schema import compose_experiment
from fedlr.methods.method import Method
from fedlr.simulations import cli
from fedlr.simulations.method_properties import MadeUpClients, measured
from fedlr.simulations.methods_command import names

ROOT = Path(__file__).parents[1]
CHAPTER = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("\n## A rule of your own\n")[2]
FILES = re.findall(r"^`([\w/.]+)`:\n```\w+\n(.*?)^```$", CHAPTER, flags=re.MULTILINE | re.DOTALL)
TINY = (
    *("experiment=tiny", "num_rounds=2", "num_clients=3", "cohort_size=3", "trainer.num_steps=1"),
    *("data.num_examples=60", "data.num_test=20", "runtime.num_workers=1"),
)
MAX_LINES = 30


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the files of the chapter where it says, in a copy of configs and in no folder of the library."""
    (code_path, code), (yaml_path, text) = FILES
    configs = Path(shutil.copytree(ROOT / "configs", tmp_path / "configs"))
    (configs.parent / yaml_path).write_text(text, encoding="utf-8")
    name = code_path.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, code_path, "exec"), module.__dict__)
    parent, _, last = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), last, module, raising=False)
    monkeypatch.setattr("fedlr.config.schema.CONFIGS", configs)
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # the command sets them itself: restored after the test
    return Path(yaml_path).stem


def built(name: str, *overrides: str) -> Method:
    return build_method(compose_experiment([f"method={name}", *overrides]))


def test_the_example_is_a_function_and_a_file_of_thirty_lines_together() -> None:
    assert [Path(path).suffix for path, _ in FILES] == [".py", ".yaml"]
    assert sum(len(text.splitlines()) for _, text in FILES) <= MAX_LINES
    assert not any((ROOT / path).exists() for path, _ in FILES), "the example would hide a file of the library"


@pytest.mark.parametrize("privacy", ["none", "dp"])
def test_the_rule_runs_as_any_other(added: str, privacy: str) -> None:
    assert cli.simulate([*TINY, f"method={added}", f"privacy={privacy}"]) == 0
    (summary,) = Path("outputs").glob("tiny/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["method"] == added


def test_the_rule_is_listed_and_its_header_names_its_command(added: str) -> None:
    assert added in names()
    assert FILES[1][1].splitlines()[2] == f"# Run: fedlr simulate method={added}"


def test_a_long_step_is_cut_and_a_short_one_is_the_mean(added: str) -> None:
    adapter = MadeUpClients().adapter
    slots = [slot for slot in adapter.tensors if slot.role == LORA_B]
    length = sum(adapter.tensors[slot].numel() for slot in slots) ** 0.5

    def moved(name: str, size: float, *overrides: str) -> dict[Slot, torch.Tensor]:
        steps = {slot: torch.full_like(adapter.tensors[slot], size / length) for slot in slots}
        update = ClientUpdate(0, steps, weight=1.0, base_round=0)
        return dict(built(name, *overrides).aggregate(adapter, [update]).select(frozenset({LORA_B})))

    def norm(tensors: dict[Slot, torch.Tensor]) -> float:
        return float(sum(tensor.square().sum() for tensor in tensors.values())) ** 0.5

    assert norm(moved(added, 100.0)) == pytest.approx(0.5, rel=1e-5)
    assert norm(moved(added, 100.0, "method.aggregate.max_norm=2.0")) == pytest.approx(2.0, rel=1e-5)
    assert norm(moved(added, 0.25)) == pytest.approx(0.25, rel=1e-5)
    assert norm(moved(added, 0.0)) == 0.0


def test_the_rule_is_the_plain_mean_where_no_step_is_long(added: str) -> None:
    loose = measured(built(added, "method.aggregate.max_norm=1e6"), num_rounds=2)
    plain = measured(built("ffa_lora"), num_rounds=2)
    assert loose.aggregate == plain.aggregate == "exact" and loose.up == plain.up == "R D"
    assert measured(built(added, "method.aggregate.max_norm=0.01"), num_rounds=2).aggregate == "biased"
