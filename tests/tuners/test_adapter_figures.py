"""Every entry of the registry says what its figures say: form, exact blocks, per-example gradients.

Mutants this file kills: an entry declared linear, multilinear or nonlinear that is not; a block declared exact that is
not; a block that is left out; two blocks that overlap; a gradient path that averages over the batch, mixes up two
examples, or leaves a tensor out; an engine that clips the sum and not the rows; tuners whose forward pass is random,
whose hooks edit gradients, or whose examples change each other's gradients.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LilyConfig, MontecloraConfig, OSFConfig, PeftType, PsoftConfig, PveraConfig, VeloraConfig
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.models.tuners import REFUSED, TUNERS, Tuner, tuner
from fedlr.models.tuners.build import build
from fedlr.simulations.tuner_measure import measure
from fedlr.simulations.tuner_measure.measure import ALL_BLOCKS, BIASED, EXACT, disagreements, subject
from fedlr.simulations.tuner_measure.networks import LinearNetwork
from fedlr.training import tuner_gradients as gradients
from fedlr.training.gradients import LoopGradients

Rows = dict[Slot, Tensor]


@pytest.mark.parametrize("name", TUNERS)
def test_the_figures_are_what_the_entry_declares(name: str) -> None:
    entry, figures = TUNERS[name], measure.measure(TUNERS[name])
    assert disagreements(entry, figures) == []
    # The same once more, from the figures alone: a check of `disagreements`.
    errors = figures.exactness
    assert max(figures.gradients, figures.clipped_sums, figures.together) < 1e-5
    assert set(errors) == {ALL_BLOCKS} | (set(entry.blocks) if len(entry.blocks) > 1 else set())
    if entry.form == "multilinear":
        assert len(entry.blocks) > 1 and max(errors[block] for block in entry.blocks) < EXACT
    if entry.form != "linear":
        assert errors[ALL_BLOCKS] > BIASED
    else:
        assert max(errors.values()) < EXACT


WRONG = {
    "a product is not linear": replace(TUNERS["lora"], form="linear"),
    "a rotation is not linear": replace(TUNERS["hra"], form="linear"),
    "a curve is not multilinear": replace(TUNERS["dora"], form="multilinear"),
    "a linear layer has no bias": replace(TUNERS["c3a"], form="nonlinear"),
    "a block that is not exact": replace(TUNERS["road"], exact=frozenset({"alpha", "theta"})),
    "an exact block that is not named": replace(TUNERS["road"], exact=frozenset()),
}


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG.keys())
def test_an_entry_that_declares_another_form_is_caught(entry: Tuner) -> None:
    assert any("declared" in line for line in disagreements(entry, measure.measure(entry)))


def test_a_tensor_that_trains_and_is_in_no_block_is_refused() -> None:
    forgetful = replace(TUNERS["vera"], blocks={"lambda_b": ("vera_lambda_b.default",)})
    with pytest.raises(InputError, match="vera_lambda_d.default besides"):
        subject(forgetful)
    with pytest.raises(InputError, match="none in magnitude"):
        subject(replace(TUNERS["lora"], blocks={**TUNERS["lora"].blocks, "magnitude": ("no_such.*",)}))
    with pytest.raises(ValueError, match="do not overlap"):
        subject(replace(TUNERS["lora"], blocks={**TUNERS["lora"].blocks, "all": ("lora_*.default.weight",)}))


def averaged(rows: Rows) -> Rows:
    return {slot: row.mean(dim=0, keepdim=True).expand_as(row) for slot, row in rows.items()}


def turned(rows: Rows) -> Rows:
    return {slot: row.roll(1, dims=0) for slot, row in rows.items()}


def without_one(rows: Rows) -> Rows:
    return dict(list(rows.items())[1:])


def with_a_zero(rows: Rows) -> Rows:
    first = next(iter(rows))
    return {**rows, first: torch.zeros_like(rows[first])}


@pytest.mark.parametrize("name", ["lora", "conv_lora", "vera", "c3a"])
@pytest.mark.parametrize("mutant", [averaged, turned, without_one, with_a_zero])
def test_a_gradient_path_that_is_not_of_single_examples_is_caught(
    name: str, mutant: Callable[[Rows], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = measure.rows
    monkeypatch.setattr(measure, "rows", lambda *given, **words: [mutant(found) for found in right(*given, **words)])
    found = disagreements(TUNERS[name], measure.measure(TUNERS[name]))
    assert len(found) == 1 and f"per-example gradients by {TUNERS[name].path}" in found[0]


class ClipsTheSum(LoopGradients):
    """The bug: the bound holds of the sum, so one example can move it by all of it and more."""

    def clipped_sum(self, batch, *, max_grad_norm):  # type: ignore[no-untyped-def]
        total = super().clipped_sum(batch, max_grad_norm=math.inf)
        norm = math.sqrt(sum(float(g.square().sum()) for g in total.values()))
        return {slot: g * min(1.0, max_grad_norm / norm) for slot, g in total.items()}


def test_an_engine_that_clips_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ENGINES", {"vmap": (gradients.CopiesGradients, ClipsTheSum)})
    (line,) = disagreements(TUNERS["vera"], measure.measure(TUNERS["vera"]))
    assert "clipped sums" in line


OSF = Tuner(
    title="OSF",
    config=OSFConfig,
    sizes={"effective_rank": 8},
    blocks={"svd": ("osf_svd_params.default.*",)},
    form="nonlinear",
    path="vmap",
    source="",
)
PVERA = Tuner(
    title="PVeRA",
    config=PveraConfig,
    sizes={"r": 8},
    blocks={"lambda": ("pvera_lambda_*.default",)},
    form="nonlinear",
    path="loop",
    source="",
)
LILY = Tuner(
    title="Lily",
    config=LilyConfig,
    sizes={"r": 4},
    blocks={"all": ("lily_*.default.weight",)},
    form="nonlinear",
    path="vmap",
    source="",
)
MONTECLORA = replace(
    TUNERS["lora"],
    options={"monteclora_config": MontecloraConfig(num_samples=2)},
    blocks={"all": ("lora_A.default.weight", "lora_B.default.weight", "lora_monteclora_*")},
    form="nonlinear",
    path="loop",
)
VELORA_BATCH = replace(TUNERS["velora"], options={"velora_config": VeloraConfig(num_groups=4)})


@pytest.mark.parametrize(
    ("name", "entry", "shown"),
    [
        ("osf", OSF, "per-example gradients"),
        ("pvera", PVERA, "per-example gradients"),
        ("monteclora", MONTECLORA, "per-example gradients"),
        ("lily", LILY, "change each other's"),
        ("velora_batch", VELORA_BATCH, "change each other's"),
    ],
)
def test_what_is_refused_does_what_the_reason_says(name: str, entry: Tuner, shown: str) -> None:
    assert any(shown in line for line in disagreements(entry, measure.measure(entry)))
    with pytest.raises(InputError, match=f"{name!r}: {REFUSED[name]}"):
        tuner(name)


def test_householder_reflections_with_gram_schmidt_start_far_from_the_base() -> None:
    def start_error(entry: Tuner) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = LinearNetwork()
            x = torch.randn(1, 5, 32)
            before = network(x, apart=True).logits
            after = build(network, entry, target_modules=["second"])(x=x, apart=True).logits
        return float(((after - before).norm() / before.norm()).detach())

    far = start_error(replace(TUNERS["hra"], options={"apply_GS": True}))
    assert start_error(TUNERS["hra"]) < 1e-5 and not far < 0.1
    with pytest.raises(InputError, match="apply_GS"):
        tuner("hra_gs")


def test_every_tuner_of_peft_is_carried_or_refused() -> None:
    carried = {str(entry.peft_config().peft_type.value) for entry in TUNERS.values()}
    assert {kind.value for kind in PeftType} - carried == {
        kind.value for kind in PeftType if kind.value.lower() in REFUSED
    }
    assert not TUNERS.keys() & REFUSED.keys()


def test_a_name_that_does_not_exist_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="Expected vera, got 'verra'"):
        tuner("verra")


def test_an_argument_that_would_make_another_system_is_refused() -> None:
    assert TUNERS["rslora"].peft_config(r=2).r == 2
    with pytest.raises(InputError, match="use_rslora, which defines it"):
        TUNERS["rslora"].peft_config(use_rslora=False)


def test_lora_xs_is_the_formula_of_its_paper() -> None:
    made = subject(TUNERS["lora_xs"])
    layer = made.model.model.second
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight.float())
    M = next(p for slot, p in made.trained.items() if ".second." in slot.path) - torch.eye(4)
    expected = U[:, :4] @ torch.diag(S[:4]) @ M.float() @ Vh[:4]
    assert torch.allclose(layer.get_delta_weight("default").float(), expected, atol=1e-5)
    assert TUNERS["lora_xs"].config is PsoftConfig


def test_a_start_from_data_needs_public_data() -> None:
    with pytest.raises(InputError, match="public batch for the start of EVA"):
        build(LinearNetwork(), TUNERS["eva"], target_modules=["first"])
