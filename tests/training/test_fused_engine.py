"""What the fused engine takes from a model, how it leaves it, and what it refuses.

Parity with the other engines is in test_gradient_engines.py, sensitivity in test_sensitivity.py, sums of many clients
in test_fused_sums.py. Mutants this file kills: a copy of the model's tensors; values kept from an earlier call; over a
bfloat16 base, norms of rounded gradients, gradients rounded after their norm, and rounded clip weights.
"""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters.state import LORA_A, LORA_B, Block
from fedlr.errors import InputError
from fedlr.models.peft_state import adapter_parameters, train_only
from fedlr.models.precision import with_bfloat16_base
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import LossOfLogits, class_losses, cross_entropy, token_losses
from fedlr.training import fused as shipped
from fedlr.training.fused import FusedGradients, check_fused
from fedlr.training.gradients import HookGradients, LoopGradients
from fedlr.training.supported import check_supported
from tests.training.cohort_runs import engine_over
from tests.training.small_models import (
    A_AND_B,
    B_AND_HEAD,
    B_ONLY,
    BUILDERS,
    EVERYTHING,
    QUERY_VALUE,
    difference,
    examples_of,
    joint_norm,
    mutant,
    small_model,
)


def loss_of(architecture: str) -> Callable:
    return token_losses if architecture == "llama_lm" else class_losses


def sum_of(engine: type, model: nn.Module, block: Block, architecture: str, *, bound: float = 0.5) -> dict:
    gradients = engine(model, train_only(model, block), loss=loss_of(architecture))
    inputs, labels = examples_of(architecture, 6)
    if next(model.parameters()).dtype == torch.float64:
        inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    total = gradients.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)
    gradients.close()
    return total


@pytest.mark.parametrize("architecture", BUILDERS)
def test_over_a_base_in_float64_it_is_right_to_float32(architecture: str) -> None:
    for block in (B_ONLY, frozenset({LORA_A}), A_AND_B):
        model = small_model(architecture, targets="all-linear").double()
        got, wanted = (sum_of(engine, model, block, architecture) for engine in (FusedGradients, LoopGradients))
        # Factors are read in float64 and gradients summed in float32; measured at most 1.2e-7.
        assert joint_norm(difference(got, wanted)) <= 1e-6 * joint_norm(wanted)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_over_a_base_in_bfloat16_it_is_near_float32(architecture: str) -> None:
    for block in (B_ONLY, B_AND_HEAD if architecture != "llama_lm" else A_AND_B):
        model = small_model(architecture)
        truth = sum_of(LoopGradients, model, block, architecture)
        got = sum_of(FusedGradients, with_bfloat16_base(model).train(), block, architecture)
        assert all(value.dtype == torch.float32 for value in got.values())
        # Eight binary digits an activation, and weights ten times as large as usual: measured at most 0.06, the same as
        # plain autograd over that base. On a pretrained encoder both are at 0.02. LoRA on all layers of these networks
        # is so badly conditioned that both are off by up to 0.46.
        assert 1e-4 < joint_norm(difference(got, truth)) / joint_norm(truth) <= 0.1


def check_bound_over_bfloat16(make_engine: Callable, architecture: str, block: Block) -> None:
    """No example adds more than C, to a part in a million."""
    bound = 0.02
    low = with_bfloat16_base(small_model(architecture, targets="all-linear")).train()
    inputs, labels = examples_of(architecture, 12)
    engine = make_engine(low, train_only(low, block), loss=loss_of(architecture))
    for row in range(len(labels)):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        norm = joint_norm(engine.clipped_sum(Batch(one, labels[row : row + 1]), max_grad_norm=bound))
        assert 0.999 * bound < norm <= bound * (1 + 1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "gpt2", "vit", "albert"])
def test_over_a_base_in_bfloat16_no_example_adds_more_than_the_bound(architecture: str) -> None:
    check_bound_over_bfloat16(FusedGradients, architecture, EVERYTHING)


BFLOAT16_SUMS = {
    "norms of rounded gradients": (
        "torch.linalg.vector_norm(self.values, dim=1, dtype=torch.float64)",
        "torch.linalg.vector_norm(self.values.bfloat16(), dim=1, dtype=torch.float64)",
    ),
    "gradients rounded after their norm": (
        "torch.mm(weights, self.values, out=out)",
        "out.copy_(weights.bfloat16() @ self.values.bfloat16())",
    ),
}


