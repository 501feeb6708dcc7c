"""Pooled features: what a plain computation gives, a bounded gradient, and every part of a run that stands on them.

Mutants killed: a mean over padding, a last token that is padding, features that are not normalised, a bias that is no
constant, a last layer cut to its first token behind a head of zeros, a head of zeros that hides any difference.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5Model

import fedlr.models.pooling as shipped
from fedlr.adapters.state import HEAD, LORA_B
from fedlr.data.store import TableStore
from fedlr.errors import InputError
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.network import BaseModel, attach_lora, pretrained, word_tokenizer
from fedlr.models.peft_state import adapter_parameters, read_adapter, train_only, write_adapter
from fedlr.models.pooling import BIAS_FEATURE, POOLINGS, pooled, pooling_of
from fedlr.models.precision import with_bfloat16_base
from fedlr.models.prefix import encode_features, encode_prefix, without_encoder, without_prefix
from fedlr.models.zero_head import awake, check_head_trains, zero_layers
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import micro_batches
from fedlr.tasks.losses import class_losses
from fedlr.tasks.synthetic import VOCABULARY
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.first_token import first_token_only
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from fedlr.training.supported import check_supported
from tests.training.small_models import mutant

LABELS = ("negative", "neutral", "positive")
WIDTHS = {
    "vocab_size": 150,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
LORA = AdapterConfig(rank=2, lora_alpha=2, target_modules=["value"], layers=[2], train_head=True)
B_AND_HEAD, LARGEST = frozenset({LORA_B, HEAD}), math.sqrt(2 * (1 + BIAS_FEATURE**2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with a pooler."""
    place = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**WIDTHS)).save_pretrained(place)
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(place)
    return place


def load(folder: Path, pooling: str | None = "mean_normalised", **options: object) -> BaseModel:
    return pretrained(name_or_path=str(folder), label_names=LABELS, seed=1, pooling=pooling, **options)


def texts(num_texts: int = 9) -> TokenisedText:
    generator = np.random.default_rng(3)
    lengths = generator.integers(2, 12, num_texts)
    ids = generator.integers(4, 100, lengths.sum()).astype(np.int32)
    return TokenisedText(ids, np.concatenate([[0], np.cumsum(lengths)]), generator.integers(0, 3, num_texts), 0, 0)


def plain(states: torch.Tensor, length: int, pooling: str) -> torch.Tensor:
    """One row, without its padding, by Python's own loop."""
    row = states[:length].double()
    vector = {"cls": row[0], "mean": sum(row) / length, "last": row[length - 1]}[pooling.partition("_")[0]]
    if pooling.endswith("normalised"):
        vector = vector / math.sqrt(sum(float(x) ** 2 for x in vector))
    return torch.cat([vector, torch.tensor([0.1], dtype=torch.float64)])


def same_as_plain(module: object, pooling: str) -> bool:
    lengths = [7, 1, 4]
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    found = module.pooled(states, mask, pooling)
    wanted = torch.stack([plain(row, length, pooling) for row, length in zip(states, lengths, strict=True)])
    return found.shape == wanted.shape and torch.allclose(found.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_of_a_padded_batch_are_those_of_a_plain_loop(pooling: str) -> None:
    assert same_as_plain(shipped, pooling)


@pytest.mark.parametrize(
    ("change", "pooling"),
    [
        (("(states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)", "states.mean(dim=1)"), "mean"),
        (("(mask.sum(dim=1) - 1)", "(mask.sum(dim=1) * 0 - 1 + mask.shape[1])"), "last"),
        (("vectors = F.normalize(vectors, dim=-1)", "pass"), "mean_normalised"),
        (("value=BIAS_FEATURE", "value=1.0"), "cls"),
    ],
    ids=["over padding", "padding last", "not normalised", "another constant"],
)
def test_wrong_features_are_seen(change: tuple[str, str], pooling: str) -> None:
    assert not same_as_plain(mutant(shipped, change), pooling)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_states_of_one_token_are_no_states_of_a_text(kind: str) -> None:
    with pytest.raises(ValueError, match="all tokens"):
        pooled(torch.ones(2, 1, 4), torch.ones(2, 3, dtype=torch.long), kind)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_model_reads_padded_texts_as_it_reads_them_alone(folder: Path, pooling: str) -> None:
    base, data = load(folder, pooling), texts()
    with torch.no_grad():
        together = base.network(**data.batch(range(len(data)))[0]).logits
        for row in range(len(data)):
            alone = base.network(**data.batch([row])[0]).logits
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-6)


