"""A cached prefix: the same logits and clipped gradients as the whole model, or a refusal by name.

Mutants killed: a layer or the embeddings (and with them RoBERTa's positions, which it counts from the ids) run twice; a
prefix cut one layer too early or too late; hidden states kept with their padding.
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

import fedlr.prefix
from fedlr.adapter import adapter_parameters, read_adapter, train_only, write_adapter
from fedlr.data.tokenise import TokenisedText, collate
from fedlr.errors import InputError
from fedlr.prefix import encode_prefix, prefix, without_prefix
from fedlr.training.gradients import HookGradients
from fedlr.training.losses import cross_entropy
from tests.training.small_models import B_AND_HEAD, client_data, mutant, random_rows

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
    "num_labels": 3,
}
FAMILY = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
}
SMALLER = {key: value for key, value in SIZES.items() if "dropout" not in key}
FOREIGN = {
    "llama": LlamaConfig(**SMALLER, num_key_value_heads=1),
    "distilbert": DistilBertConfig(vocab_size=40, dim=16, n_layers=4, n_heads=2, hidden_dim=32, pad_token_id=1),
    "mpnet": MPNetConfig(**SIZES),  # its layers return tuples
    "deberta-v2": DebertaV2Config(**SIZES),  # so do these
    "electra": ElectraConfig(**SIZES, embedding_size=8),  # a projection between the embeddings and the layers
}
TARGETS = {"llama": ["q_proj", "v_proj"], "distilbert": ["q_lin", "v_lin"], "mpnet": ["q", "v"]} | {
    "deberta-v2": ["query_proj", "value_proj"]
}


def adapted(config: PreTrainedConfig, *, layers: list[int] | None = None, targets: object = None) -> PeftModel:
    """Build a network of four layers with adapters, far from zero, in the given ones."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = AutoModelForSequenceClassification.from_config(config)
        targets = targets or TARGETS.get(config.model_type, ["query", "value", "dense"])
        lora = LoraConfig(TaskType.SEQ_CLS, r=4, target_modules=targets, layers_to_transform=layers)
        model = get_peft_model(network, lora)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.normal_(std=0.3)
    return model.train()


def texts() -> TokenisedText:
    return client_data(random_rows(13, seed=5))


