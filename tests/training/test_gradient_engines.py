"""Hooks, ghost, loop and fused are one function; what is not finite counts as zero; no call leaves a trace.

Mutants this file kills: no guard against NaN (hooks, ghost, fused), clean-up skipped when a call raises, traces of
others not cleared, ghost norms in float32 (Opacus' own), fused norms in float32 or without a largest.
"""

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from opacus.grad_sample.linear import compute_linear_norm_sample
from torch import nn

from fedlr.adapters.state import HEAD, LORA_A
from fedlr.errors import InputError
from fedlr.models.peft_state import train_only
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import LossOfLogits, class_losses, cross_entropy, token_losses
from fedlr.training import fused
from fedlr.training import gradients as shipped
from fedlr.training.ghost import linear_norms
from fedlr.training.gradients import LoopGradients, SumGradients
from tests.training.cohort_runs import engine_over
from tests.training.small_models import (
    A_AND_B,
    B_AND_HEAD,
    B_ONLY,
    BUILDERS,
    EVERYTHING,
    batch,
    difference,
    examples_of,
    joint_norm,
    mutant,
    random_rows,
    small_model,
)

ENGINES = ("HookGradients", "GhostGradients", "LoopGradients", "FusedGradients")
HOOKED = ("HookGradients", "GhostGradients")
MODULES = dict.fromkeys(ENGINES, shipped) | {"FusedGradients": fused}


# A language model's head is its frozen, tied embedding.
BLOCKS = (B_ONLY, frozenset({LORA_A}), A_AND_B, B_AND_HEAD, EVERYTHING)
CASES = [(name, block) for name in BUILDERS for block in BLOCKS if name != "llama_lm" or HEAD not in block]


@pytest.mark.parametrize(
    ("architecture", "block"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(sorted(x))
)
@pytest.mark.parametrize("targets", ["query_value", "all-linear"])
def test_hooks_ghost_loop_and_fused_agree(architecture: str, targets: str, block: frozenset[str]) -> None:
    # Not ALBERT: its layers run twice, and an update of twice the scale in each of them makes float32 rounding grow to
    # 1e-5 of a gradient or more, whoever takes it, in another measure with every number of threads.
    use_rslora = targets == "all-linear" and architecture != "albert"
    model = small_model(architecture, targets=targets, use_rslora=use_rslora)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train_only(model, block)
    inputs, labels = examples_of(architecture, 6)
    sums = {}
    for name in ENGINES:
        if (architecture, name) == ("albert", "GhostGradients"):
            continue  # it is refused where a layer is used twice
        engine = getattr(MODULES[name], name)(model, trained, loss=token_losses if labels.dim() > 1 else class_losses)
        for bound in (0.5, 1e6):
            sums[name, bound] = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)
        engine.close()
    for (_, bound), got in sums.items():
        expected = sums["LoopGradients", bound]
        assert list(got) == list(trained)
        assert joint_norm(difference(got, expected)) <= 1e-5 * joint_norm(expected)
        assert all(value.any() for value in got.values())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_sum_gradients_is_the_sum_without_clipping_and_refuses_to_clip() -> None:
    model = small_model()
    trained = train_only(model, B_AND_HEAD)
    inputs, labels = batch(random_rows(4, seed=2)), torch.tensor([0, 1, 2, 0])
    plain = SumGradients(model, trained, loss=class_losses)
    oracle = LoopGradients(model, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=math.inf)
    got = plain.clipped_sum(Batch(inputs, labels), max_grad_norm=math.inf)
    assert joint_norm(difference(got, oracle)) <= 1e-5 * joint_norm(oracle)
    with pytest.raises(InputError, match="no epsilon would hold"):
        plain.clipped_sum(Batch(inputs, labels), max_grad_norm=1.0)


def test_an_engine_refuses_a_model_that_trains_something_else() -> None:
    model = small_model()
    trained = train_only(model, B_ONLY)
    train_only(model, A_AND_B)
    for name in (*ENGINES, "SumGradients"):
        with pytest.raises(ValueError, match="train_only"):
            getattr(MODULES.get(name, shipped), name)(model, trained, loss=class_losses)


POISON_LABEL, POISON_TOKEN = 2, 39


