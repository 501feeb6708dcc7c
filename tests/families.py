"""Checkpoints of many families as they lie on disk: tiny, of random weights, saved by `save_pretrained`.

A network that is loaded differs from one of `from_config`: its head is in eval mode, tensors are missing, the tokenizer
says what pads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from fedlr.tasks.synthetic import VOCABULARY

PAD, BOS, EOS = 0, 2, 3
NUM_TOKENS, POSITIONS = 150, 80

_IDS = {"vocab_size": NUM_TOKENS, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_ENCODER = {**_IDS, **_SMALL, "max_position_embeddings": POSITIONS, "initializer_range": 0.2}
_DECODER = {**_ENCODER, "num_key_value_heads": 1}
_ALL_IDS = {**_IDS, "cls_token_id": BOS, "sep_token_id": EOS}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": PAD}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.2,
    "decoder_start_token_id": EOS,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "initializer_range": 0.2}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": POSITIONS}


@dataclass(frozen=True)
class Family:
    """How a family is made, where its adapters go, how long its texts may be, and what it needs of the trainer."""

    build: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    longest: int | None
    trainer: tuple[str, ...] = ()
    pads: bool = True  # whether the tokenizer has a pad token


LOOP = ("trainer.engine=opacus", "trainer.grad_sample_mode=loop")
QV, QV_PROJ = ("query", "value"), ("q_proj", "v_proj")


def _bfloat16() -> PreTrainedModel:
    return BertModel(BertConfig(**_ENCODER)).to(torch.bfloat16)


def _of(
    network: type[PreTrainedModel], config: type[PretrainedConfig], **sizes: object
) -> Callable[[], PreTrainedModel]:
    return lambda: network(config(**sizes))


FAMILIES: Mapping[str, Family] = {
    "bert": Family(_of(BertModel, BertConfig, **_ENCODER), QV, POSITIONS),
    "bert without pooler": Family(_of(BertForMaskedLM, BertConfig, **_ENCODER), QV, POSITIONS),
    "bert of seven labels": Family(
        _of(BertForSequenceClassification, BertConfig, **_ENCODER, num_labels=7), QV, POSITIONS
    ),
    "bert in bfloat16": Family(_bfloat16, QV, POSITIONS),
    "roberta": Family(_of(RobertaModel, RobertaConfig, **{**_ENCODER, "pad_token_id": 1}), QV, POSITIONS - 2),
    "distilbert": Family(_of(DistilBertModel, DistilBertConfig, **_IDS, **_DISTILBERT), ("q_lin", "v_lin"), POSITIONS),
    "modernbert": Family(
        _of(ModernBertModel, ModernBertConfig, **_ALL_IDS, **_SMALL, max_position_embeddings=POSITIONS),
        ("Wqkv",),
        POSITIONS,
    ),
    "albert": Family(_of(AlbertModel, AlbertConfig, **_ENCODER, embedding_size=8), QV, POSITIONS),
    "electra": Family(_of(ElectraModel, ElectraConfig, **_ENCODER, embedding_size=8), QV, POSITIONS),
    "deberta": Family(
        _of(
            DebertaV2Model,
            DebertaV2Config,
            **_ENCODER,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
        ("query_proj", "value_proj"),
        None,
        LOOP,
    ),
    "gpt2": Family(_of(GPT2Model, GPT2Config, **_IDS, **_GPT2), ("c_attn",), POSITIONS),
    "llama": Family(
        _of(LlamaForCausalLM, LlamaConfig, **{**_DECODER, "pad_token_id": None}), QV_PROJ, POSITIONS, pads=False
    ),
    "qwen2": Family(_of(Qwen2Model, Qwen2Config, **_DECODER), QV_PROJ, POSITIONS),
    "t5": Family(_of(T5Model, T5Config, **_IDS, **_T5), ("q", "v"), None),
    "bart": Family(_of(BartModel, BartConfig, **_IDS, **_BART), QV_PROJ, POSITIONS),
}


def end_tokenizer(*, pads: bool = True, ends: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words without a limit of its own, with an end token after each text."""
    special = ["[PAD]", "[UNK]", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    named = {"pad_token": "[PAD]"} if pads else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
        **named,
    )


def save_family(name: str, folder: Path, **tokenizer: object) -> Path:
    """Save a checkpoint of a family as a published one lies on disk."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network = family.build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # also where a network begins with ones and zeros
        network.save_pretrained(folder)
    end_tokenizer(**{"pads": family.pads, **tokenizer}).save_pretrained(folder)
    return folder
