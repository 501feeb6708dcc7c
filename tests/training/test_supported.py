"""What DP-SGD cannot train is one clear error before any example is read (R-P9, R-P11).

Mutants this file kills: no probe, so that layers which mix examples or read padding pass, also over a bfloat16 base and
with images.
"""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import ConvBertConfig, ConvBertForSequenceClassification

from fedlr.adapters.state import HEAD, LORA_B
from fedlr.errors import InputError
from fedlr.models.peft_state import train_only
from fedlr.models.precision import with_bfloat16_base
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses
from fedlr.training import supported as shipped
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from fedlr.training.supported import check_supported
from tests.training.small_models import (
    A_AND_B,
    B_AND_HEAD,
    B_ONLY,
    BUILDERS,
    CLASSIFIERS,
    EVERYTHING,
    batch,
    difference,
    joint_norm,
    mutant,
    small_model,
)

MODES = ("hooks", "ghost", "loop")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [B_ONLY, A_AND_B, B_AND_HEAD, EVERYTHING], ids=lambda b: "+".join(sorted(b)))
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_what_is_supported_passes_and_is_left_as_it_was(architecture: str, block: frozenset[str], mode: str) -> None:
    model = small_model(architecture, targets="all-linear").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    torch_state = torch.get_rng_state()
    check_supported(model, block, grad_sample_mode=mode)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("architecture", ["llama_lm", "gpt2", "vit"])
@pytest.mark.parametrize("mode", MODES)
def test_language_models_fused_layers_and_images_pass(architecture: str, mode: str) -> None:
    model = small_model(architecture, targets="all-linear")
    block = B_ONLY if architecture == "llama_lm" else B_AND_HEAD
    check_supported(model, block, grad_sample_mode=mode)
    check_supported(with_bfloat16_base(model), block, grad_sample_mode=mode)


def test_a_fused_layer_has_the_gradients_of_one_example_after_the_other() -> None:
    model = small_model("gpt2")
    trained = train_only(model, B_ONLY)
    inputs, labels = batch([[5, 6, 7], [8], [9, 10]]), torch.tensor([0, 1, 2])
    hooks = HookGradients(model, trained, loss=class_losses)
    got = hooks.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    hooks.close()
    oracle = LoopGradients(model, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    assert {slot.path.rpartition(".")[2] for slot in got} == {"c_attn"}
    assert joint_norm(difference(got, oracle)) <= 1e-5 * joint_norm(oracle)


def first_layer(model: PeftModel) -> nn.Module:
    return model.base_model.model.bert.encoder.layer[0]


def with_dora() -> nn.Module:
    return small_model(use_dora=True)


def with_lora_on_embeddings() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["word_embeddings", "query"], task_type="SEQ_CLS")
    return get_peft_model(BUILDERS["bert"](), config)


def with_trainable_tokens() -> nn.Module:
    return small_model(trainable_token_indices=[4, 5])


def with_lora_bias() -> nn.Module:
    return small_model(lora_bias=True)


def with_biases() -> nn.Module:
    return small_model(bias="lora_only")


def with_lora_dropout() -> nn.Module:
    return small_model(lora_dropout=0.1)


def with_attention_dropout() -> nn.Module:
    model = small_model("llama")
    model.base_model.model.model.layers[0].self_attn.attention_dropout = 0.1
    return model


def with_checkpointing() -> nn.Module:
    model = small_model()
    model.base_model.model.activation_checkpointing_enable()
    return model


def with_batch_norm() -> nn.Module:
    model = small_model()
    layer = first_layer(model)
    layer.attention.output.LayerNorm = nn.BatchNorm1d(9)
    return model


class Around(nn.Module):
    """Wraps a layer with something that a list of module types would not find."""

    def __init__(self, inner: nn.Module, forward: Callable) -> None:
        super().__init__()
        self.inner, self.around = inner, forward
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self.around(self, x)


def around_query(forward: Callable) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = small_model()
        attention = first_layer(model).attention.self
        attention.query = Around(attention.query, forward)
        return model

    return build


def counting(self: Around, x: torch.Tensor) -> torch.Tensor:
    self.count += 1
    return self.inner(x)


def around_image_query(forward: Callable) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = small_model("vit")
        attention = model.base_model.model.vit.layers[0].attention
        attention.q_proj = Around(attention.q_proj, forward)
        return model

    return build


