"""What cannot move is refused before any budget is spent, and the look leaves the model as it was.

Mutants: the look at the adapter that PEFT drew, not at the start; a look that leaves other values, flags or modes.
"""

from pathlib import Path

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState
from fedlr.config.build import build, build_method
from fedlr.errors import InputError
from fedlr.models.network import AdaptedModel
from fedlr.models.peft_state import read_adapter, train_only
from fedlr.models.tuners.attach import attach
from fedlr.simulations import cli
from fedlr.tasks.text_classification import TextClassification
from fedlr.training.moves import check_moves, largest_gradient
from tests.simulations.small_runs import experiment

A, B = frozenset({LORA_A}), frozenset({LORA_B})


TEXTS = TextClassification()


def lora() -> AdaptedModel:
    e = experiment()
    base = build(e.model.section(), "model", label_names=("a", "b"), seed=0)
    return attach(base, e.adapter, seed=0)


def with_some_B(adapter: AdapterState) -> AdapterState:
    return adapter.with_tensors({s: torch.ones_like(t) for s, t in adapter.tensors.items() if s.role == LORA_B})


def test_a_block_moves_where_the_start_lets_it() -> None:
    model = lora()
    zero = read_adapter(model)
    with pytest.raises(InputError, match="a gradient at the start, got lora_A"):
        check_moves(model, zero, A, task=TEXTS, max_grad_norm=1.0)
    assert check_moves(model, zero, B, task=TEXTS, max_grad_norm=1.0) is None
    assert check_moves(model, zero, A | B, task=TEXTS, max_grad_norm=1.0) is None
    assert check_moves(model, with_some_B(zero), A, task=TEXTS, max_grad_norm=1.0) is None  # a start of pissa's kind
    no_A = zero.with_tensors({s: torch.zeros_like(t) for s, t in zero.tensors.items() if s.role == LORA_A})
    with pytest.raises(InputError, match="got lora_B"):
        check_moves(model, no_A, B, task=TEXTS, max_grad_norm=None)


def test_a_clip_bound_far_above_the_gradients_is_told() -> None:
    model = lora()
    start = read_adapter(model)
    norm = largest_gradient(model, start, B, task=TEXTS)
    assert 0.01 < norm < 100
    told = check_moves(model, start, B, task=TEXTS, max_grad_norm=200 * norm)
    assert told is not None and "privacy.max_grad_norm" in told and f"{norm:.1g}" in told
    assert check_moves(model, start, B, task=TEXTS, max_grad_norm=50 * norm) is None
    assert check_moves(model, start, B, task=TEXTS, max_grad_norm=None) is None


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = lora()
    start = read_adapter(model)
    broken = start.with_tensors({s: t.fill_(float("nan")) for s, t in start.tensors.items() if s.role == LORA_B})
    with pytest.raises(InputError, match="finite gradients"):
        check_moves(model, broken, B, task=TEXTS, max_grad_norm=1.0)


def test_the_look_leaves_the_model_as_it_was() -> None:
    model = lora()
    train_only(model, A)
    model.eval()
    before, flags = read_adapter(model), [p.requires_grad for p in model.parameters()]
    check_moves(model, with_some_B(before), B, task=TEXTS, max_grad_norm=1.0)
    assert read_adapter(model).fingerprint() == before.fingerprint()
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    assert all(p.grad is None for p in model.parameters())


STUCK = {
    "method=ffa_lora method.block_schedule.roles=[lora_A]": "got lora_A",
    "method=fedavgm method.block_schedule.roles=[lora_A]": "got lora_A",
    "method=rolora method.block_schedule.roles=[lora_A,lora_B]": "got lora_A",
    "method=fedavg method.block_schedule.block=lora_A": "got lora_A",
    "adapter=vera method=fedavg method.block_schedule.block=lambda_d trainer.engine=opacus": "is zero",
    "adapter=tuner adapter.system=adalora method=fedavg trainer.engine=opacus": "method=rank_budget",
    "adapter=tuner adapter.system=lora_plus method=fedavg trainer.engine=opacus": "adapter=lora trainer=lora_plus",
    "trainer=lora_plus method=fedsvd": "such as fedit, got fedsvd",
    "trainer=lora_plus method=fedit trainer.optimizer._target_=torch.optim.Adam": "SGD",
}


@pytest.mark.parametrize(("typed", "fragment"), STUCK.items(), ids=STUCK)
def test_what_cannot_move_or_is_not_what_it_is_called_is_refused_before_a_run(
    typed: str, fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["experiment=tiny", "data.num_examples=60", "data.num_test=20", f"tracking.output_dir={tmp_path}/runs"]
    assert cli.simulate([*small, *typed.split()]) == 2
    told = capsys.readouterr().err
    assert fragment in told and told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trainer", ["lora_plus", "scaled_gradient"])
def test_the_trainers_with_a_rule_are_built_with_it(trainer: str) -> None:
    e = experiment(f"trainer={trainer}", "method=fedit")
    assert e.trainer.after_noise is not None and e.trainer.num_steps == 2
    assert build_method(e).name == "fedit"