def poisoned_loss(value: float) -> Callable:
    """Multiply the loss of every example of one class: its gradient is huge, infinite or nan."""
    return LossOfLogits(
        lambda logits, labels: cross_entropy(logits, labels) * torch.where(labels == POISON_LABEL, value, 1.0)
    )


def check_bad_rows_count_at_most_once(
    engines: ModuleType,
    name: str,
    *,
    architecture: str,
    loss_value: float = 1.0,
    embedding_value: float | None = None,
) -> None:
    """Remove one bad row of five: the sum stays finite and moves by at most C."""
    model = small_model(architecture)
    if embedding_value is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[POISON_TOKEN] = embedding_value
    engine = getattr(engines, name)(model, train_only(model, A_AND_B), loss=poisoned_loss(loss_value))
    rows = [[5, 6, 7], [8, 9], [POISON_TOKEN, 10, 11], [12], [13, 14, 15, 16]]
    inputs, labels = batch(rows), torch.tensor([0, 1, POISON_LABEL, 1, 0])
    keep = torch.tensor([0, 1, 3, 4])
    with_bad = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.3)
    without = engine.clipped_sum(Batch({k: v[keep] for k, v in inputs.items()}, labels[keep]), max_grad_norm=0.3)
    moved = joint_norm(difference(with_bad, without))
    assert moved <= 0.3 * (1 + 1e-5)
    if not math.isfinite(loss_value):
        assert moved <= 1e-6 * joint_norm(without)


