"""What servers of language models ask of a LoRA folder, beyond PEFT: one rank and one scale, and what ends an answer.

llama.cpp's converter takes `lora_alpha` over the rank of each tensor, vLLM over `r`; both pass over `rank_pattern` and
`alpha_pattern`, and llama.cpp over `use_rslora`, without a word. So layers of unequal rank would be served at wrong
scales. Here they get the largest rank, filled up with zeros, and the scale that both compute
(`tests/test_served_layouts.py` writes their rules down).

Legend: D out_features, K in_features, R rank.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import GenerationConfig

from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import ADAPTER_NAME, adapted_layers
from fedlr.tasks.greedy import end_tokens


@torch.no_grad()
def with_one_rank(model: AdaptedModel) -> None:
    """Give all layers of a LoRA adapter one rank and one scale, without patterns; what they add to weights stays."""
    config = cast(LoraConfig, model.peft_config[ADAPTER_NAME])
    if not (config.rank_pattern or config.alpha_pattern or config.use_rslora):
        return
    layers: dict[str, Any] = dict(adapted_layers(model))
    rank = max(len(layer.lora_A[ADAPTER_NAME].weight) for layer in layers.values())
    scale = float(next(iter(layers.values())).scaling[ADAPTER_NAME])
    for layer in layers.values():
        lora_A, lora_B = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        missing, own = rank - len(lora_A), float(layer.scaling[ADAPTER_NAME]) / scale
        _put(layer.lora_A, F.pad(lora_A, (0, 0, 0, missing)))
        _put(layer.lora_B, F.pad(lora_B if own == 1.0 else lora_B * own, (0, missing)))
    config.r, config.lora_alpha = rank, cast(Any, scale * rank)
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False


def generation_settings(base: BaseModel) -> GenerationConfig:
    """Return the base model's settings, with the tokens that end an answer of this tokenizer's template."""
    own = getattr(base.network, "generation_config", None)
    config = GenerationConfig() if own is None else copy.deepcopy(own)
    has_turns = isinstance(base.tokenizer.chat_template, str)
    config.eos_token_id = end_tokens(base.tokenizer, base.network) if has_turns else base.tokenizer.eos_token_id
    config.pad_token_id = int(base.tokenizer.pad_token_id)
    return config


def _put(factor: Any, tensor: torch.Tensor) -> None:
    linear = nn.Linear(tensor.shape[1], len(tensor), bias=False)
    linear.weight = nn.Parameter(tensor.contiguous())
    factor[ADAPTER_NAME] = linear