def modules(folder: Path, place: Path, *kinds: str, section: dict[str, object] | None = None) -> Path:
    """A copy of the encoder with the files of sentence-transformers."""
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    listed = [{"path": f"{i}_{kind}" if i else "", "type": f"a.models.{kind}"} for i, kind in enumerate(kinds)]
    (place / "modules.json").write_text(json.dumps(listed))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps(section))
    return place


@pytest.mark.parametrize(
    ("section", "kinds", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ["Normalize"], "mean_normalised"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, [], "mean"),
        ({"pooling_mode_cls_token": True}, ["Normalize"], "cls_normalised"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 16}, [], "last"),
        ({"pooling_mode": "mean"}, [], "mean"),
    ],
)
def test_auto_is_what_the_files_of_the_encoder_say(
    folder: Path, tmp_path: Path, section: dict, kinds: list[str], wanted: str
) -> None:
    place = modules(folder, tmp_path, "Transformer", "Pooling", *kinds, section=section)
    assert load(place, "auto").pooling == wanted
    assert load(place, None).pooling is None
    assert load(folder, "auto").pooling is None


@pytest.mark.parametrize(
    ("kinds", "section", "says"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "and"),
        (["Transformer", "Pooling"], {}, "none in 1_Pooling"),
        (["Transformer", "Pooling"], [3], "none in 1_Pooling"),
        (["Transformer"], {}, "modules Transformer"),
        ([], {}, "another form"),
    ],
)
def test_pooling_that_is_not_served_is_refused_by_name(
    folder: Path, tmp_path: Path, kinds: list[str], section: object, says: str
) -> None:
    place = modules(folder, tmp_path, *kinds, section=section)
    with pytest.raises(InputError, match=r"model\.pooling") as caught:
        load(place, "auto")
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ['{"a": 1}', "{", '[{"type": "x.Pooling", "path": "../.."}]', "[[1]]", "3"])
def test_strange_module_files_are_refused_and_no_other_folder_is_read(
    folder: Path, tmp_path: Path, content: str
) -> None:
    modules(folder, tmp_path, "Transformer", "Pooling", section={}).joinpath("modules.json").write_text(content)
    with pytest.raises(InputError, match=r"modules\.json"):
        pooling_of(str(tmp_path))


def test_an_unknown_pooling_and_an_encoder_with_a_decoder_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.pooling.*'max'"):
        load(folder, "max")
    T5Model(T5Config(vocab_size=150, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.pooling=null for t5"):
        load(tmp_path, "mean")


def test_the_hash_of_the_body_depends_on_no_pooling_and_no_head(folder: Path, tmp_path: Path) -> None:
    for build in (lambda: BertModel(BertConfig(**WIDTHS), add_pooling_layer=False), lambda: RobertaModel(roberta())):
        build().save_pretrained(tmp_path)
        word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path)
        for place in (folder, tmp_path):
            found = {load(place, pooling, head_std=std).body_sha256 for pooling in (None, "mean") for std in (None, 0)}
            assert len(found) == 1
    assert load(folder, "mean").fingerprint != load(folder, None).fingerprint


def roberta() -> RobertaConfig:
    return RobertaConfig(**{**WIDTHS, "pad_token_id": 0})


def test_all_linear_layers_of_a_pooled_model_take_part(folder: Path) -> None:
    base = load(folder, head_std=0)
    model = attach_lora(base, LORA.model_copy(update={"target_modules": "all-linear", "layers": None}), seed=0)
    check_supported(model, B_AND_HEAD)
    assert not any("pooler" in slot.path for slot in read_adapter(model).tensors)


def trained_model(folder: Path, pooling: str, *, far: bool = True) -> nn.Module:
    model = attach_lora(load(folder, pooling, head_std=0), LORA, seed=0)
    if far:
        with torch.no_grad():
            for slot, parameter in sorted(adapter_parameters(model).items()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(slot.path))))
    return model.train()


