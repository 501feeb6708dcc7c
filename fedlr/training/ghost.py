"""Per-example gradient norms without the gradients, on Opacus' ghost hooks, in float64.

Opacus' own float32 Gram matrices lose a norm that is small next to |activations| * |backprops|: when the
tokens of an example nearly cancel, they may measure 0 where the truth is many times C, and the example passes
unclipped. They also overflow at gradients of 1e19.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from opacus.grad_sample import GradSampleHooksFastGradientClipping
from torch import Tensor, nn


def linear_norms(layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Return the L2 norm of each example's gradient, (N,), for the weight and the bias of a layer that train.

    The gradient of a weight is sum_t b_t a_t^T; its squared norm is sum_{s,t} (a_s . a_t) (b_s . b_t) (Li et
    al. 2022, Large language models can be strong differentially private learners, sec. 4).

    Args:
        layer: D out_features, K in_features.
        activations: one tensor a, (N, T, K) or (N, K).
        backprops: b, (N, T, D) or (N, D).
    """
    a, b = activations[0].double(), backprops.double()
    norms: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad and b.dim() == 2:
        norms[layer.weight] = a.norm(dim=1) * b.norm(dim=1)
    elif layer.weight.requires_grad:
        norms[layer.weight] = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)).clamp(min=0.0).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = (b if b.dim() == 2 else b.sum(dim=1)).norm(dim=1)
    return norms


class Float64GhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
    """Opacus' fast gradient clipping with `linear_norms`.

    A layer of another type (a head's layer norm) is not in the table; Opacus then takes the norm of its
    per-example gradient.
    """

    NORM_SAMPLERS: ClassVar[dict[type[nn.Module], Any]] = {nn.Linear: linear_norms}