@pytest.mark.parametrize("name", BFLOAT16_SUMS)
def test_clipping_in_bfloat16_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_bound_over_bfloat16(engine_over(BFLOAT16_SUMS[name]), "bert", A_AND_B)


def test_clip_weights_in_bfloat16_are_caught() -> None:
    change = (
        "where(norms < LARGEST_GHOST_NORM, 0.0).float()",
        "where(norms < LARGEST_GHOST_NORM, 0.0).bfloat16().float()",
    )
    with pytest.raises(AssertionError):
        check_bound_over_bfloat16(mutant(shipped, change).FusedGradients, "bert", A_AND_B)


def check_it_copies_no_tensor(make_engine: Callable) -> None:
    """All of the model's numbers stay the model's; its modules, modes, flags and hooks too."""
    model = small_model(targets="all-linear").eval()
    trained = train_only(model, EVERYTHING)
    modules, own = dict(model.named_modules()), {id(t) for t in [*model.parameters(), *model.buffers()]}
    flags = [p.requires_grad for p in model.parameters()]
    engine = make_engine(model, trained, loss=class_losses)
    held = [*engine._model.parameters(), *engine._model.buffers()]
    assert held
    assert all(id(tensor) in own for tensor in held)
    inputs, labels = examples_of("bert", 4)
    engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_copies_no_tensor_and_leaves_the_model_as_it_was() -> None:
    check_it_copies_no_tensor(FusedGradients)


def test_a_copy_of_the_tensors_is_caught() -> None:
    heavy = mutant(shipped, ("first_token_only(model)", "first_token_only(__import__('copy').deepcopy(model))"))
    with pytest.raises(AssertionError):
        check_it_copies_no_tensor(heavy.FusedGradients)


def check_it_uses_the_values_of_the_moment(make_engine: Callable) -> None:
    """Change, in place, what is frozen and what trains: the next sum is that of the new values."""
    model = small_model()
    trained = train_only(model, B_ONLY)
    engine = make_engine(model, trained, loss=class_losses)
    oracle = LoopGradients(model, trained, loss=class_losses)
    inputs, labels = examples_of("bert", 5)
    parameters, sums = adapter_parameters(model), []
    factors = {role: next(p for slot, p in parameters.items() if slot.role == role) for role in (LORA_A, LORA_B)}
    base = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight
    for changed in (*factors.values(), base, model.base_model.model.classifier.modules_to_save.default.weight):
        with torch.no_grad():
            changed.mul_(1.3)
        got, wanted = (e.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5) for e in (engine, oracle))
        assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted)
        assert all(joint_norm(difference(got, earlier)) > 1e-3 * joint_norm(wanted) for earlier in sums)
        sums.append(wanted)


def test_it_uses_the_values_of_the_moment() -> None:
    check_it_uses_the_values_of_the_moment(FusedGradients)


TAKES_SHARED = "        self.trains = {"
KEPT = {
    "a factor": f"        self.factors[LORA_A] = self.factors[LORA_A].detach().clone()\n{TAKES_SHARED}",
    "the base": f"        self.base_layer = __import__('copy').deepcopy(self.base_layer)\n{TAKES_SHARED}",
}


@pytest.mark.parametrize("name", KEPT)
def test_values_that_are_kept_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_it_uses_the_values_of_the_moment(engine_over((TAKES_SHARED, KEPT[name])))


class Abort(Exception):
    """Stands for a signal, a time limit or an out-of-memory error."""


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_no_activation_outlives_a_call(fails: bool) -> None:
    model, seen = small_model(), []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if fails:
            raise Abort
        return cross_entropy(logits, labels)

    engine = FusedGradients(model, train_only(model, EVERYTHING), loss=LossOfLogits(loss))
    for module in engine._model.modules():
        if type(module).__name__.startswith("Stacked"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(weakref.ref(output)))
    inputs, labels = examples_of("bert", 4)
    try:
        engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    except Abort:
        assert fails
    assert len(seen) >= 4
    assert not any(output() is not None for output in seen)