@pytest.mark.parametrize("far", [False, True], ids=["at the start", "far from it"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_engine_has_the_gradients_of_a_loop(folder: Path, pooling: str, far: bool) -> None:
    model, data = trained_model(folder, pooling, far=far), texts()
    inputs, labels = data.batch(range(len(data)))
    trained = train_only(model, B_AND_HEAD)
    wanted = LoopGradients(model, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=0.7)
    for engine in (FusedGradients, HookGradients, GhostGradients):
        way = engine(model, trained, loss=class_losses)
        found = way.clipped_sum(Batch(inputs, labels), max_grad_norm=0.7)
        way.close()
        for slot, total in wanted.items():
            torch.testing.assert_close(found[slot], total, rtol=1e-4, atol=1e-5)


def largest_norm(folder: Path, pooling: str) -> float:
    """The largest gradient of the head alone, unclipped, at a head so sure that some rows are as wrong as can be."""
    model, data = trained_model(folder, pooling), texts(40)
    trained = train_only(model, frozenset({HEAD}))
    with torch.no_grad():
        next(iter(trained.values())).mul_(1e4)
    loop, norms = LoopGradients(model, trained, loss=class_losses), []
    for row in range(len(data)):
        inputs, labels = data.batch([row])
        (total,) = loop.clipped_sum(Batch(inputs, labels), max_grad_norm=math.inf).values()
        norms.append(float(total.norm()))
    return max(norms)


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLINGS if pooling.endswith("normalised")])
def test_no_text_moves_the_head_by_more_than_its_public_bound(folder: Path, pooling: str) -> None:
    norm = largest_norm(folder, pooling)
    assert norm == pytest.approx(LARGEST, rel=1e-3) and norm <= LARGEST * (1 + 1e-5) < 1.43


def test_features_of_any_length_break_that_bound(folder: Path) -> None:
    assert largest_norm(folder, "mean") > 2 * LARGEST


def test_one_row_that_is_not_finite_has_no_features_that_reach_another(folder: Path) -> None:
    mask = torch.ones(2, 3, dtype=torch.long)
    states = torch.stack([torch.full((3, 4), math.nan), torch.ones(3, 4)])
    for pooling in POOLINGS:
        assert pooled(states, mask, pooling)[1].isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_zero_head_hides_no_wrong_last_layer(folder: Path, pooling: str) -> None:
    """The layer for one token serves cls alone, whatever the head says at the start."""
    model, data = trained_model(folder, pooling, far=False), texts()
    assert zero_layers(model)
    short = first_token_only(model)
    cut = any(type(module).__name__ == "_BertLayer" for module in short.modules())
    assert cut == pooling.startswith("cls")
    inputs, _ = data.batch(range(len(data)))
    with torch.no_grad():
        for both in (model, short):
            write_adapter(both, {s: torch.ones_like(p) for s, p in adapter_parameters(both).items() if s.role == HEAD})
        torch.testing.assert_close(short(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_an_awake_copy_shares_all_but_the_zero_head(folder: Path) -> None:
    model = trained_model(folder, "mean", far=False)
    copy = awake(model)
    inputs = texts().batch([0, 1]).inputs
    assert not model(**inputs).logits.any() and copy(**inputs).logits.all()
    own, other = dict(model.named_parameters()), dict(copy.named_parameters())
    assert [name for name in own if own[name] is not other[name]] == [
        "base_model.model.classifier.modules_to_save.default.weight"
    ]
    assert awake(trained_model(folder, "mean")) is not copy


def test_a_frozen_head_of_zeros_is_refused(folder: Path) -> None:
    model = trained_model(folder, "mean", far=False)
    with pytest.raises(InputError, match=r"adapter\.train_head=true.*model\.head_std"):
        check_head_trains(model, head_trains=False)
    check_head_trains(model, head_trains=True)
    check_head_trains(trained_model(folder, "mean"), head_trains=False)


def test_a_head_std_of_zero_makes_the_last_layer_of_any_new_head_zero(folder: Path, tmp_path: Path) -> None:
    RobertaModel(roberta()).save_pretrained(tmp_path)
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path)
    head = load(tmp_path, None, head_std=0).network.classifier
    assert not head.out_proj.weight.any() and not head.out_proj.bias.any() and head.dense.weight.all()
    trained = load(folder, None, head_std=0.5).network
    trained.save_pretrained(tmp_path / "with a head")
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path / "with a head")
    brought = load(tmp_path / "with a head", None, head_std=0)
    assert torch.equal(brought.network.classifier.weight, trained.classifier.weight) and not brought.head_is_drawn


