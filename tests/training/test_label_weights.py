"""Declared weights of labels scale the loss of an example before its clip, in every engine, and nothing else.

Mutants this file kills: weights that act after the clip; weights divided by those of the batch, as torch's own
weighted mean does; an engine, the parity check or a device that trains without them.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import closing

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.peft_state import train_only
from fedlr.models.tuners import TUNERS
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool
from fedlr.simulations.tuner_measure.measure import subject
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import (
    LabelWeighted,
    LossOfLogits,
    PerExampleLoss,
    class_losses,
    cross_entropy,
    weighted_cross_entropy,
)
from fedlr.training.functorch import FunctorchGradients
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, Gradients, HookGradients, LoopGradients, SumGradients
from tests.client.device_files import terms_tree
from tests.simulations.small_runs import experiment, federation
from tests.training.small_models import B_AND_HEAD, batch, difference, joint_norm, random_rows, small_model

ENGINES = (HookGradients, GhostGradients, LoopGradients, FusedGradients, FunctorchGradients)
WEIGHTS, HEAVY = (0.5, 1.0, 20.0), (1000.0, 1000.0, 1000.0)
Weighted = Callable[[type, tuple[float, ...]], Gradients]


def made(kind: type, loss: PerExampleLoss) -> Gradients:
    """Return an engine over a model that it can follow: torch.func cannot follow a transformer."""
    if kind is FunctorchGradients:
        of = subject(TUNERS["lora"])
        return FunctorchGradients(of.model, of.trained, loss=loss)
    model = small_model("bert")
    engine: Gradients = kind(model, train_only(model, B_AND_HEAD), loss=loss)
    return engine


def rows_for(kind: type) -> tuple[Mapping[str, Tensor], Tensor]:
    if kind is FunctorchGradients:
        of = subject(TUNERS["lora"])
        return of.batch.inputs, of.batch.targets
    return batch(random_rows(6, seed=3)), torch.tensor([0, 1, 2, 2, -100, 0])


def weighted(kind: type, weights: tuple[float, ...]) -> Gradients:
    return made(kind, LossOfLogits(LabelWeighted(cross_entropy, weights)))


class AfterTheClip:
    """The mutant: every row is clipped first, and its weight multiplies what is left."""

    def __init__(self, kind: type, weights: tuple[float, ...]) -> None:
        self._engine, self._weights = weighted(kind, (1.0,) * len(weights)), weights

    def clipped_sum(self, batch: Batch, *, max_grad_norm: float) -> dict[Slot, Tensor]:
        total: dict[Slot, Tensor] = {}
        for row, label in enumerate(batch.targets.tolist()):
            part = self._engine.clipped_sum(batch.one(row), max_grad_norm=max_grad_norm)
            for slot, value in part.items():
                total[slot] = total.get(slot, torch.zeros(())) + self._weights[max(label, 0)] * value
        return total


def batch_normalised(kind: type, weights: tuple[float, ...]) -> Gradients:
    """The mutant: the weights of a batch sum to one, so a row moves those of all others."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own = torch.tensor(weights)[labels.clamp(min=0)]
        return cross_entropy(logits, labels) * own / own.sum()

    return made(kind, LossOfLogits(loss))


def check_bound(make: Weighted, kind: type) -> None:
    """One row moves the clipped sum by at most C, alone and beside others, whatever its weight."""
    inputs, labels = rows_for(kind)
    for weights in (HEAVY, WEIGHTS):
        engine = make(kind, weights)
        one = {name: tensor[:1] for name, tensor in inputs.items()}
        bound = 0.1
        assert joint_norm(engine.clipped_sum(Batch(one, labels[:1]), max_grad_norm=bound)) <= bound * (1 + 1e-5)
        # Also bounds as large as gradients are: far below them rows are clipped whatever their weights.
        for bound in (0.1, 2.0, 20.0):
            with_all = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)
            for row in range(len(labels)):
                others = torch.arange(len(labels)) != row
                rest = {name: tensor[others] for name, tensor in inputs.items()}
                without = engine.clipped_sum(Batch(rest, labels[others]), max_grad_norm=bound)
                moved = joint_norm(difference(with_all, without))
                assert moved <= bound * (1 + 1e-4) + 1e-6 * joint_norm(with_all)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_row_moves_the_sum_by_at_most_c_with_a_weight_of_a_thousand(kind: type) -> None:
    check_bound(weighted, kind)


