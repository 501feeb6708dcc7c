"""Causal language models of many families, tiny and of random weights, as they lie on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedlr.adapters.state import HEAD
from fedlr.models.peft_state import adapter_parameters

VOCABULARY, END = 60, 2

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": END, "bos_token_id": 1, "eos_token_id": END}
_SMALL = {
    **_IDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
_GEMMA = {**_SMALL, "head_dim": 8}
_GPT2 = {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "initializer_range": 0.2}
_CAPS = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}

BUILDERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GEMMA)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GEMMA)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA, **_CAPS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=8)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SMALL)),  # its head has a bias
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SMALL)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SMALL, num_local_experts=3, num_experts_per_tok=2)),
}
TARGETS = dict.fromkeys(BUILDERS, ["q_proj", "v_proj"]) | {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}


def causal_network(family: str) -> PreTrainedModel:
    """Build a network whose tensors are all far from zero and one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = BUILDERS[family]()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    for owner in [*network.modules(), network.config]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(owner, torch.nn.Dropout)):
                setattr(owner, name, 0.0)
    return network.eval()


def causal_model(family: str, *, targets: list[str] | str | None = None, layers: list[int] | None = None) -> PeftModel:
    """Return a network with a LoRA adapter, in some layers or in all, whose tensors are far from zero."""
    network, targets = causal_network(family), targets or TARGETS[family]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, layers_to_transform=layers)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = get_peft_model(network, config)
        with torch.no_grad():
            for slot, parameter in adapter_parameters(model).items():
                assert slot.role != HEAD
                parameter.normal_(std=0.3)
    return model.train()


def causal_batch(num_rows: int, *, seed: int = 1, width: int = 11) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Draw token rows, padded on the right with the end token, and labels of which some are scored.

    Every row ends with the end token, which is scored; the first row has no scored token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (num_rows, width), generator=generator)
    lengths = torch.randint(4, width + 1, (num_rows, 1), generator=generator)
    lengths[-1] = width
    places = torch.arange(width)
    ids[places >= lengths - 1] = END
    labels = ids.clone()
    labels[(places >= lengths) | (places < lengths // 2)] = -100
    labels[0] = -100
    return {"input_ids": ids, "attention_mask": (places < lengths).long()}, labels


def save_causal(family: str, folder: Path) -> Path:
    """Save a checkpoint as a published one lies on disk, with a tokenizer that knows turns."""
    from fedlr.models.causal import chat_tokenizer

    causal_network(family).save_pretrained(folder)
    chat_tokenizer([f"word{number}" for number in range(VOCABULARY - 6)]).save_pretrained(folder)
    return folder