class NormedHead(nn.Module):
    """A head with a layer norm, as some models have."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.norm(hidden[:, 0]))


def with_normed_head(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def build() -> nn.Module:
        network = BUILDERS["roberta"]()
        network.classifier = NormedHead(16, 3)
        return network

    monkeypatch.setitem(BUILDERS, "normed", build)
    monkeypatch.setitem(QUERY_VALUE, "normed", ["query", "value"])
    return small_model("normed")


def test_a_head_that_is_not_linear_is_refused_by_name_and_served_by_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_normed_head(monkeypatch)
    check_supported(model, B_AND_HEAD)
    place = "LayerNorm at base_model.model.classifier.norm; set trainer.engine=opacus"
    with pytest.raises(InputError, match=place):
        check_fused(model, B_AND_HEAD)
    with pytest.raises(InputError, match=place):
        FusedGradients(model, train_only(model, B_AND_HEAD), loss=class_losses)
    got, wanted = (sum_of(engine, model, B_AND_HEAD, "roberta") for engine in (HookGradients, LoopGradients))
    assert any(slot.path.endswith("norm.weight") for slot in got)
    assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted)


def test_a_head_that_is_not_linear_is_served_where_it_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_normed_head(monkeypatch)
    check_fused(model, A_AND_B)
    got, wanted = (sum_of(engine, model, A_AND_B, "roberta") for engine in (FusedGradients, LoopGradients))
    assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted)


class TwiceHead(nn.Module):
    """A head whose one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.out(hidden[:, 0]).tanh())


class EveryTokenHead(nn.Module):
    """A head that reads all tokens, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(hidden).tanh().sum(dim=1)


@pytest.mark.parametrize("head", [TwiceHead, EveryTokenHead])
def test_a_head_may_be_used_twice_or_on_every_token(monkeypatch: pytest.MonkeyPatch, head: type[nn.Module]) -> None:
    def build() -> nn.Module:
        network = BUILDERS["roberta"]()
        network.classifier = head()
        return network

    monkeypatch.setitem(BUILDERS, "headed", build)
    monkeypatch.setitem(QUERY_VALUE, "headed", ["query", "value"])
    model = small_model("headed")
    got, wanted = (sum_of(engine, model, EVERYTHING, "bert") for engine in (FusedGradients, LoopGradients))
    assert any(slot.path.endswith("out.bias") and value.any() for slot, value in got.items())
    assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted)


class OtherLinear(nn.Linear):
    """A linear layer that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_only_looks_linear_is_refused_under_lora_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        network = BUILDERS["bert"]()
        attention = network.bert.encoder.layer[1].attention.self
        attention.query = copy.copy(attention.query)
        attention.query.__class__ = OtherLinear
        return network

    monkeypatch.setitem(BUILDERS, "other", build)
    monkeypatch.setitem(QUERY_VALUE, "other", ["query", "value"])
    model = small_model("other")
    with pytest.raises(
        InputError, match=r"OtherLinear at .*layer\.1\.attention\.self\.query; set trainer.engine=opacus"
    ):
        check_fused(model, B_ONLY)
    got, wanted = (sum_of(engine, model, B_ONLY, "bert") for engine in (HookGradients, LoopGradients))
    assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_what_is_supported_is_served(architecture: str) -> None:
    model = small_model(architecture, targets="all-linear")
    for block in (B_ONLY, EVERYTHING if architecture != "llama_lm" else A_AND_B):
        check_supported(model, block)
        check_fused(model, block)


def test_a_gradient_that_never_came_is_an_error() -> None:
    model = small_model("gpt2")
    model.base_model.model.transformer.h[1].forward = lambda hidden, *_, **__: hidden
    engine = FusedGradients(model, train_only(model, B_ONLY), loss=class_losses)
    inputs, labels = examples_of("gpt2", 3)
    with pytest.raises(ValueError, match=r"Expected a gradient for Slot.*h\.1"):
        engine.clipped_sum(Batch(inputs, labels), max_grad_norm=1.0)


def test_examples_merged_into_one_axis_are_an_error() -> None:
    model = small_model("gpt2")
    engine = FusedGradients(model, train_only(model, B_ONLY), loss=class_losses)
    for module in engine._model.modules():
        if type(module).__name__ == "StackedLora":
            module.forward = merged(module.forward)
    inputs, labels = examples_of("gpt2", 3)
    with pytest.raises(ValueError, match="one gradient an example"):
        engine.clipped_sum(Batch(inputs, labels), max_grad_norm=1.0)


def merged(forward: Callable) -> Callable:
    """Hand a layer the tokens of all examples in one axis."""
    return lambda x: forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
