"""Causal language models as they lie on disk are loaded whole, frozen, and in the numbers that were asked for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from fedlr.errors import InputError
from fedlr.models import gguf
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.causal import chat_tokenizer, pretrained_causal, tiny_random_causal
from fedlr.models.gguf import converted, gguf_in
from fedlr.models.network import attach_lora
from fedlr.models.peft_state import read_adapter
from tests.causal_families import BUILDERS, TARGETS, causal_network, save_causal


@pytest.mark.parametrize("family", BUILDERS)
def test_a_saved_family_is_loaded_as_it_is_and_takes_an_adapter(family: str, tmp_path: Path) -> None:
    base = pretrained_causal(name_or_path=str(save_causal(family, tmp_path / family)))
    wanted = causal_network(family).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in base.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.network.parameters())
    config = AdapterConfig(rank=2, lora_alpha=2, target_modules=TARGETS[family], train_head=False)
    model = attach_lora(base, config, seed=1)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert {slot.role for slot in read_adapter(model).tensors} == {"lora_A", "lora_B"}


def test_a_base_in_bfloat16_is_never_in_float32_and_its_adapter_is(tmp_path: Path) -> None:
    base = pretrained_causal(name_or_path=str(save_causal("smollm2", tmp_path / "m")), dtype="bfloat16")
    assert {parameter.dtype for parameter in base.network.parameters()} == {torch.bfloat16}
    config = AdapterConfig(rank=2, lora_alpha=2, target_modules=["q_proj"], train_head=False)
    model = attach_lora(base, config, seed=1)
    assert {tensor.dtype for tensor in read_adapter(model).tensors.values()} == {torch.float32}


def test_a_checkpoint_without_a_tensor_and_a_model_that_sees_ahead_are_refused(tmp_path: Path) -> None:
    folder = save_causal("llama", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"all of its tensors, got .* without lm_head\.weight"):
        pretrained_causal(name_or_path=str(folder))
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    chat_tokenizer(["w"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="reads from left to right"):
        pretrained_causal(name_or_path=str(tmp_path / "bert"))


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing folder"):
        pretrained_causal(name_or_path=str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no config.json"):
        pretrained_causal(name_or_path=str(tmp_path))
    with pytest.raises(InputError, match=r"model\.dtype to be one of float32, bfloat16"):
        pretrained_causal(name_or_path=str(tmp_path), dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiple of"):
        tiny_random_causal(seed=1, hidden_size=34)


def test_a_gguf_file_is_found_alone_and_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert gguf_in(tmp_path) == file and gguf_in(tmp_path / "absent") is None
    monkeypatch.setenv("FEDLR_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(gguf, "convert", lambda file, folder: (calls.append(file), folder.mkdir()))
    assert converted(file) == converted(file) and calls == [file]
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"one \.gguf file.*model\.gguf, other\.gguf"):
        gguf_in(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert gguf_in(tmp_path) is None


def test_a_file_that_is_no_gguf_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF but not really")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps gguf"):
        gguf.convert(file, tmp_path / "out")
    monkeypatch.setattr(gguf, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="a GGUF file of a causal language model"):
        gguf.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
