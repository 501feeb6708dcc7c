"""vmap(grad) gives the clipped sums of the loop, and refuses what it would get wrong.

Mutants this file kills: norms per tensor instead of joint; a clip that is left out; a row with a nan that spoils the
sum; a gradient that is silently zero; a bank of several layers that is left replaced by a temporary tensor; an empty
micro-batch that raises; randomness that is shared or drawn per row without a word.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.models.tuners import TUNERS
from fedlr.simulations.tuner_measure.measure import subject
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses
from fedlr.training.functorch import FunctorchGradients, hook_rows, loop_rows
from fedlr.training.gradients import LoopGradients


def engines(name: str) -> tuple[FunctorchGradients, LoopGradients, dict[str, Tensor], Tensor]:
    made = subject(TUNERS[name])
    given = made.model, made.trained
    both = FunctorchGradients(*given, loss=class_losses), LoopGradients(*given, loss=class_losses)
    return *both, dict(made.batch.inputs), made.batch.targets


def joint_norm(tensors: dict[Slot, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


@pytest.mark.parametrize("name", ["lora", "vera", "dora", "vblora", "conv_lora", "trainable_tokens"])
@pytest.mark.parametrize("bound", [1e-3, 0.3, math.inf])
def test_clipped_sums_are_those_of_the_loop(name: str, bound: float) -> None:
    functorch, loop, inputs, labels = engines(name)
    found = functorch.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)
    expected = loop.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)
    assert list(found) == list(expected) == sorted(found)
    for slot, tensor in expected.items():
        assert found[slot].dtype == torch.float32
        torch.testing.assert_close(found[slot], tensor, rtol=1e-5, atol=1e-6 * joint_norm(expected))


def test_one_example_moves_the_sum_by_no_more_than_the_bound_in_joint_norm() -> None:
    functorch, _, inputs, labels = engines("dora")
    one = functorch.clipped_sum(Batch({name: t[:1] for name, t in inputs.items()}, labels[:1]), max_grad_norm=1e-3)
    assert joint_norm(one) == pytest.approx(1e-3, rel=1e-5)


def test_a_row_that_is_not_finite_counts_as_zero() -> None:
    functorch, loop, inputs, labels = engines("vera")
    spoiled = {"x": inputs["x"].clone()}
    spoiled["x"][1] = math.nan
    found = functorch.clipped_sum(Batch(spoiled, labels), max_grad_norm=0.3)
    kept = [0, 2, 3]
    expected = loop.clipped_sum(Batch({"x": inputs["x"][kept]}, labels[kept]), max_grad_norm=0.3)
    for slot, tensor in expected.items():
        torch.testing.assert_close(found[slot], tensor, rtol=1e-5, atol=1e-7)


def test_an_empty_micro_batch_gives_zeros() -> None:
    functorch, _, inputs, labels = engines("vera")
    found = functorch.clipped_sum(Batch({"x": inputs["x"][:0]}, labels[:0]), max_grad_norm=1.0)
    assert found and all(not tensor.any() for tensor in found.values())


@pytest.mark.parametrize("name", ["vblora", "unilora", "tinylora"])
def test_a_bank_that_layers_share_is_the_same_parameter_afterwards(name: str) -> None:
    made = subject(TUNERS[name])
    before = {path: id(p) for path, p in made.model.named_parameters(remove_duplicate=False)}
    rows = FunctorchGradients(made.model, made.trained, loss=class_losses).rows(made.batch)
    assert {path: id(p) for path, p in made.model.named_parameters(remove_duplicate=False)} == before
    expected = loop_rows(made.model, made.trained, made.batch, loss=class_losses)
    for slot, row in expected.items():
        torch.testing.assert_close(rows[slot], row)


class KeepsACopy(nn.Module):
    """The bug: the forward pass reads a tensor that is not the parameter, so torch.func never sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))
        self.hidden = [self.weight]

    def forward(self, x: Tensor) -> object:
        return type("Output", (), {"logits": x @ self.hidden[0].T + self.bias})


class Outside(nn.Module):
    """A head that is right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> object:
        return type("Output", (), {"logits": x @ self.weight.T + self.bias})


def head_engine(model: nn.Module) -> FunctorchGradients:
    trained = {Slot(name, "head"): parameter for name, parameter in model.named_parameters()}
    return FunctorchGradients(model, trained, loss=class_losses)


def test_a_gradient_that_is_silently_missing_is_refused() -> None:
    x, labels = torch.randn(2, 4), torch.tensor([0, 2])
    assert len(head_engine(Outside()).rows(Batch({"x": x}, labels))) == 2
    with pytest.raises(InputError, match="weight left out"):
        head_engine(KeepsACopy()).rows(Batch({"x": x}, labels))


def test_a_random_forward_pass_is_refused() -> None:
    model = nn.Sequential()
    model.head, model.dropout = Outside(), nn.Dropout(0.5)
    model.forward = lambda x: model.head(model.dropout(x))
    with pytest.raises(InputError, match="torch.func can follow"):
        head_engine(model).rows(Batch({"x": torch.randn(2, 4)}, torch.tensor([0, 2])))


@pytest.mark.parametrize("name", ["c3a", "randlora", "velora"])
def test_code_that_torch_func_cannot_follow_is_refused_and_not_wrong(name: str) -> None:
    made = subject(replace(TUNERS[name], path="vmap"))
    with pytest.raises(InputError, match="use gradients by a loop"):
        FunctorchGradients(made.model, made.trained, loss=class_losses).rows(made.batch)


@pytest.mark.parametrize("name", ["vera", "c3a", "dora"])
def test_opacus_says_so_where_its_hooks_see_nothing(name: str) -> None:
    made = subject(TUNERS[name])
    with pytest.raises((ValueError, TypeError)):
        hook_rows(made.model, made.trained, made.batch, loss=class_losses)
    # and leaves nothing behind that would stop the right path
    assert loop_rows(made.model, made.trained, made.batch, loss=class_losses)
