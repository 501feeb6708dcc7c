"""The Python of a model card is run as it stands, in a fresh process: a base made up, of a package, and of a hub.

Package and cache of the hub are stand-ins on this disk; nothing is fetched. Bases in folders: `test_saved_models.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.models.usage import code_of_card
from fedlr.runs.tables import load_examples
from tests.families import save_family
from tests.simulations.test_saved_models import FAST, RUNNER, own_loss

TRAINER = """
import json, sys
from fedlr.config.schema import compose_experiment
from fedlr.simulations.simulate import simulate
told = {name: str(simulate(compose_experiment(asked), say=print)) for name, asked in json.loads(sys.argv[1]).items()}
json.dump(told, open(sys.argv[2], "w"))
"""


def fresh(code: str, *arguments: str, cwd: Path, env: dict[str, str]) -> None:
    call = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_card_of_every_kind_of_base_gives_the_runs_own_score(tmp_path: Path) -> None:
    base = save_family("bert", tmp_path / "standin_of_a_package" / "model")
    (base.parent / "__init__.py").write_text("")
    cached = tmp_path / "hub" / "models--owner--standin"
    shutil.copytree(base, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    bases = {
        "made": ["model=tiny", "adapter.target_modules=[query,value]"],
        "package": ["model.name_or_path=pkg:standin_of_a_package/model", "adapter.target_modules=[query,value]"],
        "hub": ["model.name_or_path=owner/standin", "adapter.target_modules=[query,value]"],
    }
    fast = {name: [word for word in FAST if name != "made" or not word.startswith("model")] for name in bases}
    asked = {name: [*fast[name], *bases[name], f"tracking.output_dir={tmp_path / name}"] for name in bases}
    fresh(TRAINER, json.dumps(asked), str(tmp_path / "runs.json"), cwd=Path.cwd(), env=env)
    runs = {name: Path(place) for name, place in json.loads((tmp_path / "runs.json").read_text()).items()}
    cases = {}
    for name, run_dir in runs.items():
        _, held_out = load_examples(compose_experiment(asked[name]), seed=3)
        code = code_of_card((run_dir / "adapter" / "README.md").read_text(encoding="utf-8"))
        cases[name] = {"folder": str((run_dir / "adapter").resolve()), "code": code, "texts": list(held_out.texts)}
        cases[name]["labels"] = held_out.labels.tolist()
    assert str(tmp_path) not in cases["package"]["code"] + cases["hub"]["code"]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    fresh(RUNNER, str(tmp_path / "cases.json"), str(tmp_path / "found.json"), cwd=tmp_path, env=env)
    found = json.loads((tmp_path / "found.json").read_text())
    differences = {name: abs(found[name] - own_loss(run_dir)) for name, run_dir in runs.items()}
    assert max(differences.values()) <= 1e-4, differences
