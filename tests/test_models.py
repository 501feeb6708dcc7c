"""The base model: found, pinned, deterministic, with its adapter; and what cannot be loaded says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from fedlr.adapters.state import HEAD
from fedlr.errors import InputError
from fedlr.models.fingerprint import tensor_fingerprint
from fedlr.models.network import AdapterConfig, attach_lora, pretrained, resolve, tiny_random, word_tokenizer
from fedlr.models.peft_state import read_adapter
from fedlr.tasks.synthetic import VOCABULARY

LABELS = ("negative", "neutral", "positive")
WIDTHS = {
    "vocab_size": 150,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
BERT = BertConfig(**WIDTHS)
LORA = AdapterConfig(rank=4, lora_alpha=8, target_modules=["query", "value"])


@pytest.fixture
def save(tmp_path: Path) -> Callable[[nn.Module], str]:
    """Save a network with a tokenizer, as a published checkpoint lies on disk."""

    def to_folder(network: nn.Module) -> str:
        network.save_pretrained(tmp_path / "base")
        word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return to_folder


def load(folder: str, *, seed: int = 0, **options: object) -> object:
    return pretrained(name_or_path=folder, label_names=LABELS, seed=seed, **options)


def head(base: object) -> torch.Tensor:
    return base.network.classifier.weight


def test_head_comes_from_the_seed_and_the_rest_from_the_checkpoint(save: Callable) -> None:
    folder = save(BertModel(BERT))
    one, same, other = load(folder, seed=3), load(folder, seed=3), load(folder, seed=4)
    assert torch.equal(head(one), head(same))
    assert one.fingerprint == same.fingerprint
    assert not torch.isclose(head(one), head(other)).any()
    for name, tensor in one.network.bert.state_dict().items():
        assert torch.equal(tensor, other.network.bert.state_dict()[name])


def test_loading_leaves_torchs_global_generator_alone(save: Callable) -> None:
    folder = save(BertModel(BERT))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    attach_lora(load(folder), LORA, seed=1)
    attach_lora(tiny_random(label_names=LABELS, seed=1), LORA, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_global_seed_has_no_say() -> None:
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = attach_lora(tiny_random(label_names=LABELS, seed=7), LORA, seed=7)
        hashes.add((tensor_fingerprint(model), read_adapter(model).fingerprint()))
    assert len(hashes) == 1
    assert read_adapter(attach_lora(tiny_random(label_names=LABELS, seed=7), LORA, seed=8)).fingerprint() not in hashes


def test_adapter_starts_at_the_base_model() -> None:
    adapter = read_adapter(attach_lora(tiny_random(label_names=LABELS, seed=0), LORA, seed=0))
    assert all(
        float(layer.lora_B.abs().max()) == 0 < float(layer.lora_A.abs().min()) for layer in adapter.factors().values()
    )
    assert adapter.scale == 2.0
    rslora = LORA.model_copy(update={"use_rslora": True})
    assert read_adapter(attach_lora(tiny_random(label_names=LABELS, seed=0), rslora, seed=0)).scale == 4.0


@pytest.mark.parametrize(
    "network",
    [
        lambda: BertModel(BertConfig(**WIDTHS, classifier_dropout=0.3)),
        lambda: RobertaModel(RobertaConfig(**WIDTHS)),
        lambda: DistilBertModel(DistilBertConfig(vocab_size=150, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
    ],
    ids=["bert", "roberta", "distilbert"],
)
def test_no_dropout_is_left_anywhere(save: Callable, network: Callable[[], nn.Module]) -> None:
    loaded = load(save(network())).network.train()
    assert {module.p for module in loaded.modules() if isinstance(module, nn.Dropout)} == {0.0}
    found = {key: value for key, value in loaded.config.to_dict().items() if "drop" in key and value}
    assert not found
    ids = torch.randint(4, 100, (2, 6))
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_fingerprint_changes_with_every_tensor() -> None:
    network = tiny_random(label_names=LABELS, seed=0).network
    before = tensor_fingerprint(network)
    hashes = {before}
    for tensor in network.state_dict().values():
        kept = tensor.clone()
        tensor.view(-1)[-1] = torch.nextafter(kept.view(-1)[-1], torch.tensor(9.0))
        hashes.add(tensor_fingerprint(network))
        tensor.copy_(kept)
    assert len(hashes) == 1 + len(network.state_dict())
    assert tensor_fingerprint(network) == before


def test_fingerprint_takes_scalars_and_sees_names() -> None:
    one, other = nn.Module(), nn.Module()
    one.register_buffer("steps", torch.tensor(3))
    other.register_buffer("stops", torch.tensor(3))
    assert tensor_fingerprint(one) != tensor_fingerprint(other)


def test_head_std_sets_the_spread_of_a_new_head_only(save: Callable) -> None:
    folder = save(BertModel(BERT))
    usual, wide = load(folder), load(folder, head_std=0.5)
    assert float(head(wide).std() / head(usual).std()) == pytest.approx(25, rel=1e-3)
    assert torch.equal(usual.network.bert.pooler.dense.weight, wide.network.bert.pooler.dense.weight)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="head_std"):
            load(folder, head_std=wrong)


def test_a_head_for_other_labels_is_replaced(save: Callable) -> None:
    folder = save(BertForSequenceClassification(BertConfig(**WIDTHS, num_labels=7)))
    base = load(folder)
    assert head(base).shape == (3, 16)
    assert base.network.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(head(base), head(load(folder)))


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_adapter(save: Callable) -> None:
    base = load(save(BertForMaskedLM(BERT)))
    assert base.drawn == ("bert.pooler.dense",)
    heads = {slot.path for slot in read_adapter(attach_lora(base, LORA, seed=0)).tensors if slot.role == HEAD}
    assert {path.removeprefix("base_model.model.") for path in heads} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_the_hash_of_a_body_without_its_drawn_pooler_sees_every_other_layer(save: Callable) -> None:
    """A device's policy names the body by this hash; leaving out all layers called `dense` would let another pass."""
    base = load(save(BertForMaskedLM(BERT)))
    before = base.body_sha256
    with torch.no_grad():
        base.network.bert.pooler.dense.weight.add_(1.0)
        assert base.body_sha256 == before
        base.network.bert.encoder.layer[0].output.dense.weight.add_(1.0)
    assert base.body_sha256 != before


