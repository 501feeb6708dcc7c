"""The released LoRA of a language model, by the rules of those who serve it: llama.cpp and vLLM, written down here.

llama.cpp, `convert_lora_to_gguf.py`: every tensor is `base_model.model.TENSOR` with `.lora_A.weight` (R, K) or
`.lora_B.weight` (D, R) in place of `.weight`, both there, of one rank, and TENSOR one of the base model's; all else
stops it. A layer's scale is `lora_alpha` over the rank of its own tensors; no other key of adapter_config.json is read
but `base_model_name_or_path`. lm_head is refused where it is the embedding.

vLLM, `lora/peft_helper.py`, `lora/lora_model.py`, `lora/utils.py`: needs `r`, `lora_alpha`, `target_modules`; refuses
`modules_to_save`, `use_dora` and a bias; names as above; each layer's last name must be that of a linear layer; its
rank at most `r`, and the scale `lora_alpha` over `r` (over its root with `use_rslora`) for all layers.

Mutant: the export without one rank for all (each layer's own rank in `rank_pattern`), which PEFT opens as it should,
and which both servers would read at another scale.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from fedlr.adapters.state import AdapterState, LoraFactors
from fedlr.models import export
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.causal import pretrained_causal, tiny_random_causal
from fedlr.models.network import BaseModel, attach_lora
from fedlr.models.peft_state import read_adapter
from fedlr.rounds.pools.local import sharing_base
from tests.causal_families import save_causal

PREFIX = "base_model.model."
STATEMENT = {"statement": "None.", "not_covered": []}
LORA = AdapterConfig(rank=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], train_head=False)


def moved(base: BaseModel, *, side: bool = False, **changes: object) -> tuple[PeftModel, AdapterState]:
    """An adapter after some training; with `side`, something is folded away in one of its layers."""
    model = attach_lora(base, LORA.model_copy(update=changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    start = read_adapter(model)
    state = start.with_tensors({s: t + torch.randn(t.shape, generator=generator) for s, t in start.tensors.items()})
    if side:
        path, layer = next(iter(state.factors().items()))
        more = LoraFactors(
            torch.randn(3, layer.lora_A.shape[1], generator=generator),
            torch.randn(len(layer.lora_B), 3, generator=generator),
        )
        state = AdapterState(state.tensors, scale=state.scale, side={path: more})
    return model, state


def exported(folder: Path, base: BaseModel, **changes: object) -> Path:
    model, state = moved(base, **changes)  # type: ignore[arg-type]
    card = {"name": "a run", "method": "fedsvd", "base": base, "max_length": 32, "statement": STATEMENT}
    export.export_adapter(sharing_base(model), state, folder, **card)
    return folder


def by_llama_cpp(folder: Path, network: nn.Module) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each tensor of the base model."""
    alpha = float(json.loads((folder / "adapter_config.json").read_text())["lora_alpha"])
    base, pairs = network.state_dict(), {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith(PREFIX), name
        inside, factor, weight = name.removeprefix(PREFIX).rsplit(".", 2)
        assert factor in ("lora_A", "lora_B") and weight == "weight", name
        assert tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        pairs.setdefault(f"{inside}.weight", {})[factor] = tensor
    found = {}
    for name, pair in pairs.items():
        assert set(pair) == {"lora_A", "lora_B"} and name in base and not name.startswith("lm_head")
        assert len(pair["lora_A"]) == pair["lora_B"].shape[1]
        found[name] = alpha / len(pair["lora_A"]) * pair["lora_B"] @ pair["lora_A"]
        assert found[name].shape == base[name].shape
    return found


def by_vllm(folder: Path, network: nn.Module) -> dict[str, torch.Tensor]:
    """What vLLM adds to each tensor of the base model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config.get("use_dora") and config["bias"] == "none"
    assert isinstance(config["target_modules"], list) and config["r"] >= 1
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    linear = {name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, lora_A in tensors.items():
        if name.endswith(".lora_A.weight"):
            inside = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            assert inside.rpartition(".")[2] in linear & {n.rpartition(".")[2] for n in config["target_modules"]}
            assert len(lora_A) <= config["r"]
            found[f"{inside}.weight"] = scale * tensors[name.replace("lora_A", "lora_B")] @ lora_A
    return found


IDS = torch.arange(4, 22).reshape(2, 9)


def says(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


CASES = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "folded": {"side": True},
    "folded and rank-stabilised": {"side": True, "use_rslora": True},
    "some layers": {"layers": [1]},
}


@pytest.mark.parametrize("case", CASES)
def test_servers_add_to_the_weights_what_peft_adds(case: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "adapter", tiny_random_causal(seed=0), **CASES[case])
    wanted = says(PeftModel.from_pretrained(tiny_random_causal(seed=0).network, folder))
    assert not torch.allclose(wanted, says(tiny_random_causal(seed=0).network), atol=1e-2)
    for server in (by_llama_cpp, by_vllm):
        network = tiny_random_causal(seed=0).network
        with torch.no_grad():
            for name, delta in server(folder, network).items():
                network.get_parameter(name).add_(delta)
        torch.testing.assert_close(says(network), wanted, rtol=1e-4, atol=1e-4)
    merged = PeftModel.from_pretrained(tiny_random_causal(seed=0).network, folder).merge_and_unload()
    torch.testing.assert_close(says(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["rank-stabilised", "folded"])
def test_an_export_with_a_rank_for_each_layer_would_be_served_wrongly(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "with_one_rank", lambda model: None)
    folder = exported(tmp_path / "adapter", tiny_random_causal(seed=0), **CASES[case])
    wanted, network = says(PeftModel.from_pretrained(tiny_random_causal(seed=0).network, folder)), None
    network = tiny_random_causal(seed=0).network
    with torch.no_grad():
        for name, delta in by_llama_cpp(folder, network).items():
            network.get_parameter(name).add_(delta)
    assert not torch.allclose(says(network), wanted, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_families_that_are_served_keep_the_rules(family: str, tmp_path: Path) -> None:
    saved = str(save_causal(family, tmp_path / "base"))
    folder = exported(tmp_path / "adapter", pretrained_causal(name_or_path=saved), side=True)
    network = pretrained_causal(name_or_path=saved).network
    assert by_llama_cpp(folder, network).keys() == by_vllm(folder, network).keys()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")


def test_tokenizer_template_and_what_ends_an_answer_lie_beside_the_adapter(tmp_path: Path) -> None:
    base = tiny_random_causal(seed=0)
    folder = exported(tmp_path / "adapter", base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == base.tokenizer.chat_template
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert settings.pad_token_id == tokenizer.pad_token_id
