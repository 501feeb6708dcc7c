"""Frozen products by oneDNN are those of PyTorch's default library to rounding, in every engine, whoever else is there.

Mutants this file kills: a gradient by the weight where its transpose belongs, a gradient that stops at a frozen layer,
a bias that gets lost, adapter layers that are swapped too, a rule that looks at the vendor alone.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedlr.errors import InputError
from fedlr.models import products as shipped
from fedlr.models.peft_state import adapter_parameters, train_only
from fedlr.models.precision import with_bfloat16_base
from fedlr.models.products import OneDnnLinear, fastest, has_onednn, is_linear, library_in, library_of, use_library
from fedlr.runs.directory import recorded_experiment, write_origin
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses, token_losses
from fedlr.tasks.token_loss import token_losses as without_logits
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from tests.simulations.small_runs import experiment, federation, rounds
from tests.training.small_models import (
    B_ONLY,
    BUILDERS,
    EVERYTHING,
    difference,
    examples_of,
    joint_norm,
    mutant,
    small_model,
)

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no float32 oneDNN")
ONEDNN = "runtime.matmul=onednn"


class Called(TorchDispatchMode):
    """Counts the products that oneDNN computes."""

    num = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.num += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def sum_of(engine: type, model: nn.Module, block: frozenset, architecture: str, *, rows: slice = slice(None)) -> dict:
    inputs, labels = examples_of(architecture, 6)
    batch = Batch({name: tensor[rows] for name, tensor in inputs.items()}, labels[rows])
    gradients = engine(model, train_only(model, block), loss=token_losses if labels.dim() > 1 else class_losses)
    total = gradients.clipped_sum(batch, max_grad_norm=0.5)
    gradients.close()
    return total


def check_engines(module: ModuleType, architecture: str, block: frozenset, engines: tuple[type, ...]) -> None:
    model = small_model(architecture)
    wanted = sum_of(LoopGradients, model, block, architecture)
    module.use_library(model, "onednn")
    for engine in engines:
        with Called() as called:
            got = sum_of(engine, model, block, architecture)
        assert called.num > 0
        # float32, two roundings apart: measured at most 3e-6
        assert joint_norm(difference(got, wanted)) <= 1e-5 * joint_norm(wanted), engine


@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_engine_finds_the_gradients_of_the_default_library(architecture: str) -> None:
    ghost = () if architecture == "albert" else (GhostGradients,)  # refused where a layer is used twice
    block = B_ONLY if architecture == "llama_lm" else EVERYTHING
    check_engines(shipped, architecture, block, (FusedGradients, HookGradients, *ghost, LoopGradients))


MUTANTS = {
    "the weight itself": ("_frozen(grad, weight.t(), None)", "_frozen(grad, weight, None)"),
    "no gradient": ("_frozen(grad, weight.t(), None)", "torch.zeros_like(grad)"),
    "no bias": (
        "_frozen(input, self.weight, self.bias)",
        "_frozen(input, self.weight, None)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_product_is_noticed(name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):  # some shapes do not even fit
        check_engines(mutant(shipped, MUTANTS[name]), "bert", EVERYTHING, (HookGradients,))


def check_adapter_is_left(module: ModuleType) -> None:
    model = small_model("bert", targets="all-linear")
    module.use_library(model, "onednn")
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert (type(layer) is nn.Linear) == (id(layer.weight) in own)


def test_what_belongs_to_the_adapter_stays_a_layer_of_torch() -> None:
    check_adapter_is_left(shipped)
    changed = mutant(shipped, ("if type(module) in classes and not any(", "if type(module) in classes or any("))
    with pytest.raises((AssertionError, KeyError)):
        check_adapter_is_left(changed)


def test_the_choice_can_be_taken_back_and_copies_nothing() -> None:
    for architecture in ("bert", "gpt2"):
        model = small_model(architecture)
        kinds, places = [type(m) for m in model.modules()], [p.data_ptr() for p in model.parameters()]
        wanted = sum_of(FusedGradients, model, B_ONLY, architecture)
        use_library(model, "onednn")
        assert any(library_in(m) == "onednn" for m in model.modules())
        assert [p.data_ptr() for p in model.parameters()] == places
        use_library(model, "mkl")
        assert [type(m) for m in model.modules()] == kinds
        got = sum_of(FusedGradients, model, B_ONLY, architecture)
        assert all(torch.equal(got[slot], wanted[slot]) for slot in wanted)


def test_a_row_alone_is_what_it_is_among_others_to_rounding() -> None:
    model = small_model("bert")
    use_library(model, "onednn")
    together = sum_of(FusedGradients, model, EVERYTHING, "bert")
    alone = [sum_of(FusedGradients, model, EVERYTHING, "bert", rows=slice(row, row + 1)) for row in range(6)]
    added = {slot: sum(one[slot] for one in alone) for slot in together}
    assert joint_norm(difference(added, together)) <= 1e-6 * joint_norm(together)
    for one in alone:
        assert joint_norm(one) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_layers_are_followed_by_torch_func_and_differentiated_twice(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if kind == "linear" else Conv1D(6, 8)
    holder = nn.Sequential(layer).requires_grad_(False)
    x = torch.randn(5, 3, 8)

    def loss(row: torch.Tensor) -> torch.Tensor:
        return holder(row).square().sum()

    found = []
    for library in ("mkl", "onednn"):
        use_library(holder, library)
        twice = torch.autograd.functional.hessian(loss, x[0])
        found.append((vmap(grad(loss))(x), twice, holder(x.new_empty(0, 8)), holder(x[0, 0])))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_what_is_not_float32_or_trains_goes_pytorchs_way() -> None:
    layer = nn.Linear(8, 6)
    plain = [layer(torch.ones(2, 8)), layer.double()(torch.ones(2, 8).double())]
    layer = layer.float()
    layer.__class__ = OneDnnLinear
    assert is_linear(layer)
    with Called() as called:
        got = [layer(torch.ones(2, 8)), layer.double()(torch.ones(2, 8).double())]
    assert called.num == 0 and all(map(torch.equal, got, plain)) and got[0].requires_grad
    model = small_model("bert")
    low = with_bfloat16_base(model)
    use_library(model, "onednn")
    inputs, _ = examples_of("bert", 4)
    with torch.no_grad():
        assert torch.equal(low(**inputs).logits, with_bfloat16_base(model)(**inputs).logits)


def test_a_loss_without_logits_multiplies_with_the_head_by_the_same_library() -> None:
    model = small_model("llama_lm")
    inputs, labels = examples_of("llama_lm", 4)
    slots = train_only(model, B_ONLY)
    found = []
    for library in ("mkl", "onednn"):
        use_library(model, library)
        with Called() as called:
            losses = without_logits(model, inputs, labels)
            gradients = torch.autograd.grad(losses.sum(), list(slots.values()))
        found.append(gradients)
        assert (called.num > 0) == (library == "onednn")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


PROCESSORS = [  # vendor, family, AVX-512, by oneDNN
    ("AuthenticAMD", "26", True, True),
    ("AuthenticAMD", "27", True, True),
    ("AuthenticAMD", "26", False, False),  # as some virtual machines show it
    ("AuthenticAMD", "25", True, False),
    ("AuthenticAMD", "", True, False),
    ("GenuineIntel", "26", True, False),
    ("GenuineIntel", "6", True, False),
]


def check_rule(module: ModuleType) -> None:
    for vendor, family, wide, by_onednn in PROCESSORS:
        processor = {"vendor_id": vendor, "cpu family": family}
        for has in (True, False):
            found = module.fastest(processor, {"avx512_f": wide}, has_onednn=has)
            assert found == ("onednn" if by_onednn and has else "mkl"), (vendor, family, wide, has)
    assert module.fastest({}, {}, has_onednn=True) == "mkl"


def test_the_rule_takes_onednn_only_where_it_was_measured_ahead() -> None:
    check_rule(shipped)
    for change in (
        ("is_amd and family.isdecimal() and", "family.isdecimal() and"),
        (' and instructions.get("avx512_f")', ""),
    ):
        with pytest.raises(AssertionError):
            check_rule(mutant(shipped, change))


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_of("onednn") == "onednn" and library_of("auto") in ("mkl", "onednn")
    monkeypatch.setattr(shipped, "has_onednn", lambda: False)
    assert library_of("auto") == "mkl"
    with pytest.raises(InputError, match="set runtime.matmul=mkl"):
        library_of("onednn")
    with pytest.raises(InputError, match="auto, mkl or onednn, got 'blas'"):
        library_of("blas")


def test_a_run_keeps_its_library_and_repeats_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = federation(ONEDNN)
    assert any(library_in(m) == "onednn" for m in first.working.modules())
    runs = [rounds(first, tmp_path / "a"), rounds(federation(ONEDNN, "runtime.num_workers=2"), tmp_path / "b")]
    assert runs[0][0] == runs[1][0]
    default = rounds(federation("runtime.matmul=mkl"), tmp_path / "c")
    assert default[0] != runs[0][0]  # other last bits
    scores = [[row["loss"] for row in metrics] for _, metrics, _ in (runs[0], default)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    # What auto stood for is in config.yaml, and whoever resumes goes by it, on another processor too.
    monkeypatch.setattr(shipped, "fastest", lambda *_, has_onednn: "onednn")
    auto = federation.__wrapped__(seed=1)  # neither taken from nor left to other tests
    write_origin(tmp_path, auto.experiment)
    monkeypatch.setattr(shipped, "fastest", lambda *_, has_onednn: "mkl")
    assert recorded_experiment(tmp_path).runtime.matmul == "onednn"
    assert '"matmul": "onednn"' in (tmp_path / "versions.json").read_text()
    assert experiment().runtime.matmul == "auto"


def test_float32_products_differ_by_rounding_alone() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(65, 384), torch.randn(384, 384)
    exact = x.double() @ weight.double().T
    for y in (F.linear(x, weight), shipped.product(x, weight, None, "onednn")):
        assert float((y - exact).norm() / exact.norm()) <= 1e-6  # bfloat16 or TF32 would be at 1e-3
    assert fastest is shipped.fastest
