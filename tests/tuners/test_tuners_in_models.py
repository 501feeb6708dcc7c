"""Every tuner gets the loop's clipped sums inside transformers, which torch.func cannot follow as a whole.

Mutants this file kills: copies that meet the rows of another example; one copy for all; a layer that is used twice and
counted once; a stand-in for `forward` that outlives its pass; a layer that merges examples into one axis, or reads a
second tensor.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import BdLoraConfig
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.models.starts.tuner_starts import PublicBatch
from fedlr.models.tuners import TUNERS
from fedlr.models.tuners.build import build, trained_parameters
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses, token_losses
from fedlr.training import copies
from fedlr.training.copies import CopiesGradients, SplitGradients
from fedlr.training.functorch import FunctorchGradients, loop_rows
from fedlr.training.gradients import LoopGradients
from fedlr.training.tuner_gradients import engine
from tests.training.small_models import BUILDERS, QUERY_VALUE, difference, examples_of, joint_norm, mutant

BOUND = 0.05
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ln_tuning": {"target_modules": ["LayerNorm"]},
    "trainable_tokens": {"target_modules": ["word_embeddings"], "token_indices": [5, 6, 7]},
    "bdlora": {"target_modules": ["query", "value"], "use_bdlora": BdLoraConfig(["query"], ["value"], nblocks=2)},
    "lokr": {"target_modules": ["query", "value"], "r": 1},
}
IN_TEXT = [name for name, entry in TUNERS.items() if not entry.reads_task and entry.network != "convolution"]


def adapted(architecture: str, name: str) -> tuple[nn.Module, dict[Slot, nn.Parameter], dict[str, Tensor], Tensor]:
    """A random network with a tuner far from its start, and four examples."""
    inputs, labels = examples_of(architecture, 4)
    arguments = ARGUMENTS.get(name, {"target_modules": QUERY_VALUE[architecture]})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = BUILDERS[architecture]()
        model = build(network, TUNERS[name], public=PublicBatch(Batch(inputs, labels), class_losses), **arguments)
        trained = trained_parameters(model, TUNERS[name])
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, trained, inputs, labels


@pytest.mark.parametrize("name", IN_TEXT)
def test_every_tuner_gets_the_sums_of_the_loop_in_an_encoder(name: str) -> None:
    model, trained, inputs, labels = adapted("bert", name)
    expected = LoopGradients(model, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=BOUND)
    way = engine(TUNERS[name], model, trained, loss=class_losses)
    found = way.clipped_sum(Batch(inputs, labels), max_grad_norm=BOUND)
    way.close()
    assert joint_norm(difference(found, expected)) < 1e-5 * BOUND * 4
    assert not any("forward" in vars(module) for module in model.modules())


def largest_error(found: Mapping[Slot, Tensor], expected: Mapping[Slot, Tensor]) -> float:
    return max(float((found[slot] - row).abs().max() / row.abs().max()) for slot, row in expected.items())


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("kind", [CopiesGradients, SplitGradients])
def test_copies_find_each_examples_gradient_in_every_architecture(
    architecture: str, kind: type[CopiesGradients]
) -> None:
    model, trained, inputs, labels = adapted(architecture, "vera")
    loss = token_losses if architecture == "llama_lm" else class_losses
    expected = loop_rows(model, trained, Batch(inputs, labels), loss=loss)
    assert largest_error(kind(model, trained, loss=loss).rows(Batch(inputs, labels)), expected) < 1e-5


def fault(module: ModuleType) -> float:
    """How wrong either way is in an encoder that calls its layers once, or twice; infinity if it leaves a trace."""
    errors = []
    for architecture in ("bert", "albert"):
        model, trained, inputs, labels = adapted(architecture, "vera")
        expected = loop_rows(model, trained, Batch(inputs, labels), loss=class_losses)
        for kind in (module.CopiesGradients, module.SplitGradients):
            errors.append(largest_error(kind(model, trained, loss=class_losses).rows(Batch(inputs, labels)), expected))
            left = [part for part in model.modules() if vars(part).pop("forward", None)]
            errors.append(float("inf") if left else 0.0)
    return max(errors)


@pytest.mark.parametrize(
    "change",
    [
        ("others, words))(mine, x)", "others, words))(mine, x.roll(1, 0)).roll(-1, 0)"),
        ("slot: copy[row] for slot", "slot: copy[0] for slot"),
        ('call.layer.__dict__.pop("forward", None)', "pass"),
    ],
    ids=["the row of another example", "one copy for all", "a forward that stays"],
)
def test_each_mutant_of_the_copies_is_caught(change: tuple[str, str]) -> None:
    assert fault(copies) < 1e-5
    assert fault(mutant(copies, change)) > 1e-2


def test_a_text_model_cannot_be_followed_as_a_whole() -> None:
    model, trained, inputs, labels = adapted("bert", "vera")
    with pytest.raises(InputError, match="torch.func can follow"):
        FunctorchGradients(model, trained, loss=class_losses).rows(Batch(inputs, labels))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Head(nn.Module):
    """A linear layer that reads its input in one of three ways."""

    def __init__(self, *, way: str = "apart") -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3) if way == "unused" else None

    def forward(self, x: Tensor) -> Output:
        if self.way == "merged":
            return Output(self.linear(x.flatten(0, 1)).view(len(x), -1, 3).mean(dim=1))
        return Output(self.linear(x).mean(dim=1))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def rows_of(model: nn.Module) -> dict[Slot, Tensor]:
    trained = {Slot(name, "head"): parameter for name, parameter in model.named_parameters()}
    inputs, labels = {"x": torch.randn(2, 5, 4)}, torch.tensor([0, 2])
    return CopiesGradients(model, trained, loss=class_losses).rows(Batch(inputs, labels))


def test_what_would_be_wrong_is_refused() -> None:
    assert len(rows_of(Head())) == 2
    with pytest.raises(InputError, match="merged into one axis"):
        rows_of(Head(way="merged"))
    with pytest.raises(InputError, match="left out"):
        rows_of(Head(way="unused"))
    noisy = Head()
    noisy.linear = Noisy(4, 3)
    with pytest.raises(InputError, match="torch.func can follow"):
        rows_of(noisy)


def test_a_pass_that_raises_leaves_the_model_as_it_was() -> None:
    model, trained, inputs, labels = adapted("bert", "vera")

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("a loss that fails")

    with pytest.raises(RuntimeError, match="a loss that fails"):
        CopiesGradients(model, trained, loss=broken).rows(Batch(inputs, labels))
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_empty_micro_batch_gives_zeros() -> None:
    model, trained, inputs, labels = adapted("bert", "vera")
    nobody = {name: rows[:0] for name, rows in inputs.items()}
    found = CopiesGradients(model, trained, loss=class_losses).clipped_sum(Batch(nobody, labels[:0]), max_grad_norm=1.0)
    assert found.keys() == trained.keys() and not any(tensor.any() for tensor in found.values())


def test_a_layer_that_reads_a_second_tensor_is_refused() -> None:
    from fedlr.simulations.tuner_measure.measure import subject

    made = subject(TUNERS["mhr"])
    with pytest.raises(InputError, match="use gradients by a loop"):
        SplitGradients(made.model, made.trained, loss=class_losses).rows(made.batch)
