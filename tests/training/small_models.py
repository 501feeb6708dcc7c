"""What the training tests share: tiny random models, random batches, and mutants of the shipped source."""

import inspect
import itertools
import types
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.models.peft_state import adapter_parameters
from fedlr.tasks.examples import Share
from fedlr.tasks.tokenise import TokenisedText

VOCABULARY, PADDING, NUM_LABELS, MAX_TOKENS = 40, 1, 3, 9

B_ONLY = frozenset({LORA_B})
A_AND_B = frozenset({LORA_A, LORA_B})
B_AND_HEAD = frozenset({LORA_B, HEAD})
EVERYTHING = frozenset({LORA_A, LORA_B, HEAD})

_ENCODER = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PADDING,
    "num_labels": NUM_LABELS,
    "max_position_embeddings": 80,
    "initializer_range": 0.3,
}
_WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {**_ENCODER, "bos_token_id": 2, "eos_token_id": 3, "num_key_value_heads": 1} | {
    key: value for key, value in _WIDTHS.items() if "dropout" not in key
}
_DISTILBERT = _ENCODER | {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
_GPT2 = _ENCODER | {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_ALBERT = _ENCODER | _WIDTHS | {"embedding_size": 8, "classifier_dropout_prob": 0.0}
_VIT = _WIDTHS | {"image_size": 8, "patch_size": 4, "num_labels": NUM_LABELS, "initializer_range": 0.3}

BUILDERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER, **_WIDTHS)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER, **_WIDTHS)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**_DISTILBERT)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**_LLAMA)),
    "llama_lm": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**_GPT2)),  # query, key and value are one Conv1D
    "vit": lambda: ViTForImageClassification(ViTConfig(**_VIT)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**_ALBERT)),  # every layer is used twice
}
CLASSIFIERS = ("bert", "roberta", "distilbert", "llama")
QUERY_VALUE = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "llama": ["q_proj", "v_proj"],
    "llama_lm": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "vit": ["q_proj", "v_proj"],
    "albert": ["query", "value"],
}


def small_model(
    architecture: str = "bert", *, targets: str = "query_value", rank: int = 4, **lora: object
) -> PeftModel:
    """Build a two-layer network with biases, and a LoRA adapter of scale 2 whose tensors are far from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = BUILDERS[architecture]()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.02)  # zeros, which new networks have, nobody would miss
        causal = architecture == "llama_lm"
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=QUERY_VALUE[architecture] if targets == "query_value" else targets,
            modules_to_save=["pre_classifier", "classifier"] if architecture == "distilbert" else None,
            **lora,
        )
        model = get_peft_model(network, config)
        with torch.no_grad():
            for slot, parameter in adapter_parameters(model).items():
                if slot.role != HEAD:
                    parameter.normal_(std=0.3)
    return model.train()


def random_rows(num_rows: int, *, seed: int, num_tokens: int | None = None) -> list[list[int]]:
    """Draw token lists of lengths 1 .. MAX_TOKENS, or of one length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_TOKENS + 1, (num_rows,), generator=generator)
    lengths = lengths if num_tokens is None else lengths.fill_(num_tokens)
    return [torch.randint(4, VOCABULARY, (int(n),), generator=generator).tolist() for n in lengths]


def batch(rows: list[list[int]], *, width: int = MAX_TOKENS) -> dict[str, Tensor]:
    """Pad token lists on the right to `width`."""
    ids = torch.full((len(rows), width), PADDING)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < torch.tensor([[len(r)] for r in rows])).long(),
    }


def examples_of(architecture: str, num_rows: int, *, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a model reads of random texts or images, and their labels."""
    inputs = batch(random_rows(num_rows, seed=seed))
    if architecture == "llama_lm":
        return inputs, language_labels(inputs)
    if architecture == "vit":
        generator = torch.Generator().manual_seed(seed)
        inputs = {"pixel_values": torch.randn(num_rows, 3, 8, 8, generator=generator)}
    return inputs, torch.arange(num_rows) % NUM_LABELS


def client_data(rows: list[list[int]], labels: list[int] | None = None) -> TokenisedText:
    """Hold token lists as a client would; labels default to 0, 1, 2, 0, 1, ..."""
    return TokenisedText(
        ids=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        labels=np.array([i % NUM_LABELS for i in range(len(rows))] if labels is None else labels, dtype=np.int64),
        pad_id=PADDING,
        num_truncated=0,
    )


def among_others(data: TokenisedText) -> Share:
    """Hold a client's rows as every other of a table, between rows of somebody else."""
    rows = [data.ids[start:end].tolist() for start, end in itertools.pairwise(data.offsets)]
    mixed = [row for own in rows for row in ([4, 4], own)] + [[4, 4]]
    labels = [label for own in data.labels.tolist() for label in (NUM_LABELS - 1, own)] + [NUM_LABELS - 1]
    return Share(client_data(mixed, labels), 2 * np.arange(len(rows)) + 1)


def language_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Label every real token of a batch with itself."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def joint_norm(tensors: Mapping[Slot, Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors.values()]).norm())


def difference(left: Mapping[Slot, Tensor], right: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    assert left.keys() == right.keys()
    return {slot: left[slot].double() - right[slot].double() for slot in left}


def mutant(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """Return the module compiled from its own source, with each `old` text, which must occur, made `new`.

    A text that does not occur is a RuntimeError: an AssertionError would pass for a mutant that is caught.
    """
    source = inspect.getsource(module)
    for old, new in changes:
        if old not in source:
            raise RuntimeError(f"the mutant no longer applies: {old!r}")
        source = source.replace(old, new)
    changed = types.ModuleType(module.__name__)
    changed.__dict__.update({k: v for k, v in vars(module).items() if k.startswith("__")})
    exec(compile(source, f"<mutant of {module.__name__}>", "exec"), changed.__dict__)
    return changed