def logits(model: torch.nn.Module, data: TokenisedText, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(**collate(data, rows)[0]).logits


def parity(module: object, config: PreTrainedConfig) -> None:
    """Logits and clipped gradients of the model above its prefix are those of the whole model."""
    whole, data = adapted(config, layers=[2, 3]), texts()
    rows = list(range(len(data)))
    short, cached = module.without_prefix(whole), module.encode_prefix(whole, data, token_budget=20)
    torch.testing.assert_close(logits(short, cached, rows), logits(whole, data, rows), rtol=1e-5, atol=1e-5)
    sums = []
    for model, texts_ in ((whole, data), (short, cached)):
        trained = train_only(model, B_AND_HEAD)
        inputs, labels = collate(texts_, rows)
        engine = HookGradients(model, trained, loss=cross_entropy)
        sums.append(engine.clipped_sum(inputs, labels, max_grad_norm=0.5))
        engine.close()
    assert sums[0].keys() == sums[1].keys()
    for slot, total in sums[0].items():
        torch.testing.assert_close(sums[1][slot], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_cut_model_has_the_logits_and_clipped_gradients_of_the_whole(config: PreTrainedConfig) -> None:
    parity(fedlr.prefix, config)


@pytest.mark.parametrize(
    "change",
    [
        ("layers[index] = _Skipped()", "layers[index] = _Skipped() if index else layers[index]"),
        ("for index in range(first):", "for index in range(first + 1):"),
        ("handle = layers[first]", "handle = layers[first - 1]"),
        ("_encoder_owner(short).embeddings = _Given()", "pass"),
        ("state[: end - start]", "state[-(end - start) :]"),
    ],
    ids=["a layer twice", "a layer too few", "caught too early", "embedded twice", "padding kept"],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_cuts_that_are_wrong_are_seen(family: str, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, InputError)):
        parity(mutant(fedlr.prefix, change), FAMILY[family])


@pytest.mark.parametrize(
    "change",
    [
        ("layers[index] = _Skipped()", "layers[index] = _Skipped() if index else layers[index]"),
        ("_encoder_owner(short).embeddings = _Given()", "pass"),
    ],
)
def test_the_probe_refuses_a_wrong_cut_by_itself(change: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="roberta"):
        mutant(fedlr.prefix, change).without_prefix(adapted(FAMILY["roberta"], layers=[2, 3]))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hidden_states_of_a_text_do_not_depend_on_its_neighbours(family: str) -> None:
    model, data = adapted(FAMILY[family], layers=[2]), texts()
    together = encode_prefix(model, data)
    for row in range(len(data)):
        alone = encode_prefix(model, data.subset([row]))
        np.testing.assert_allclose(together.subset([row]).hidden, alone.hidden, rtol=1e-4, atol=1e-5)
    assert together.hidden.shape == (data.offsets[-1], 16)
    assert together.hidden.dtype == np.float32


def test_cut_model_shares_every_tensor_and_leaves_the_whole_one_alone() -> None:
    whole = adapted(FAMILY["bert"], layers=[3])
    before = logits(whole, texts(), [0, 1, 2])
    names = [name for name, _ in whole.named_modules()]
    short = without_prefix(whole)
    encode_prefix(whole, texts())
    kept = dict(whole.named_parameters())
    assert all(parameter is kept[name] for name, parameter in short.named_parameters())
    assert len(list(short.parameters())) < len(kept)
    assert torch.equal(logits(whole, texts(), [0, 1, 2]), before)
    assert [name for name, _ in whole.named_modules()] == names
    assert whole.training
    assert not any(module._forward_pre_hooks for module in whole.modules())


def test_adapters_pass_between_the_two_unchanged() -> None:
    whole, data = adapted(FAMILY["roberta"], layers=[1, 3]), texts()
    short, cached = without_prefix(whole), encode_prefix(whole, data)
    assert read_adapter(short).fingerprint() == read_adapter(whole).fingerprint()
    other = adapted(FAMILY["roberta"], layers=[1, 3])
    write_adapter(other, {slot: t * 0.5 for slot, t in read_adapter(whole).tensors.items()})
    write_adapter(short, read_adapter(other).tensors)
    torch.testing.assert_close(logits(short, cached, [0, 5]), logits(other, data, [0, 5]), rtol=1e-5, atol=1e-5)


def test_the_cut_is_below_the_first_adapted_layer() -> None:
    for layers in ([1], [2, 3], [3]):
        assert prefix(adapted(FAMILY["bert"], layers=layers))[1] == layers[0]


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN)
def test_models_without_such_a_prefix_are_refused_by_name(config: PreTrainedConfig) -> None:
    model = adapted(config, layers=[2, 3])
    with pytest.raises(InputError, match=f"{config.model_type}.*runtime.cache_prefix=false"):
        without_prefix(model)


@pytest.mark.parametrize(
    ("layers", "targets"),
    [([0, 3], None), (None, None), (None, ["pooler.dense"])],
    ids=["first layer", "all layers", "above the layers only"],
)
def test_adapters_without_a_prefix_below_them_are_refused(layers: object, targets: object) -> None:
    model = adapted(FAMILY["bert"], layers=layers, targets=targets)
    with pytest.raises(InputError, match="adapter.layers"):
        without_prefix(model)


def test_a_prefix_with_dropout_is_refused() -> None:
    config = BertConfig(**{**SIZES, "hidden_dropout_prob": 0.5})
    with pytest.raises(InputError, match="bert"):
        without_prefix(adapted(config, layers=[2]))


def test_no_text_at_all_has_no_hidden_states() -> None:
    empty = encode_prefix(adapted(FAMILY["bert"], layers=[2]), texts().subset([]))
    assert empty.hidden.shape == (0, 16)