BAD_VALUES = [math.nan, math.inf, -math.inf, 1e30, 1e38, -3e38]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_bad_loss_moves_the_sum_by_at_most_c(name: str, value: float) -> None:
    check_bad_rows_count_at_most_once(MODULES[name], name, architecture="bert", loss_value=value)


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_a_bad_embedding_moves_the_sum_by_at_most_c(architecture: str, name: str, value: float) -> None:
    check_bad_rows_count_at_most_once(MODULES[name], name, architecture=architecture, embedding_value=value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("HookGradients", [("row[bad] = 0.0", "pass")]),
        ("HookGradients", [(".where(norms.isfinite(), 0.0)", ""), ("row[bad] = 0.0", "pass")]),
        ("GhostGradients", [("norms < LARGEST_GHOST_NORM", "norms.new_ones(norms.shape).bool()")]),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_the_guard_a_bad_row_is_seen(name: str, changes: list[tuple[str, str]], value: float) -> None:
    with pytest.raises(AssertionError):
        check_bad_rows_count_at_most_once(mutant(shipped, *changes), name, architecture="bert", loss_value=value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_the_guard_the_fused_engine_sees_a_bad_row_too(value: float) -> None:
    broken = SimpleNamespace(
        FusedGradients=engine_over(("        self.values.masked_fill_(silent[:, None], 0.0)  # 0 * nan is nan\n", ""))
    )
    with pytest.raises(AssertionError):
        check_bad_rows_count_at_most_once(broken, "FusedGradients", architecture="bert", loss_value=value)


def check_huge_gradients_are_clipped_to_the_bound(make_engine: Callable, size: float) -> None:
    model = small_model()
    for block in (A_AND_B, B_AND_HEAD):
        engine = make_engine(model, train_only(model, block), loss=poisoned_loss(size))
        total = engine.clipped_sum(Batch(batch([[5, 6, 7]]), torch.tensor([POISON_LABEL])), max_grad_norm=0.3)
        engine.close()
        assert joint_norm(total) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("size", [1e5, 1e19, 1e25, 1e30, 1e33])
@pytest.mark.parametrize("name", ENGINES)
def test_huge_gradients_are_clipped_to_the_bound(name: str, size: float) -> None:
    check_huge_gradients_are_clipped_to_the_bound(getattr(MODULES[name], name), size)


@pytest.mark.parametrize(
    "change",
    [
        ("vector_norm(self.values, dim=1, dtype=torch.float64)", "vector_norm(self.values, dim=1)"),
        ("vector_norm(t, dim=1, dtype=torch.float64)", "vector_norm(t, dim=1)"),
    ],
    ids=["lora", "head"],
)
def test_fused_norms_in_float32_would_lose_them(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_huge_gradients_are_clipped_to_the_bound(engine_over(change), 1e25)


def check_norms_at_the_end_of_float32_add_at_most_the_bound(make_engine: Callable) -> None:
    """Where C / norm leaves the normal float32 numbers it is rounded by parts of a thousand, up or down."""
    model, bound, norms = small_model(), 1e-3, []
    trained = train_only(model, A_AND_B)
    for exponent in torch.linspace(33, 38, 21).tolist():
        engine = make_engine(model, trained, loss=poisoned_loss(10**exponent))
        total = engine.clipped_sum(Batch(batch([[5, 6, 7]]), torch.tensor([POISON_LABEL])), max_grad_norm=bound)
        engine.close()
        norms.append(joint_norm(total))
    assert max(norms) <= bound * (1 + 1e-6)
    assert max(norms) > 0.99 * bound


@pytest.mark.parametrize("name", ENGINES)
def test_norms_at_the_end_of_float32_add_at_most_the_bound(name: str) -> None:
    check_norms_at_the_end_of_float32_add_at_most_the_bound(getattr(MODULES[name], name))


def test_without_a_largest_norm_the_fused_engine_would_add_more() -> None:
    boundless = mutant(fused, (".where(norms < LARGEST_GHOST_NORM, 0.0)", ""))
    with pytest.raises(AssertionError):
        check_norms_at_the_end_of_float32_add_at_most_the_bound(boundless.FusedGradients)


def test_a_batch_of_bad_rows_alone_is_zero() -> None:
    model = small_model()
    trained = train_only(model, A_AND_B)
    for name in ENGINES:
        engine = getattr(MODULES[name], name)(model, trained, loss=poisoned_loss(math.nan))
        total = engine.clipped_sum(Batch(batch([[5, 6], [7]]), torch.tensor([2, 2])), max_grad_norm=1.0)
        engine.close()
        assert list(total) == list(trained)
        assert joint_norm(total) == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e19, 1e25, 1e30, 1e38, 3.4e38])
def test_clipping_reaches_the_bound_at_every_scale_of_float32(size: float) -> None:
    rows = size * torch.rand(4, 1000, generator=torch.Generator().manual_seed(0)).clamp(min=0.1)
    slots = {index: rows[:, index::2].clone() for index in range(2)}
    for example in range(4):
        one = {slot: value[example : example + 1].clone() for slot, value in slots.items()}
        true_norm = float(rows[example].double().norm())
        got = joint_norm(shipped.clipped_row_sums(one, max_grad_norm=1.0))
        assert got == pytest.approx(min(1.0, true_norm), rel=1e-6)


def check_linear_norms(norm_sampler: Callable) -> None:
    """Two tokens that nearly cancel: the gradient has norm 16 while activations * backprops is 4e5."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(16, 16)
    activations, backprops = torch.ones(1, 2, 16), torch.full((1, 2, 16), 1e5)
    activations[0, 1] += 1e-5 * torch.randn(16, generator=generator)
    backprops[0, 1] *= -1
    truth = torch.einsum("ntd,ntk->ndk", backprops.double(), activations.double()).norm()
    got = norm_sampler(layer, [activations], backprops)[layer.weight]
    assert float(got) == pytest.approx(float(truth), rel=1e-3)


def test_ghost_norms_survive_cancellation() -> None:
    check_linear_norms(linear_norms)


def test_opacus_own_ghost_norms_do_not() -> None:
    with pytest.raises(AssertionError):
        check_linear_norms(compute_linear_norm_sample)


class Abort(Exception):
    """Stands for a signal, a time limit or an out-of-memory error."""


def layers_of(engine: object) -> nn.ModuleList:
    """Return the layers that the engine runs: the fused one has modules of its own."""
    return engine._model.base_model.model.bert.encoder.layer


def fail_in_loss(model: nn.Module, engine: object) -> Callable[[], None]:
    """Fail after the forward pass, when every activation is stored."""
    working = engine._loss

    def broken(model: nn.Module, batch: Batch) -> torch.Tensor:
        model(**batch.inputs)
        raise Abort

    engine._loss = broken
    return lambda: setattr(engine, "_loss", working)


def fail_in_forward(model: nn.Module, engine: object) -> Callable[[], None]:
    def hook(*_: object) -> None:
        raise Abort

    return layers_of(engine)[1].register_forward_pre_hook(hook).remove


def fail_in_backward(model: nn.Module, engine: object) -> Callable[[], None]:
    """Fail when the upper layer has its per-example gradients and the lower one does not."""

    def hook(*_: object) -> None:
        raise Abort

    return layers_of(engine)[0].register_full_backward_hook(hook).remove


def check_no_trace_after_abort(engines: ModuleType, name: str, fail: Callable) -> None:
    model = small_model()
    trained = train_only(model, EVERYTHING)
    engine = getattr(engines, name)(model, trained, loss=class_losses)
    inputs, labels = batch(random_rows(4, seed=5)), torch.tensor([0, 1, 2, 0])
    fresh = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    repair = fail(model, engine)
    with pytest.raises(Abort):
        engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    repair()
    for parameter in trained.values():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
    assert not any(vars(m).get("activations") for m in model.modules())
    if name == "FusedGradients":
        shared = engine._shared
        assert (shared.owner, shared.ranks, dict(shared.values), shared.found) == (None, None, {}, {})
    again = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    assert all(torch.equal(again[slot], fresh[slot]) for slot in trained)


@pytest.mark.parametrize("fail", [fail_in_loss, fail_in_forward, fail_in_backward])
@pytest.mark.parametrize("name", ENGINES)
def test_a_call_that_raises_leaves_no_trace(name: str, fail: Callable) -> None:
    check_no_trace_after_abort(MODULES[name], name, fail)


@pytest.mark.parametrize("fail", [fail_in_loss, fail_in_forward, fail_in_backward])
@pytest.mark.parametrize("name", HOOKED)
def test_without_cleaning_up_after_an_error_a_trace_is_found(name: str, fail: Callable) -> None:
    careless = mutant(
        shipped,
        ("    try:\n        yield\n    finally:\n", "    yield\n    if True:\n"),
        ("    _forget(layers, trained)\n    yield", "    yield"),
    )
    with pytest.raises(AssertionError):
        check_no_trace_after_abort(careless, name, fail)


@pytest.mark.parametrize("fail", [fail_in_loss, fail_in_forward, fail_in_backward])
def test_without_cleaning_up_the_fused_engine_keeps_a_trace(fail: Callable) -> None:
    careless = mutant(fused, ("        finally:\n", "        except KeyError:\n"))
    with pytest.raises(AssertionError):
        check_no_trace_after_abort(careless, "FusedGradients", fail)


def check_others_passes_do_not_count(engines: ModuleType, name: str) -> None:
    """Run the model outside the engine, with and without a backward pass, as a careless caller might."""
    model = small_model()
    trained = train_only(model, EVERYTHING)
    engine = getattr(engines, name)(model, trained, loss=class_losses)
    inputs, labels = batch(random_rows(4, seed=5)), torch.tensor([0, 1, 2, 0])
    fresh = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    others = batch(random_rows(4, seed=6))
    cross_entropy(model(**others).logits, labels).sum().backward()
    model(**others)
    again = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    assert all(torch.equal(again[slot], fresh[slot]) for slot in trained)


@pytest.mark.parametrize("name", ENGINES)
def test_what_others_run_through_the_model_does_not_count(name: str) -> None:
    check_others_passes_do_not_count(MODULES[name], name)


def test_without_clearing_first_it_would() -> None:
    trusting = mutant(shipped, ("    _forget(layers, trained)\n    try:", "    try:"))
    with pytest.raises((AssertionError, ValueError)):
        check_others_passes_do_not_count(trusting, "HookGradients")


@pytest.mark.parametrize("name", [*HOOKED, "FusedGradients"])
def test_close_removes_every_hook_and_attribute(name: str) -> None:
    model = small_model()
    hooks_before = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())
    for block in (B_ONLY, A_AND_B, B_AND_HEAD):
        trained = train_only(model, block)
        engine = getattr(MODULES[name], name)(model, trained, loss=class_losses)
        engine.clipped_sum(Batch(batch([[5, 6]]), torch.tensor([1])), max_grad_norm=1.0)
        engine.close()
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()) == hooks_before
    assert not any("grad_sample" in vars(p) for p in model.parameters())
