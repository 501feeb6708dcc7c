"""The three networks of the step benchmark, random weights, LoRA on query and value, with a batch of each.

Sizes are MiniLM's (6 layers, 384 wide, 12 heads, Wang et al. 2020): encoder, vision transformer and decoder.
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedlr.adapters.state import LORA_B
from fedlr.models.peft_state import adapter_parameters
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, class_losses, token_losses

FAMILIES = ("encoder", "vit", "decoder")
NUM_LABELS, PATCH = 2, 16


@dataclass(frozen=True)
class Shape:
    """The size of a network and of what it reads."""

    hidden: int
    layers: int
    heads: int
    tokens: int
    vocabulary: int = 30_522  # MiniLM's; the decoder's are smaller, see `decoder_vocabulary`
    decoder_vocabulary: int = 8_192  # the output layer of a larger one would hide what the adapters cost
    rank: int = 8

    @property
    def spread(self) -> float:
        """Return the standard deviation of the weights: with the usual 0.02 hardly any gradient comes through."""
        return float(self.hidden**-0.5)


@dataclass(frozen=True)
class Network:
    """A PEFT model with what its forward takes and its loss of one example each."""

    model: PeftModel
    loss: PerExampleLoss
    batch: Batch


def build_network(family: str, shape: Shape, *, batch: int, seed: int) -> Network:
    """Build a network of `FAMILIES` and one batch of random examples, lora_B away from zero.

    A ViT has no free number of tokens: it reads the largest square image of at most `shape.tokens` patches and class
    token, 65 tokens being 128 x 128 pixels, 197 being 224 x 224.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = {"encoder": _encoder, "vit": _vit, "decoder": _decoder}[family]
        network, targets, loss, inputs, labels = build(shape, batch)
        network.requires_grad_(False)
        model = get_peft_model(network, LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=targets))
        for slot, parameter in adapter_parameters(model).items():
            parameter.data.normal_(std=0.02 if slot.role == LORA_B else shape.spread)
    return Network(model.train(), loss, Batch(inputs, labels))


def _encoder(shape: Shape, batch: int) -> tuple[torch.nn.Module, list[str], PerExampleLoss, dict[str, Tensor], Tensor]:
    config = BertConfig(  # type: ignore[call-arg]  # num_labels is one of the base class's
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        num_labels=NUM_LABELS,
        initializer_range=shape.spread,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(5, shape.vocabulary, (batch, shape.tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(NUM_LABELS, (batch,))
    return BertForSequenceClassification(config), ["query", "value"], class_losses, inputs, labels


def _vit(shape: Shape, batch: int) -> tuple[torch.nn.Module, list[str], PerExampleLoss, dict[str, Tensor], Tensor]:
    side = PATCH * int((shape.tokens - 1) ** 0.5)
    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        image_size=side,
        patch_size=PATCH,
        num_labels=NUM_LABELS,
        initializer_range=shape.spread,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    network = ViTForImageClassification(config)
    inputs = {"pixel_values": torch.randn(batch, 3, side, side)}
    names = {path.rsplit(".", 1)[-1] for path, _ in network.named_modules()}
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    return network, targets, class_losses, inputs, torch.randint(NUM_LABELS, (batch,))


def _decoder(shape: Shape, batch: int) -> tuple[torch.nn.Module, list[str], PerExampleLoss, dict[str, Tensor], Tensor]:
    config = LlamaConfig(
        vocab_size=shape.decoder_vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        initializer_range=shape.spread,
        use_cache=False,
    )
    ids = torch.randint(5, shape.decoder_vocabulary, (batch, shape.tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return LlamaForCausalLM(config), ["q_proj", "v_proj"], token_losses, inputs, ids