def in_one_batch(encode: Callable, model: nn.Module, data: TokenisedText) -> tuple[TokenisedText, list[int]]:
    return encode(model, data, token_budget=10**6), list(micro_batches(data.lengths, range(len(data)), 10**6)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_behind_a_cached_prefix_every_bit_is_that_of_the_whole_model(folder: Path, pooling: str, dtype: str) -> None:
    whole, data = trained_model(folder, pooling), texts()
    whole = with_bfloat16_base(whole) if dtype == "bfloat16" else whole
    cached, rows = in_one_batch(encode_prefix, whole, data)
    with torch.no_grad():
        wanted = whole(**data.batch(rows)[0]).logits
        assert wanted.dtype == torch.float32
        assert torch.equal(without_prefix(whole)(**cached.batch(rows)[0]).logits, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_cached_features_give_every_bit_of_the_whole_model(
    folder: Path, pooling: str, dtype: str, tmp_path: Path
) -> None:
    whole, data = trained_model(folder, pooling, far=False), texts()
    whole = with_bfloat16_base(whole) if dtype == "bfloat16" else whole
    head = {slot: torch.randn(p.shape) for slot, p in adapter_parameters(whole).items() if slot.role == HEAD}
    write_adapter(whole, head)
    short = without_encoder(whole)
    cached, rows = in_one_batch(encode_features, whole, data)
    assert cached.lengths.tolist() == [1] * len(data) and cached.hidden.shape == (len(data), 17)
    with torch.no_grad():
        wanted = whole(**data.batch(rows)[0]).logits
        assert torch.equal(short(**cached.batch(rows)[0]).logits, wanted)
    stored = encode_features(whole, data, store=TableStore(tmp_path))
    assert np.array_equal(stored.hidden, encode_features(whole, data, store=TableStore(tmp_path)).hidden)
    assert len(list(tmp_path.iterdir())) == 1
    trained = train_only(short, frozenset({HEAD}))
    inputs, labels = cached.batch(rows)
    fused, loop = (
        engine(short, trained, loss=class_losses).clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
        for engine in (FusedGradients, LoopGradients)
    )
    for slot, total in loop.items():
        torch.testing.assert_close(fused[slot], total, rtol=1e-4, atol=1e-6)


def test_stored_features_of_another_pooling_or_encoder_are_not_found(folder: Path, tmp_path: Path) -> None:
    data, store = texts(), TableStore(tmp_path / "store")
    models = [trained_model(folder, "mean", far=False), trained_model(folder, "last", far=False)]
    models.append(trained_model(folder, "mean", far=False))
    with torch.no_grad():
        next(iter(models[-1].get_base_model().bert.encoder.layer[2].parameters())).mul_(2)
    tables = [encode_features(model, data, store=store).hidden for model in models]
    assert len(list((tmp_path / "store").iterdir())) == 3
    assert not np.allclose(tables[0], tables[1]) and not np.allclose(tables[0], tables[2])


def test_features_of_a_class_of_its_own_are_not_cached(folder: Path) -> None:
    model = attach_lora(load(folder, None), LORA, seed=0)
    with pytest.raises(InputError, match="pooled by model.pooling"):
        without_encoder(model)
