"""A cached prefix: the same logits and clipped gradients as the whole model, or a refusal by name.

Mutants killed: a layer or the embeddings (and with them RoBERTa's positions, which it counts from the ids) run twice; a
prefix cut one layer too early or too late; hidden states kept with their padding; bfloat16 states that are converted
rather than kept; a stored table that is found again after the texts, the tensors, a setting, the cut or the type
changed.
"""

from collections.abc import Callable
from pathlib import Path

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
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

import fedlr.models.prefix
from fedlr.data.store import TableStore
from fedlr.errors import InputError
from fedlr.models.peft_state import adapter_parameters, read_adapter, train_only, write_adapter
from fedlr.models.precision import with_bfloat16_base
from fedlr.models.prefix import encode_prefix, prefix, without_prefix
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.gradients import HookGradients
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
DISTILBERT = {
    "vocab_size": 40,
    "dim": 16,
    "n_layers": 4,
    "n_heads": 2,
    "hidden_dim": 32,
    "pad_token_id": 1,
    "initializer_range": 0.3,
    "num_labels": 3,
}
SMALLER = {key: value for key, value in SIZES.items() if "dropout" not in key}
FAMILY = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": DistilBertConfig(**DISTILBERT, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "modernbert": ModernBertConfig(**SMALLER, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
}
FOREIGN = {
    "llama": LlamaConfig(**SMALLER, num_key_value_heads=1),
    "distilbert": DistilBertConfig(**DISTILBERT),  # has dropout
    "mpnet": MPNetConfig(**SIZES),  # its layers return tuples
    "deberta-v2": DebertaV2Config(**SIZES),  # so do these
    "electra": ElectraConfig(**SIZES, embedding_size=8),  # a projection between the embeddings and the layers
}
TARGETS = {
    "modernbert": ["Wqkv", "dense"],
    "llama": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "mpnet": ["q", "v"],
    "deberta-v2": ["query_proj", "value_proj"],
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


def in_one_batch(model: torch.nn.Module, data: TokenisedText, **arguments: object) -> tuple[TokenisedText, list[int]]:
    """Texts that all passed the prefix together, and the order in which they did."""
    return encode_prefix(model, data, token_budget=10**6, **arguments), list(
        micro_batches(data.lengths, range(len(data)), 10**6)[0]
    )


def clipped_sum(model: torch.nn.Module, data: TokenisedText, rows: list[int]) -> dict[object, torch.Tensor]:
    trained = train_only(model, B_AND_HEAD)
    inputs, labels = data.batch(rows)
    engine = HookGradients(model, trained, loss=class_losses)
    total = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    engine.close()
    return total


def logits(model: torch.nn.Module, data: TokenisedText, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(**data.batch(rows)[0]).logits


def parity(module: object, config: PreTrainedConfig) -> None:
    """Logits and clipped gradients of the model above its prefix are those of the whole model."""
    whole, data = adapted(config, layers=[2, 3]), texts()
    rows = list(range(len(data)))
    short, cached = module.without_prefix(whole), module.encode_prefix(whole, data, token_budget=20)
    torch.testing.assert_close(logits(short, cached, rows), logits(whole, data, rows), rtol=1e-5, atol=1e-5)
    sums = [clipped_sum(whole, data, rows), clipped_sum(short, cached, rows)]
    assert sums[0].keys() == sums[1].keys()
    for slot, total in sums[0].items():
        torch.testing.assert_close(sums[1][slot], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_cut_model_has_the_logits_and_clipped_gradients_of_the_whole(config: PreTrainedConfig) -> None:
    parity(fedlr.models.prefix, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY)
def test_in_the_same_micro_batch_every_bit_is_that_of_the_whole_model(family: str, dtype: str, tmp_path: Path) -> None:
    whole, data = adapted(FAMILY[family], layers=[2, 3]), texts()
    whole = with_bfloat16_base(whole) if dtype == "bfloat16" else whole
    short = without_prefix(whole)
    for store in (None, TableStore(max_bytes=0), TableStore(tmp_path)):
        cached, rows = in_one_batch(whole, data, store=store)
        assert cached.batch(rows)[0]["inputs_embeds"].dtype == getattr(torch, dtype)
        assert torch.equal(logits(short, cached, rows), logits(whole, data, rows))
        expected = clipped_sum(whole, data, rows)
        assert all(torch.equal(total, expected[slot]) for slot, total in clipped_sum(short, cached, rows).items())


def test_bfloat16_states_that_are_converted_are_caught() -> None:
    change = ("states.view(torch.uint16) if states.dtype == torch.bfloat16 else states", "states.to(torch.uint16)")
    with pytest.raises(InputError, match="bert"):
        mutant(fedlr.models.prefix, change).without_prefix(with_bfloat16_base(adapted(FAMILY["bert"], layers=[2])))


@pytest.mark.parametrize(
    "change",
    [
        ("layers[index] = _Skipped(layers[index])", "layers[index] = _Skipped(layers[0]) if index else layers[index]"),
        ("for index in range(first):", "for index in range(first + 1):"),
        ("_stopping_at(model, layers[first])", "_stopping_at(model, layers[first - 1])"),
        ("_encoder_owner(short).embeddings = _Given()", "pass"),
        ("state[: end - start]", "state[-(end - start) :]"),
    ],
    ids=["a layer twice", "a layer too few", "caught too early", "embedded twice", "padding kept"],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_cuts_that_are_wrong_are_seen(family: str, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, InputError)):
        parity(mutant(fedlr.models.prefix, change), FAMILY[family])


@pytest.mark.parametrize(
    "change",
    [
        ("layers[index] = _Skipped(layers[index])", "layers[index] = _Skipped(layers[0]) if index else layers[index]"),
        ("_encoder_owner(short).embeddings = _Given()", "pass"),
    ],
)
def test_the_probe_refuses_a_wrong_cut_by_itself(change: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="roberta"):
        mutant(fedlr.models.prefix, change).without_prefix(adapted(FAMILY["roberta"], layers=[2, 3]))


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


def test_the_number_of_threads_changes_no_bit() -> None:
    model, data = adapted(FAMILY["bert"], layers=[2]), client_data(random_rows(60, seed=2))
    before = torch.get_num_threads()
    hidden = [encode_prefix(model, data, token_budget=40, num_threads=n).hidden for n in (1, 3, 1)]
    assert all(np.array_equal(hidden[0], other) for other in hidden[1:])
    assert torch.get_num_threads() == before


def changed_tensor() -> tuple[PeftModel, TokenisedText]:
    model, data = default()
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[1].output.LayerNorm.bias[3] += 1e-3
    return model, data


def changed_setting() -> tuple[PeftModel, TokenisedText]:
    model, data = default()
    model.base_model.model.bert.config.layer_norm_eps = 1e-6
    return model, data


def changed_texts() -> tuple[PeftModel, TokenisedText]:
    model, data = default()
    data.ids[5] = 4 if data.ids[5] != 4 else 5
    return model, data


def other_split() -> tuple[PeftModel, TokenisedText]:
    rows = random_rows(13, seed=5)
    long = next(index for index, row in enumerate(rows) if len(row) > 1 and index + 1 < len(rows))
    rows[long], rows[long + 1] = rows[long][:-1], rows[long][-1:] + rows[long + 1]
    return default()[0], client_data(rows)


def default() -> tuple[PeftModel, TokenisedText]:
    return adapted(FAMILY["bert"], layers=[2]), texts()


OTHERS = {
    "a tensor below": changed_tensor,
    "a setting": changed_setting,
    "a token": changed_texts,
    "where texts end": other_split,
    "the cut": lambda: (adapted(FAMILY["bert"], layers=[3]), texts()),
    "the type": lambda: (with_bfloat16_base(default()[0]), texts()),
}


def check_stored(module: object, folder: Path, other: Callable[[], tuple[PeftModel, TokenisedText]]) -> None:
    store = TableStore(folder)
    model, data = default()
    first = module.encode_prefix(model, data, store=store).hidden
    changed, texts_ = other()
    got = module.encode_prefix(changed, texts_, store=store).hidden
    assert np.array_equal(got, encode_prefix(changed, texts_).hidden)
    assert np.array_equal(module.encode_prefix(model, data, store=store).hidden, first)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_stored_states_are_those_of_these_texts_and_layers(tmp_path: Path, other: Callable) -> None:
    check_stored(fedlr.models.prefix, tmp_path, other)


@pytest.mark.parametrize(
    ("other", "change"),
    [
        ("a tensor below", ('"prefix": _digest', '"prefix": "" and _digest')),
        ("a setting", ("json.dumps([settings,", "json.dumps([")),
        ("a token", ("_digest(data.ids, data.offsets)", "_digest(data.offsets)")),
        ("where texts end", ("_digest(data.ids, data.offsets)", "_digest(data.ids)")),
    ],
)
def test_a_key_that_forgets_something_is_caught(tmp_path: Path, other: str, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_stored(mutant(fedlr.models.prefix, change), tmp_path, OTHERS[other])


def test_stored_states_are_found_by_another_run_whatever_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_prefix(*default(), store=TableStore(tmp_path)).hidden
    model, data = default()
    model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1.0)
    monkeypatch.setattr(model, "forward", None)  # nothing may pass it
    assert np.array_equal(encode_prefix(model, data, store=TableStore(tmp_path)).hidden, first)


def test_no_text_at_all_has_no_hidden_states() -> None:
    empty = encode_prefix(adapted(FAMILY["bert"], layers=[2]), texts().subset([]))
    assert empty.hidden.shape == (0, 16)
