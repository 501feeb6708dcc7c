"""Layers that serve rows of many clients in one pass, each row with its own client's adapter.

A linear layer with LoRA gives y = x W^T + s (x A^T) B^T. With g = dL/dy, the gradient of one example's B is
s sum_t g_t (A x_t)^T, a product of two tensors that the passes have anyway; that of A is s sum_t (B^T g_t) x_t^T. So
one forward and one backward give every per-example gradient, and the ordinary gradients of A, B and W are never formed
(Goodfellow 2015, https://arxiv.org/abs/1510.01799; Bu et al. 2023, https://arxiv.org/abs/2210.00038, for full layers).

Legend: N examples (rows) of a micro-batch, P clients in it, T tokens, K in_features, D out_features, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.models.peft_state import ADAPTER_NAME
from fedlr.models.products import library_in, product


class PerExample(Protocol):
    """The gradients of one tensor, one for each of N examples."""

    def squared_norms(self) -> Tensor:
        """Return their squared L2 norms, (N,), float64."""
        ...

    def weighted_sums(self, weights: Tensor, out: Tensor) -> None:
        """Write sum_i weights[p, i] * g_i into out[p] (P, numel); a row of zero weight for all p may hold anything."""
        ...

    def rows(self) -> Tensor:
        """Return them one by one, (N, numel) float32."""
        ...


@dataclass
class Rows:
    """Gradients as they are."""

    values: Tensor  # (N, numel), float32

    def squared_norms(self) -> Tensor:
        """See `PerExample`."""
        # Of the very tensor that is summed, in float64: no float32 entry overflows it.
        norms: Tensor = torch.linalg.vector_norm(self.values, dim=1, dtype=torch.float64)
        return norms.square_()

    def weighted_sums(self, weights: Tensor, out: Tensor) -> None:
        """See `PerExample`."""
        silent = (weights == 0).all(dim=0)
        self.values.masked_fill_(silent[:, None], 0.0)  # 0 * nan is nan
        torch.mm(weights, self.values, out=out)

    def rows(self) -> Tensor:
        """See `PerExample`."""
        return self.values


@dataclass
class Outer:
    """Gradients g_i a_i^T of a linear layer that reads one vector an example: never formed."""

    backprops: Tensor  # g, (N, D), float32
    activations: Tensor  # a, (N, K), float32
    places: Sequence[Tensor | slice] = ()  # of each client's rows; none: all are one client's

    def squared_norms(self) -> Tensor:
        """See `PerExample`: |g a^T| = |g| |a|."""
        g, a = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (self.backprops, self.activations))
        norms: Tensor = g * a
        return norms.square_()

    def weighted_sums(self, weights: Tensor, out: Tensor) -> None:
        """See `PerExample`."""
        places = self.places or [slice(None)]
        for share, mine, result in zip(weights, places, out, strict=True):
            own = share[mine, None]
            is_loud = own != 0  # 0 * nan is nan
            g = (self.backprops[mine] * own).where(is_loud, 0.0)
            torch.mm(g.T, self.activations[mine].where(is_loud, 0.0), out=result.view(g.shape[1], -1))

    def rows(self) -> Tensor:
        """See `PerExample`."""
        return (self.backprops[:, :, None] * self.activations[:, None, :]).flatten(1)


@dataclass
class Pass:
    """What the layers of one model copy share during one forward and backward pass."""

    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))  # makes autograd come by
    owner: Tensor | None = None  # (N,), in [0, P); None where P is 1
    places: Sequence[Tensor] = ()  # of each client's rows, found on the host: no layer waits for the device
    values: Mapping[Slot, Tensor] = field(default_factory=dict)  # trained tensors, (P, ...) each
    ranks: Tensor | None = None  # (P,): rows of lora_A and columns of lora_B that a client has; None: all
    found: dict[Slot, PerExample] = field(default_factory=dict)

    def add(self, slot: Slot, gradients: PerExample) -> None:
        """Keep what backward found; a layer that is used twice has one gradient, the sum."""
        earlier = self.found.get(slot)
        self.found[slot] = gradients if earlier is None else Rows(earlier.rows() + gradients.rows())

    def of_rows(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """Return the tensor of each row's client, (N, ...), or that of the only client, (...)."""
        stack = self.values[slot]
        return (stack[0] if self.owner is None else stack.index_select(0, self.owner)).to(dtype)

    def mask(self, rank: int) -> Tensor | None:
        """Return 1 where a row's client has that rank's direction and 0 elsewhere, (N or 1, 1, R)."""
        if self.ranks is None:
            return None
        ranks = self.ranks if self.owner is None else self.ranks[self.owner]
        has: Tensor = torch.arange(rank, device=ranks.device) < ranks[:, None]
        return has[:, None, :]


class StackedLora(nn.Module):
    """A frozen linear layer with every client's LoRA beside it; takes the place of PEFT's layer."""

    def __init__(self, layer: Any, path: str, shared: Pass, trained: set[Slot]) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer.base_layer
        self.transposed = not isinstance(self.base_layer, nn.Linear)  # a Conv1D keeps its weight as (K, D)
        self.library = library_in(self.base_layer)
        self.scale = float(layer.scaling[ADAPTER_NAME])
        self.slots = {role: Slot(path, role) for role in (LORA_A, LORA_B)}
        self.factors = {LORA_A: layer.lora_A[ADAPTER_NAME].weight, LORA_B: layer.lora_B[ADAPTER_NAME].weight}
        self.trains = {role: slot in trained for role, slot in self.slots.items()}
        self.shared = shared

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a layer for its dtype or device."""
        return cast(Tensor, self.base_layer.weight)

    def factor(self, role: str, dtype: torch.dtype) -> Tensor:
        """Return A or B: one for all, or one a row."""
        if self.trains[role]:
            return self.shared.of_rows(self.slots[role], dtype)
        return cast(Tensor, self.factors[role].detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ..., K) to (N, ..., D)."""
        y: Tensor = _StackedLora.apply(x, self.shared.anchor, self)  # type: ignore[no-untyped-call]
        return y