@pytest.mark.parametrize("kind", [HookGradients, FusedGradients])
@pytest.mark.parametrize("mutant", [AfterTheClip, batch_normalised])
def test_a_weight_at_the_wrong_place_is_caught(kind: type, mutant: Weighted) -> None:
    with pytest.raises(AssertionError):
        check_bound(mutant, kind)


@pytest.mark.parametrize("kind", [*ENGINES, SumGradients])
def test_without_a_clip_every_gradient_is_multiplied_by_its_weight(kind: type) -> None:
    inputs, labels = rows_for(kind)
    plain, total = made(kind, class_losses), {}
    for row, label in enumerate(labels.tolist()):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        for slot, value in plain.clipped_sum(Batch(one, labels[row : row + 1]), max_grad_norm=math.inf).items():
            total[slot] = total.get(slot, 0.0) + WEIGHTS[max(label, 0)] * value.double()
    found = weighted(kind, WEIGHTS).clipped_sum(Batch(inputs, labels), max_grad_norm=math.inf)
    assert joint_norm(difference(found, total)) <= 1e-5 * joint_norm(total)


def test_without_weights_the_loss_is_the_very_one_of_before() -> None:
    assert weighted_cross_entropy(None, ["a", "b"]) is weighted_cross_entropy({}, ["a", "b"]) is cross_entropy
    assert federation().task._loss._of_logits is cross_entropy


def first_updates(*overrides: str) -> dict[Slot, Tensor]:
    f = federation("privacy=none", *overrides)
    with closing(make_pool(f, None)) as pool:
        (update,) = pool.train(f.request(), [0])
    return {slot: value - f.start.adapter.tensors[slot] for slot, value in update.tensors.items()}


@pytest.mark.parametrize("mode", ["fused", "opacus"])
def test_twice_the_weight_of_every_label_is_twice_the_learning_rate(mode: str) -> None:
    engine = (f"trainer.engine={mode}", "trainer.num_steps=1")
    names = federation().label_names
    doubled = first_updates(*engine, f"data.label_weights={{{','.join(f'{name}:2' for name in names)}}}")
    fast = first_updates(*engine, "trainer.optimizer.lr=2.0")
    assert joint_norm(difference(doubled, fast)) <= 1e-5 * joint_norm(fast)
    assert joint_norm(difference(doubled, first_updates(*engine))) > 0.3 * joint_norm(fast)


def test_a_private_round_with_weights_passes_the_parity_check(tmp_path: object) -> None:
    f = federation("data.label_weights={negative:3}")
    assert f.experiment.trainer.check_parity and f.experiment.trainer.engine == "fused"
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        assert len(list(pool.train(f.request(), [0, 1]))) == 2


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "heavy", "1e12"])
def test_a_weight_that_is_no_positive_number_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"data\.label_weights"):
        experiment(f"data.label_weights={{negative:{value.removeprefix('.')}}}")


def test_a_weight_of_an_unknown_label_is_refused() -> None:
    with pytest.raises(InputError, match="data.label_weights.*'spam'"):
        federation("data.label_weights={spam:2}")


def test_numbers_and_truth_values_are_label_names_as_in_a_table() -> None:
    found = experiment("data.label_weights={0:2,true:3}").data.label_weights
    assert found == {"0": 2.0, "true": 3.0}


def test_terms_carry_weights_and_without_them_are_those_of_before() -> None:
    plain = Terms.model_validate(terms_tree())
    assert "label_weights" not in plain.text() and Terms.read(plain.text()) == plain
    tree = terms_tree({"label_weights": {plain.label_names[0]: 4.0}})
    assert Terms.read(Terms.model_validate(tree).text()).label_weights == {plain.label_names[0]: 4.0}
    for wrong in ({"nobody": 2.0}, {plain.label_names[0]: 0.0}, {plain.label_names[0]: math.inf}, [1.0]):
        with pytest.raises(ValueError, match="label_weights"):
            Terms.model_validate(terms_tree({"label_weights": wrong}))


def test_the_protocol_holds() -> None:
    loss = LabelWeighted(cross_entropy, WEIGHTS)
    assert loss(torch.zeros(2, 3), torch.tensor([2, -100])).tolist() == pytest.approx([20 * math.log(3), 0.0])