four_dimensional = around_query(lambda self, x: self.inner(x[:, None])[:, 0])
used_twice = around_query(lambda self, x: (self.inner(x) + self.inner(2 * x)) / 2)
merged = around_query(lambda self, x: self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
mixing = around_query(lambda self, x: self.inner(x) - x.mean(dim=0, keepdim=True))
mixing_images = around_image_query(lambda self, x: self.inner(x) - x.mean(dim=0, keepdim=True))
merging_images = around_image_query(lambda self, x: self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
left_out = around_query(lambda self, x: x)
moving_buffer = around_query(counting)


def with_tied_factors() -> nn.Module:
    model = small_model()
    layers = model.base_model.model.bert.encoder.layer
    first, second = (layer.attention.self.query.lora_B["default"] for layer in layers)
    second.weight = first.weight
    return model


def with_half_precision_factors() -> nn.Module:
    model = small_model()
    first_layer(model).attention.self.query.lora_B["default"].bfloat16()
    return model


def in_bfloat16(build: Callable) -> Callable[[], nn.Module]:
    return lambda: with_bfloat16_base(build())


def with_lora_on_patches() -> nn.Module:
    return small_model("vit", targets=["projection", "q_proj"])


def reading_nothing_known() -> nn.Module:
    model = small_model()
    model.base_model.model.set_input_embeddings(nn.Identity())
    return model


def reading_padding() -> PeftModel:
    """ConvBERT's convolutions read the padding beside a text, whatever the mask says."""
    widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ConvBertConfig(
        vocab_size=32,
        embedding_size=32,
        initializer_range=0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **widths,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
        model = get_peft_model(ConvBertForSequenceClassification(config), lora)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


REFUSED = [
    (with_dora, A_AND_B, "hooks", "DoRA"),
    (with_lora_on_embeddings, A_AND_B, "hooks", "linear layers"),
    (with_trainable_tokens, A_AND_B, "hooks", "trainable_token_indices"),
    (with_lora_bias, B_ONLY, "hooks", "lora_bias"),
    (with_biases, B_ONLY, "hooks", "bias 'none'"),
    (with_lora_dropout, B_ONLY, "hooks", "dropout 0"),
    (with_attention_dropout, B_ONLY, "hooks", "dropout 0"),
    (with_checkpointing, B_ONLY, "hooks", "checkpointing"),
    (with_batch_norm, B_ONLY, "hooks", "batch normalisation"),
    (mixing, B_ONLY, "hooks", "do not interact"),
    (merged, B_ONLY, "hooks", "keep examples apart"),
    (reading_padding, B_ONLY, "hooks", "ignores padding"),
    (mixing_images, B_ONLY, "hooks", "do not interact"),
    (merging_images, B_ONLY, "hooks", "keep examples apart"),
    (in_bfloat16(mixing), B_ONLY, "hooks", "do not interact"),
    (in_bfloat16(reading_padding), B_ONLY, "hooks", "ignores padding"),
    (with_lora_on_patches, B_ONLY, "hooks", "linear layers"),
    (reading_nothing_known, B_ONLY, "hooks", "tokens or pixels"),
    (left_out, B_ONLY, "hooks", "left out"),
    (moving_buffer, B_ONLY, "hooks", "buffers"),
    (with_tied_factors, B_ONLY, "hooks", "tied"),
    (with_tied_factors, B_ONLY, "ghost", "tied"),
    (four_dimensional, B_ONLY, "ghost", "use hooks|mode=hooks"),
    (used_twice, B_ONLY, "ghost", "use hooks|mode=hooks"),
    (with_half_precision_factors, B_ONLY, "hooks", "float32"),
    (small_model, frozenset(), "hooks", "trained block"),
    (small_model, frozenset({"lora_b"}), "hooks", "trained block"),
    (lambda: small_model("llama_lm"), frozenset({HEAD}), "hooks", "got none"),
    (lambda: BUILDERS["bert"](), B_ONLY, "hooks", "PEFT model"),
]


@pytest.mark.parametrize(("build", "block", "mode", "message"), REFUSED)
def test_what_is_not_supported_is_one_clear_error(
    build: Callable, block: frozenset[str], mode: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_supported(build(), block, grad_sample_mode=mode)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build", [mixing, merged, left_out, moving_buffer, reading_padding, mixing_images, in_bfloat16(mixing)]
)
def test_without_the_probe_it_would_pass(build: Callable) -> None:
    blind = mutant(shipped, ("    _probe(model, _trained_layers(model, roles), grad_sample_mode)\n", ""))
    blind.check_supported(build(), B_ONLY)


@pytest.mark.parametrize("build", [four_dimensional, used_twice])
def test_hooks_are_right_where_ghost_is_refused(build: Callable) -> None:
    model = build()
    check_supported(model, frozenset({LORA_B}))
    trained = train_only(model, B_ONLY)
    inputs, labels = batch([[5, 6, 7], [8], [9, 10]]), torch.tensor([0, 1, 2])
    hooks = HookGradients(model, trained, loss=class_losses)
    got = hooks.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    hooks.close()
    oracle = LoopGradients(model, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    assert joint_norm(difference(got, oracle)) <= 1e-5 * joint_norm(oracle)


def test_tied_factors_are_refused_by_the_engines_too() -> None:
    model = with_tied_factors()
    trained = train_only(model, B_ONLY)
    for engine in (HookGradients, GhostGradients, LoopGradients):
        with pytest.raises(InputError, match="tied"):
            engine(model, trained, loss=class_losses)