class _StackedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, layer: StackedLora) -> Tensor:
        weight, bias = layer.weight, cast(Tensor | None, layer.base_layer.bias)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.lora_A, ctx.lora_B = layer.factor(LORA_A, x.dtype), layer.factor(LORA_B, x.dtype)
        ctx.mask = layer.shared.mask(ctx.lora_A.shape[-2])
        y = product(x, weight.T if layer.transposed else weight, bias, layer.library)
        tokens = x.reshape(len(x), -1, x.shape[-1])  # (N, T, K)
        h = _times(tokens, ctx.lora_A.mT).mul_(layer.scale)  # s x A^T, (N, T, R)
        if ctx.mask is not None:
            h.mul_(ctx.mask)
        _add_product(y.view(*tokens.shape[:2], -1), h, ctx.lora_B.mT)
        ctx.h = h if layer.trains[LORA_B] else None
        ctx.save_for_backward(x if layer.trains[LORA_A] else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        layer: StackedLora = ctx.layer
        g = grad.reshape(len(grad), -1, grad.shape[-1])  # (N, T, D)
        if layer.trains[LORA_B]:
            layer.shared.add(layer.slots[LORA_B], Rows(_row_products(g, ctx.h)))
        if not (ctx.needs_input_grad[0] or layer.trains[LORA_A]):
            return None, None, None
        u = _times(g, ctx.lora_B).mul_(layer.scale)  # s g B, (N, T, R)
        if ctx.mask is not None:
            u.mul_(ctx.mask)
        if layer.trains[LORA_A]:
            (x,) = ctx.saved_tensors
            layer.shared.add(layer.slots[LORA_A], Rows(_row_products(u, x.reshape(len(x), -1, x.shape[-1]))))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = _backwards(g, layer)
        _add_product(dx, u, ctx.lora_A)
        return dx.view(ctx.shape), None, None


class StackedLinear(nn.Module):
    """A linear layer of a trained head, with every client's weight and bias."""

    def __init__(self, layer: nn.Linear, path: str, shared: Pass) -> None:
        super().__init__()
        self.slots = {name: Slot(f"{path}.{name}", HEAD) for name, _ in layer.named_parameters(recurse=False)}
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ..., K) to (N, ..., D), in float32."""
        # The anchor gives the graph a start where nothing below trains.
        y: Tensor = _StackedLinear.apply(x.float(), self.shared.anchor, self)  # type: ignore[no-untyped-call]
        return y


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, layer: StackedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        stacks = {name: layer.shared.values[slot] for name, slot in layer.slots.items()}
        y = x.new_empty(*x.shape[:-1], stacks["weight"].shape[1])
        for client, mine in _by_client(layer.shared, x):
            bias = stacks["bias"][client] if "bias" in stacks else None
            y[mine] = F.linear(x[mine], stacks["weight"][client], bias)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        layer: StackedLinear = ctx.layer
        (x,) = ctx.saved_tensors
        if x.dim() == 2:
            layer.shared.add(layer.slots["weight"], Outer(g, x, layer.shared.places))
        else:
            products = _row_products(g.reshape(len(g), -1, g.shape[-1]), x.reshape(len(x), -1, x.shape[-1]))
            layer.shared.add(layer.slots["weight"], Rows(products))
        if "bias" in layer.slots:
            sums = g if g.dim() == 2 else g.sum(dim=tuple(range(1, g.dim() - 1)))
            layer.shared.add(layer.slots["bias"], Rows(sums.clone()))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = torch.empty_like(x)
        for client, mine in _by_client(layer.shared, x):
            dx[mine] = g[mine] @ layer.shared.values[layer.slots["weight"]][client]
        return dx, None, None


def _by_client(shared: Pass, x: Tensor) -> list[tuple[int, Tensor | slice]]:
    """Return each client of the pass with its rows."""
    if shared.owner is None:
        return [(0, slice(None))]
    return list(enumerate(shared.places))


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right for left (N, T, X) and right (X, Y), one for all, or (N, X, Y), one a row."""
    return torch.bmm(left, right) if right.dim() == 3 else left @ right


def _backwards(g: Tensor, layer: StackedLora) -> Tensor:
    """Return g W, (N, T, K), for g (N, T, D)."""
    if layer.library == "onednn":
        return product(g, layer.weight if layer.transposed else layer.weight.T, None, layer.library)
    return _times(g, layer.weight.T if layer.transposed else layer.weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total (N, T, Y), in place; `right` as in `_times`."""
    if right.dim() == 3:
        total.baddbmm_(left, right)
    else:
        total.view(-1, total.shape[-1]).addmm_(left.view(-1, left.shape[-1]), right)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left_i^T right_i of each row, (N, X * Y) float32, for left (N, T, X) and right (N, T, Y)."""
    return torch.bmm(left.mT.float(), right.float()).flatten(1)
