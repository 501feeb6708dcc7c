"""Every method trains every task, with and without privacy, up to an adapter that is left behind; the rest is refused.

In the fast suite a method of each form: one that folds into the base, one with memory, one whose ranks change, and one
that reads the model.
"""

import json
import math
from pathlib import Path

import pytest

from fedlr.config.schema import CONFIGS, compose_experiment
from fedlr.errors import InputError
from fedlr.simulations.federation import prepare
from fedlr.simulations.simulate import simulate

METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
FORMS = ("flora", "scaffold", "rank_budget", "layer_mean")
FEW = ("num_rounds=2", "num_clients=2", "cohort_size=2", "data.num_examples=60", "data.num_test=0.3")
BASELINES = ("tracking.run_alone=false", "tracking.run_no_privacy=false")
NEEDS = {"head": ("adapter.train_head=true",)}


def trains(folder: Path, experiment: str, method: str, privacy: str) -> None:
    words = [f"experiment={experiment}", f"method={method}", f"privacy={privacy}", *FEW, *BASELINES]
    words += [*NEEDS.get(method, ()), f"tracking.output_dir={folder}"]
    run_dir = simulate(compose_experiment(words), say=lambda line: None)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["problem"] is None and math.isfinite(summary["final_loss"])
    assert (summary["epsilon_max"] is None) is (privacy == "none")
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", FORMS)
def test_methods_of_each_form_train_a_language_model(method: str, tmp_path: Path) -> None:
    trains(tmp_path, "tiny_lm", method, "dp")


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["none", "dp"])
@pytest.mark.parametrize("experiment", ["tiny_lm", "tiny_images"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_task(method: str, experiment: str, privacy: str, tmp_path: Path) -> None:
    if (experiment, method) == ("tiny_lm", "head"):
        pytest.skip("refused: below")
    trains(tmp_path, experiment, method, privacy)


def test_a_method_that_trains_a_head_is_refused_by_a_language_model() -> None:
    with pytest.raises(InputError, match="a method that trains LoRA with task=causal_lm, such as fedsvd, got head"):
        prepare(compose_experiment(["experiment=tiny_lm", "method=head", *FEW]), seed=0)
