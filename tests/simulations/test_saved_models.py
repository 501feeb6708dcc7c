"""Checkpoints that were saved and loaded train with a head, and their model card gives the run's own score.

Every family is tiny and has random weights (`tests/families.py`). The Python of each card is run as it stands, in a
fresh process, in the adapter's folder.
"""

import json
import subprocess
import sys
from pathlib import Path

from fedlr.assembly import load_examples
from fedlr.experiment import compose_experiment
from fedlr.usage import code_of_card
from simulations.simulate import simulate
from tests.families import FAMILIES, save_family

FAST = (
    "experiment=tiny",
    "model=pretrained",
    "data.num_examples=60",
    "data.num_test=12",
    "data.max_length=32",
    "num_clients=2",
    "cohort_size=2",
    "num_rounds=1",
    "trainer.num_steps=2",
    "trainer.sample_rate=0.5",
    "trainer.divisor=10",
    "runtime.num_workers=1",
    "tracking.run_no_privacy=false",
    "tracking.run_alone=false",
    "adapter.train_head=true",
    "seed=3",
)

# Runs several cards one after another, each in its own folder and namespace, and scores the texts it is given.
RUNNER = """
import json, os, sys, torch
found = {}
for name, case in json.load(open(sys.argv[1])).items():
    os.chdir(case["folder"])
    space = {"__name__": "__main__"}
    exec(compile(case["code"], name, "exec"), space)
    chances = space["classify"](case["texts"])
    found[name] = -torch.log(chances[range(len(chances)), case["labels"]]).mean().item()
json.dump(found, open(sys.argv[2], "w"))
"""


def overrides(name: str, base: Path, output: Path) -> list[str]:
    family = FAMILIES[name]
    return [
        *FAST,
        f"model.name_or_path={base}",
        f"adapter.target_modules=[{','.join(family.targets)}]",
        f"tracking.output_dir={output}",
        *family.trainer,
    ]


def run(name: str, folder: Path, *more: str) -> tuple[Path, dict]:
    """Train a family; return its directory, and what its card is asked."""
    chosen = [*overrides(name, save_family(name, folder / "base"), folder / "out"), *more]
    run_dir = simulate(compose_experiment(chosen), say=lambda line: None)
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    _, held_out = load_examples(compose_experiment(chosen), seed=3)
    case = {"folder": str(run_dir / "adapter"), "code": code_of_card(card), "texts": list(held_out.texts)}
    return run_dir, {**case, "labels": held_out.labels.tolist()}


def own_loss(run_dir: Path) -> float:
    return float(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


def card_losses(cases: dict[str, dict], folder: Path) -> dict[str, float]:
    asked, told = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps(cases))
    call = [sys.executable, "-c", RUNNER, str(asked), str(told)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(told.read_text())


def test_every_family_trains_and_its_card_gives_the_runs_own_score(tmp_path: Path) -> None:
    runs = {name: run(name, tmp_path / name.replace(" ", "_")) for name in FAMILIES}
    found = card_losses({name: case for name, (_, case) in runs.items()}, tmp_path)
    differences = {name: abs(found[name] - own_loss(run_dir)) for name, (run_dir, _) in runs.items()}
    assert max(differences.values()) <= 1e-4, differences
