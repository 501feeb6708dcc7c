"""The loss of a language model without its logits: for each example the mean over its own scored tokens.

The logits of a batch, (N, T, V) for a vocabulary of V, are most of the memory of a step and a fifth of its products.
Here the body runs alone, the head reads the hidden states that predict a scored token and no others, and a few hundred
of them at a time. The gradient with respect to a hidden state is known as soon as its logits are, so it is kept in
place of the logits, and the backward pass only scales it.

The head is frozen: no gradient of its own is formed. What some families do to their logits (a scale, a soft cap) is
done here too; `check_token_loss` compares with the whole model's logits, on constant tokens, before any row is read.

Legend: N examples, T tokens, K hidden size, V vocabulary, S scored tokens of the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.errors import InputError
from fedlr.tasks.losses import IGNORED_LABEL, causal_lm
from fedlr.tasks.probe import in_training, probe_inputs

MOST_LOGITS = 2**23  # computed at once: 32 MB in float32
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-4, 0.05  # of the loss on constant tokens


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: cap * tanh(scale * (x W^T + b) / cap)."""

    weight: Tensor  # (V, K)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    cap: float | None = None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None  # x W^T + b; None: PyTorch's own

    @property
    def num_at_once(self) -> int:
        """Return of how many tokens logits are computed at once."""
        return max(1, MOST_LOGITS // len(self.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (S, K) to (S, V), float32 or wider."""
        logits = (self.product or F.linear)(hidden, self.weight, self.bias)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def to_hidden(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to the hidden states, (S, K), of one with respect to the logits."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap).square())
        gradient = (gradient if self.scale == 1.0 else gradient * self.scale).to(self.weight.dtype)
        return gradient @ self.weight if self.product is None else self.product(gradient, self.weight.t(), None)


@dataclass(frozen=True)
class TokenScores:
    """What a model says of the scored tokens of a batch."""

    losses: Tensor  # (N, T - 1) in nats; 0 where nothing is scored
    hits: Tensor  # (N, T - 1) bool: the most likely token is the right one
    scored: Tensor  # (N, T - 1) bool


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return each sequence's next-token cross-entropy, averaged over its *own* scored tokens: `losses.causal_lm`.

    Args:
        model: a causal language model, adapted or not, whose head is frozen.
        inputs: what its forward takes, N examples first.
        labels: (N, T), aligned with the inputs, not shifted; -100 marks tokens that are not scored.

    Returns:
        (N,), in nats a token, float32 or wider; 0 for a sequence without a scored token.

    Guarantees:
        Entry i depends on example i alone.
    """
    hidden, head = _hidden_states(model, inputs), head_of(model)
    scored = labels[:, 1:] != IGNORED_LABEL
    states, wanted = hidden[:, :-1][scored], labels[:, 1:][scored]
    found: Tensor = _TokenCrossEntropy.apply(states, wanted, head)  # type: ignore[no-untyped-call]
    # Not index_add_, whose order of additions is not fixed on every device.
    by_place = found.new_zeros(scored.shape).masked_scatter(scored, found)
    return by_place.sum(dim=1) / scored.sum(dim=1).clamp(min=1)


@torch.no_grad()
def token_scores(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> TokenScores:
    """Return loss and hit of every scored token; arguments as those of `token_losses`."""
    hidden, head = _hidden_states(model, inputs), head_of(model)
    scored = labels[:, 1:] != IGNORED_LABEL
    losses = torch.zeros(scored.shape, dtype=torch.float32, device=labels.device)
    hits = torch.zeros_like(scored)
    states, wanted = hidden[:, :-1][scored], labels[:, 1:][scored]
    parts = zip(states.split(head.num_at_once), wanted.split(head.num_at_once), strict=True)
    found = [_scores_of(head.logits(part), right) for part, right in parts]
    if found:
        losses[scored] = torch.cat([one for one, _ in found]).float()
        hits[scored] = torch.cat([one for _, one in found])
    return TokenScores(losses, hits, scored)


def head_of(model: nn.Module) -> Head:
    """Return the head of a causal language model.

    Raises:
        InputError: for a model without one, or with one that is not a frozen linear layer.
    """
    network = _network(model)
    layer = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    product = getattr(layer, "product", None)  # of a frozen layer that has a way of its own to multiply
    if type(layer) is not nn.Linear and product is None:
        raise InputError(
            f"Expected a causal language model with a frozen linear head, got {type(network).__name__} with "
            f"{type(layer).__name__}; take the head out of adapter.target_modules, or choose another model"
        )
    config = network.config.get_text_config()
    divided = getattr(config, "logits_scaling", None)  # Granite
    scale = getattr(config, "logit_scale", None)  # Cohere
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    scale = float(scale or 1.0) / float(divided or 1.0)
    linear = cast(nn.Linear, layer)
    bias = None if linear.bias is None else linear.bias.detach()
    return Head(linear.weight.detach(), bias, scale, None if cap is None else float(cap), product)


def check_token_loss(model: nn.Module) -> None:
    """Compare the loss without logits with that of the whole model's logits, on constant tokens.

    Raises:
        InputError: if they differ: the family does something to its logits that is not known here. Also if a token
            changes the logits before it: the model would see what it is asked for.
    """
    inputs = probe_inputs(model)
    labels = inputs["input_ids"].clone()
    labels[:, :2] = IGNORED_LABEL
    other = inputs["input_ids"].clone()
    other[:, -1] = other[:, 0]
    with torch.no_grad(), in_training(model):
        ours = token_losses(model, inputs, labels)
        logits = model(**inputs).logits
        plain = causal_lm(logits, labels)
        without_last = model(**{**inputs, "input_ids": other}).logits[:, :-1] - logits[:, :-1]
    low = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    most = TOLERANCE_BFLOAT16 if low else TOLERANCE
    if not float(without_last.abs().max()) <= most * float(logits.abs().max()):
        raise InputError(
            f"Expected a model that reads from left to right, got {type(_network(model)).__name__}, in which a token "
            "changes what stands before it; choose a causal language model"
        )
    if not bool(((ours - plain).abs() <= most * plain.abs().clamp(min=1.0)).all()):
        raise InputError(
            "Expected a language model whose head is a linear layer and no more, got one that makes its logits in "
            f"another way ({type(_network(model)).__name__}); choose a model of another family"
        )


def _network(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the head reads, (N, T, K)."""
    body = _network(model).base_model
    return cast(Tensor, body(**inputs, use_cache=False).last_hidden_state)


def _scores_of(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=-1) == wanted


class _TokenCrossEntropy(torch.autograd.Function):
    """The cross-entropy of each token, (S,); keeps the gradient of the hidden states, never the logits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, head: Head) -> Tensor:
        needs = ctx.needs_input_grad[0]
        losses = torch.empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        gradients = torch.empty_like(states) if needs else states.new_empty(0)
        for start in range(0, len(states), head.num_at_once):
            part = slice(start, start + head.num_at_once)
            logits = head.logits(states[part])
            right = wanted[part, None]
            log_sums = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (log_sums - logits.gather(1, right)).squeeze(1)
            if needs:
                shares = (logits - log_sums if head.cap else logits.sub_(log_sums)).exp_()
                shares.scatter_add_(1, right, shares.new_full((len(right), 1), -1.0))
                gradients[part] = head.to_hidden(shares, logits)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None].to(gradients.dtype)) if ctx.needs_input_grad[0] else None, None, None