def test_a_checkpoint_of_another_encoder_is_refused(save: Callable, tmp_path: Path) -> None:
    folder = save(BertModel(BERT))
    other = BertConfig(**{**WIDTHS, "num_hidden_layers": 3})
    other.save_pretrained(folder)
    with pytest.raises(InputError, match=r"without bert.encoder.layer.2.attention"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pkg:no_such_package/model", "pip install --no-deps no-such-package"),
        ("pkg:", "installed package"),
        ("pkg:json.decoder/model", "installed package"),
        ("pkg:../..", "installed package"),
        ("pkg:math/model", "installed package"),
        ("pkg:transformers/no_such_folder", "no_such_folder"),
        ("./no/such/folder", "existing folder"),
        ("~/no/such/folder", "existing folder"),
        ("/no/such/folder", "existing folder"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match="model.name_or_path") as caught:
        load(name)
    assert says in str(caught.value)


def test_names_lead_to_folders_or_stay_hub_names(tmp_path: Path) -> None:
    assert Path(resolve("pkg:transformers/models")).is_dir()
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("FacebookAI/roberta-large") == "FacebookAI/roberta-large"


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors")


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')


def no_files(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [break_config, unknown_architecture, remote_code, pickled, cut, no_tensors, broken_tokenizer, no_files],
    ids=lambda spoil: spoil.__name__,
)
def test_a_spoilt_folder_is_refused_and_runs_nothing(save: Callable, spoil: Callable[[Path], None]) -> None:
    folder = Path(save(BertModel(BERT)))
    spoil(folder)
    with pytest.raises(InputError, match="model.name_or_path"):
        load(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 33}, "adapter.rank <= 32.*got 33"),
        ({"rank": 4000}, "adapter.rank <= 32"),
        ({"target_modules": ["q_proj"]}, "target_modules.*query"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "nothing.*"}, "target_modules"),
        ({"layers": [7]}, "adapter.layers"),
        ({"target_modules": ".*query", "layers": [0]}, "adapter.layers"),
        ({"target_modules": ["LayerNorm"]}, "target_modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        attach_lora(tiny_random(label_names=LABELS, seed=0), LORA.model_copy(update=changes), seed=0)


def test_the_largest_rank_that_fits_is_let_through() -> None:
    model = attach_lora(tiny_random(label_names=LABELS, seed=0), LORA.model_copy(update={"rank": 32}), seed=0)
    assert {tuple(layer.lora_A.shape) for layer in read_adapter(model).factors().values()} == {(32, 32)}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_a_fused_layer_of_gpt2_can_be_adapted(save: Callable) -> None:
    network = GPT2ForSequenceClassification(GPT2Config(vocab_size=150, n_embd=16, n_layer=2, n_head=2, n_positions=40))
    base = load(save(network))
    model = attach_lora(base, LORA.model_copy(update={"target_modules": ["c_attn"]}), seed=0)
    assert {tuple(layer.lora_B.shape) for layer in read_adapter(model).factors().values()} == {(48, 4)}
    with pytest.raises(InputError, match=r"such as c_attn.*query"):
        attach_lora(load(save(network)), LORA, seed=0)
