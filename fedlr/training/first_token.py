"""The last layer, for the one token that is read.

A classifier on the first token reads one row of the last layer's output. That row needs the keys and values of all
tokens, but the query, the attention output and the feed-forward network of its own token only: ten twelfths of the
layer's products, in both passes, have no effect on the loss. Their gradients are zeros, so leaving them out changes no
per-example gradient.

Served are the BERT family, DistilBERT and ViT, by the structure of their layers; a probe compares the logits with those
of the whole model. Any other model stays as it is: nothing but time depends on it.
Legend: N examples, T tokens, H hidden size.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.models.copies import sharing_tensors
from fedlr.models.picture_prefix import GIVEN_STATES
from fedlr.models.zero_head import awake
from fedlr.tasks.probe import PROBE_EXAMPLES, PROBE_TOKENS, probe_inputs

# Of the largest logit: another order of the same products. A token that should not count changes logits by far more.
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-4, 0.05


def first_token_only(model: nn.Module) -> nn.Module:
    """Return a copy of a classifier that shares all tensors and computes no more of its last layer than is read.

    All names of adapted layers stay. A model for which that is not known to be the same is copied as it is.
    """
    short = sharing_tensors(model)
    for layers in short.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) and (kind := _kind(layers[-1])) is not None:
            last = layers[-1]
            layers[-1] = kind(last)
            if not _same_logits(model, short):
                layers[-1] = last
            break
    return short


class _BertLayer(nn.Module):
    """A layer of `transformers`' BERT, RoBERTa or ELECTRA: normalised after each half."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output

    def forward(self, x: Tensor, mask: Tensor | None = None, *_args: object, **_kwargs: object) -> Tensor:
        """Map (N, T, H) to (N, 1, H)."""
        inner: Any = self.attention.self
        first = x[:, :1]
        heads = _attend(inner.query(first), inner.key(x), inner.value(x), mask, inner.attention_head_size)
        attended = self.attention.output(heads, first)
        y: Tensor = self.output(self.intermediate(attended), attended)
        return y


class _DistilBertLayer(nn.Module):
    """A layer of `transformers`' DistilBERT."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.ffn = layer.attention, layer.ffn
        self.sa_layer_norm, self.output_layer_norm = layer.sa_layer_norm, layer.output_layer_norm

    def forward(self, x: Tensor, mask: Tensor | None = None, *_args: object, **_kwargs: object) -> Tensor:
        """Map (N, T, H) to (N, 1, H)."""
        inner: Any = self.attention
        first = x[:, :1]
        heads = _attend(inner.q_lin(first), inner.k_lin(x), inner.v_lin(x), mask, inner.attention_head_size)
        attended = self.sa_layer_norm(inner.out_lin(heads) + first)
        y: Tensor = self.output_layer_norm(self.ffn(attended) + attended)
        return y


class _VitLayer(nn.Module):
    """A layer of `transformers`' ViT: normalised before each half."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.mlp = layer.attention, layer.mlp
        self.layernorm_before, self.layernorm_after = layer.layernorm_before, layer.layernorm_after

    def forward(self, x: Tensor, mask: Tensor | None = None, *_args: object, **_kwargs: object) -> Tensor:
        """Map (N, T, H) to (N, 1, H)."""
        inner: Any = self.attention
        normal = self.layernorm_before(x)
        query, key, value = inner.q_proj(normal[:, :1]), inner.k_proj(normal), inner.v_proj(normal)
        attended = inner.o_proj(_attend(query, key, value, mask, inner.head_dim)) + x[:, :1]
        y: Tensor = self.mlp(self.layernorm_after(attended)) + attended
        return y


STRUCTURES: dict[type[nn.Module], tuple[str, ...]] = {
    _BertLayer: (
        *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        *("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    _DistilBertLayer: (
        *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        *("sa_layer_norm", "output_layer_norm", "ffn.lin1", "ffn.lin2"),
    ),
    _VitLayer: (
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        *("layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
    ),
}


def _kind(layer: nn.Module) -> Any:
    """Return what computes one token of a layer with these parts."""
    names = {name for name, _ in layer.named_modules()}
    return next((kind for kind, structure in STRUCTURES.items() if names >= set(structure)), None)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, head_size: int) -> Tensor:
    """Return softmax(Q K^T / sqrt(head size)) V of the first token, (N, 1, H)."""
    q, k, v = (tensor.unflatten(2, (-1, head_size)).transpose(1, 2) for tensor in (query, key, value))
    mine = None if mask is None else mask[..., :1, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mine).transpose(1, 2).flatten(2)


@torch.no_grad()
def _same_logits(model: nn.Module, short: nn.Module) -> bool:
    """Return whether both say the same of a few constant inputs, the last of which is padded where there are tokens."""
    model, short = awake(model), awake(short)
    try:
        inputs = _probe(model)
        modes = {module: module.training for both in (model, short) for module in both.modules()}
        for both in (model, short):
            both.eval()
        try:
            whole, upper = (cast(Any, both)(**inputs).logits for both in (model, short))
        finally:
            for module, training in modes.items():
                module.training = training
    except Exception:  # whatever a foreign forward makes of one token where it expected all
        return False
    halved = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    tolerance = (TOLERANCE_BFLOAT16 if halved else TOLERANCE) * float(whole.abs().max())
    return whole.shape == upper.shape and float((whole - upper).abs().max()) <= tolerance


def _reads_tokens(model: Any) -> bool:
    """Return whether a model embeds tokens; behind a cached prefix (fedlr.models.prefix) it reads hidden states."""
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def _probe(model: Any) -> dict[str, Tensor]:
    if (states := getattr(model, GIVEN_STATES, None)) is not None:
        like = next(p for p in model.parameters() if p.is_floating_point())
        numbers = torch.linspace(-1.0, 1.0, PROBE_EXAMPLES * states[0] * states[1])
        return {"pixel_values": numbers.view(PROBE_EXAMPLES, *states).to(like)}
    if model.main_input_name == "pixel_values" or _reads_tokens(model):
        inputs = probe_inputs(model)
    else:
        like = next(p for p in model.parameters() if p.is_floating_point())
        mask = torch.ones(PROBE_EXAMPLES, PROBE_TOKENS, dtype=torch.long, device=like.device)
        states = torch.linspace(-1.0, 1.0, mask.numel() * model.config.hidden_size).view(*mask.shape, -1)
        inputs = {"inputs_embeds": states.to(like), "attention_mask": mask}
    if "attention_mask" in inputs:
        inputs["attention_mask"][-1, PROBE_TOKENS // 2 :] = 0
    return inputs
