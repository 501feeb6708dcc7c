"""A run whose rate and divisor are auto, from the configuration to what it leaves behind.

Mutants: a twin without privacy at the private rate; a run whose files keep the word.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedlr.errors import InputError
from fedlr.rounds.round import ServerState, scored
from fedlr.simulations.federation import prepare
from fedlr.simulations.simulate import simulate
from fedlr.training.rates import RATE_WITHOUT_NOISE
from tests.simulations.small_runs import experiment, federation, lines

AUTO = ("trainer.optimizer.lr=auto", "trainer.divisor=auto")
BASELINES = ("tracking.run_no_privacy=true", "tracking.run_alone=true")


def rate(training: object) -> float:
    return float(training.optimizer.keywords["lr"])  # type: ignore[attr-defined]


def test_every_part_of_a_federation_has_the_same_numbers() -> None:
    f = federation(*AUTO)
    trainer = f.experiment.trainer
    assert f.mechanism is not None
    assert trainer.divisor == f.training.divisor == f.mechanism.divisor == 4.8  # 0.2 of 96 / 4
    assert trainer.optimizer.section()["lr"] == rate(f.training)
    assert rate(f.without_privacy().training) == RATE_WITHOUT_NOISE != rate(f.training)
    assert rate(f.at_rate_of("alone_lr").training) == f.experiment.tracking.alone_lr != rate(f.training)


def test_a_private_row_more_changes_neither_rate_nor_divisor_of_a_run() -> None:
    words = (*AUTO, "data.public=false", "data.num_test=0.2", "data.max_length=16")
    found = [prepare(experiment(*words, f"data.num_examples={n}"), seed=0) for n in (120, 121)]
    assert found[0].experiment.trainer == found[1].experiment.trainer
    assert found[0].experiment.tracking == found[1].experiment.tracking
    assert found[0].mechanism == found[1].mechanism


def test_a_run_writes_numbers_and_its_arms_differ(tmp_path: Path) -> None:
    words = (*AUTO, *BASELINES, "average_last=2", f"tracking.output_dir={tmp_path}")
    run_dir = simulate(experiment(*words), say=lambda line: None)
    written = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert "auto" not in (run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "auto" not in (run_dir / "report.html").read_text(encoding="utf-8").split("Resolved configuration")[1]
    assert (
        written["trainer"]["divisor"] == json.loads((run_dir / "privacy.json").read_text())["mechanisms"][0]["divisor"]
    )
    assert written["tracking"]["no_privacy_lr"] == RATE_WITHOUT_NOISE
    twin = lines(run_dir / "baselines" / "no_privacy" / "metrics.jsonl")
    assert len(twin) == 3 and twin[-1]["loss"] != lines(run_dir / "metrics.jsonl")[-1]["loss"]


def test_what_is_evaluated_and_exported_is_the_mean_and_what_is_broadcast_is_not(tmp_path: Path) -> None:
    from fedlr.runs.checkpoint import latest_checkpoint
    from fedlr.runs.directory import CHECKPOINTS

    words = ("adapter.train_head=true", "num_rounds=3", f"tracking.output_dir={tmp_path}")
    plain, mean = (simulate(experiment(*words, *more), say=lambda line: None) for more in ((), ("average_last=2",)))
    states: list[ServerState] = []
    for run_dir in (plain, mean):
        found = latest_checkpoint(run_dir / CHECKPOINTS, say=lambda line: None)
        assert found is not None
        states.append(found.state)
    assert states[0].adapter.fingerprint() == states[1].adapter.fingerprint()
    released, summary = scored(states[1]).adapter, json.loads((mean / "summary.json").read_text())
    assert summary["adapter_sha256"] == released.fingerprint() != states[1].adapter.fingerprint()
    exported = load_file(mean / "adapter" / "adapter_model.safetensors")
    head = next(value for slot, value in released.tensors.items() if slot.path.endswith("classifier.weight"))
    assert any(value.shape == head.shape and torch.equal(value, head) for value in exported.values())
    rows = [lines(run_dir / "metrics.jsonl") for run_dir in (plain, mean)]
    assert rows[0][:2] == rows[1][:2] and rows[0][2]["loss"] != rows[1][2]["loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("server_momentum=0.5", "method=flora"), "server_momentum=0 for method=flora, which folds"),
        (("server_momentum=0.5", "method=fedyogi"), "whose server has an optimizer of its own, got 0.5"),
        (("server_momentum=0.5", "method=flexlora"), "adapter.train_head=true with server_momentum"),
        (("server_momentum=1",), "server_momentum"),
        (("average_last=3", "method=fedex_lora"), "average_last=1 for method=fedex_lora, which folds"),
        (("average_last=3", "method=rank_growth"), "which changes ranks"),
        (("average_last=3", "method=fedsa_lora"), "which leaves a part of the model with each client"),
        (("average_last=0",), "average_last"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_before_any_work(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(experiment(*words), seed=0)
