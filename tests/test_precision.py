"""A base in bfloat16 changes the gradients a little and the clip bound not at all; all that trains stays float32.

Mutants killed: an adapter that is converted too, buffers that are converted too, tensors that both models share, a head
that reads bfloat16, clip factors in bfloat16.
"""

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import fedlr.models.precision
import fedlr.training.gradients
from fedlr.errors import InputError
from fedlr.models.fingerprint import tensor_fingerprint
from fedlr.models.peft_state import adapter_parameters, read_adapter, train_only
from fedlr.models.precision import bfloat16_note, with_bfloat16_base
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import causal_lm, class_losses
from fedlr.training.gradients import HookGradients, LoopGradients
from fedlr.training.local import LocalTraining, train_client
from fedlr.training.supported import check_supported
from tests.training.small_models import (
    B_AND_HEAD,
    B_ONLY,
    BUILDERS,
    among_others,
    batch,
    client_data,
    difference,
    joint_norm,
    mutant,
    random_rows,
    small_model,
)

C = 0.05  # below the norm of nearly every gradient here


def images(num_rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(num_rows, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def examples(architecture: str, num_rows: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    inputs = images(num_rows) if architecture == "vit" else batch(random_rows(num_rows, seed=4))
    return inputs, torch.arange(num_rows) % 3


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def check_types(module: object, architecture: str) -> None:
    """Frozen parameters are bfloat16, the adapter and what the loss reads float32, buffers what they were."""
    model = small_model(architecture)
    before, adapter = tensor_fingerprint(model), read_adapter(model).fingerprint()
    low = module.with_bfloat16_base(model)
    trained = {id(p) for p in adapter_parameters(low).values()}
    for parameter in low.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16)
    kinds = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert {name: buffer.dtype for name, buffer in low.named_buffers()} == kinds
    assert read_adapter(low).fingerprint() == adapter
    inputs, _ = examples(architecture)
    assert logits(low, inputs).dtype == (torch.bfloat16 if architecture == "llama_lm" else torch.float32)
    change = (logits(low, inputs).float() - logits(model, inputs)).norm() / logits(model, inputs).norm()
    assert 0 < change < 0.05
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.zero_()
    assert tensor_fingerprint(model) == before, "the two share a tensor"


@pytest.mark.parametrize("architecture", BUILDERS)
def test_frozen_tensors_are_bfloat16_and_everything_else_is_not(architecture: str) -> None:
    check_types(fedlr.models.precision, architecture)


BUFFERS = "[m._buffers.update({n: b.bfloat16()}) for m in low.modules() for n, b in list(m._buffers.items()) if n]"


@pytest.mark.parametrize(
    ("architecture", "change", "error"),
    [
        ("llama_lm", ("if id(parameter) not in adapter and", "if"), AssertionError),
        ("bert", ("module.register_forward_pre_hook(_widen_inputs)", "pass"), InputError),
        ("llama", ("_check_runs(low)", BUFFERS), AssertionError),
        ("vit", ("low = copy.deepcopy(model, dict(halved))", "low = copy.copy(model)"), AssertionError),
    ],
    ids=["adapter", "head", "buffers", "nothing"],
)
def test_a_wrong_conversion_is_caught(architecture: str, change: tuple[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_types(mutant(fedlr.models.precision, change), architecture)


def test_a_shared_tensor_is_caught() -> None:
    # The buffers and all that deepcopy finds in its memo are shared.
    change = ("dict(halved))", "{**{id(p): p for p in adapter_parameters(model).values()}, **halved})")
    with pytest.raises(AssertionError, match="share"):
        check_types(mutant(fedlr.models.precision, change), "bert")


def test_attention_is_eager_in_the_copy_only() -> None:
    model = small_model("bert")
    low = with_bfloat16_base(model)
    assert low.config._attn_implementation == "eager" != model.config._attn_implementation


def test_tied_tensors_stay_tied() -> None:
    low = with_bfloat16_base(small_model("llama_lm"))
    assert low.get_input_embeddings().weight is low.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", ["bert", "llama", "vit", "gpt2"])
def test_engines_support_it_and_the_gradient_is_near_that_of_float32(architecture: str) -> None:
    model = small_model(architecture)
    low = with_bfloat16_base(model)
    inputs, labels = examples(architecture)
    sums = {}
    for name, network, engine in (
        ("float32", model, HookGradients),
        ("hooks", low, HookGradients),
        ("loop", low, LoopGradients),
    ):
        check_supported(network, B_AND_HEAD)
        gradients = engine(network, train_only(network, B_AND_HEAD), loss=class_losses)
        sums[name] = gradients.clipped_sum(Batch(inputs, labels), max_grad_norm=C)
        gradients.close()
    for name in ("hooks", "loop"):
        assert all(total.dtype == torch.float32 for total in sums[name].values())
        assert joint_norm(difference(sums[name], sums["float32"])) < 0.1 * joint_norm(sums["float32"])


def check_bound(gradients_module: object, architecture: str) -> None:
    """No example adds more than C, to a part in a million."""
    low = with_bfloat16_base(small_model(architecture, targets="all-linear"))
    trained = train_only(low, B_AND_HEAD)
    inputs, labels = examples(architecture, num_rows=24)
    engine = gradients_module.HookGradients(low, trained, loss=class_losses)
    norms = []
    for row in range(len(labels)):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        norms.append(joint_norm(engine.clipped_sum(Batch(one, labels[row : row + 1]), max_grad_norm=C)))
    engine.close()
    assert sum(norm > 0.999 * C for norm in norms) > 20, "nothing was clipped"
    assert max(norms) <= C * (1 + 1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "vit"])
def test_no_example_adds_more_than_the_bound(architecture: str) -> None:
    check_bound(fedlr.training.gradients, architecture)


def test_clip_factors_in_bfloat16_are_caught() -> None:
    change = ("max_grad_norm=max_grad_norm).sqrt().float()", "max_grad_norm=max_grad_norm).sqrt().bfloat16().float()")
    with pytest.raises(AssertionError):
        check_bound(mutant(fedlr.training.gradients, change), "bert")


def test_language_losses_are_float32() -> None:
    low = with_bfloat16_base(small_model("llama_lm"))
    inputs, _ = examples("llama_lm")
    assert causal_lm(logits(low, inputs), inputs["input_ids"]).dtype == torch.float32


def test_training_leaves_float32_values_and_the_base_alone() -> None:
    low = with_bfloat16_base(small_model("roberta"))
    trained = train_only(low, B_ONLY)
    before = {name: tensor.clone() for name, tensor in low.state_dict().items()}
    sampler = PoissonSampler(0.5)
    training = LocalTraining(2, torch.optim.AdamW, token_budget=40, divisor=8.0, sampler=sampler)
    engine = HookGradients(low, trained, loss=class_losses)
    train_client(
        low,
        engine,
        among_others(client_data(random_rows(12, seed=1))),
        training=training,
        mechanism=Mechanism(1.0, C, sample_rate=0.5, divisor=8.0),
        randomness=SeededRandomness(0),
        client_id=0,
        round_index=0,
        trained=trained,
    )
    engine.close()
    own = {id(parameter) for parameter in trained.values()}
    for name, tensor in low.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name]) != (id(tensor) in own), name
        assert tensor.dtype == before[name].dtype
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


def test_copies_of_it_work_too() -> None:
    low = with_bfloat16_base(small_model("bert"))
    inputs, _ = examples("bert")
    assert torch.equal(logits(copy.deepcopy(low), inputs), logits(low, inputs))


class Positions(nn.Module):
    """Adds a float32 buffer to what a layer reads: the next layer then gets a type that is not its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("shift", torch.ones(16))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.inner(x + self.shift, *args, **kwargs)


def test_a_model_that_mixes_types_is_refused_by_name() -> None:
    model: PeftModel = small_model("bert")
    layer = model.base_model.model.bert.encoder.layer[0]
    layer.intermediate = Positions(layer.intermediate)
    with pytest.raises(InputError, match=r"got bert: .*runtime.base_dtype=float32") as error:
        with_bfloat16_base(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True}, False),
        ({"architecture": "arm64", "bf16": True}, True),
    ],
)
def test_a_processor_without_such_instructions_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    note = bfloat16_note()
    assert (note is None) == fast
    assert fast or "runtime.base_dtype=float32" in note
