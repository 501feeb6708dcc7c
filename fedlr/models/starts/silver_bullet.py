"""LoRA-SB, and so Fed-SB: LoRA-XS between the singular vectors of the first step of full fine-tuning.

delta_W = scaling * B M A with fixed B = U and A = V^T, and M = R - 1 as PEFT's PSOFT writes it. M starts at
sigma / scaling, so delta_W starts as the best approximation, of rank R, of that step: on purpose the start's function
is not the base's. Source: Ponkshe et al. 2024, algorithm 1, https://arxiv.org/abs/2411.19557.
Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.psoft.layer import PsoftLayer
from torch import Tensor, nn

from fedlr.errors import InputError
from fedlr.models.peft_state import ADAPTER_NAME
from fedlr.models.starts.factors import lora_sb_bases


def core_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the frozen layers that have an R x R core between two bases, by the path of what adapts them."""
    return {path: layer.get_base_layer() for path, layer in _adapted(model).items()}


@torch.no_grad()
def write_bases(model: nn.Module, gradients: Mapping[str, Tensor], *, rank: int, learning_rate: float) -> None:
    """Write bases and core of every layer in place, so that copies of the model that share the bases have them too.

    Args:
        gradients: by path, (D, K), of public examples.

    Raises:
        InputError: a gradient that is not finite.
    """
    layer: Any  # PEFT's dictionaries of modules are untyped
    for path, layer in _adapted(model).items():
        if not torch.isfinite(gradients[path]).all():
            raise InputError(f"Expected finite gradients for adapter.init_lora_weights=lora_sb, got others in {path}")
        U, sigma, Vh = lora_sb_bases(gradients[path], rank, learning_rate=learning_rate)
        layer._psoft_A_cache[ADAPTER_NAME].copy_(Vh)
        layer._psoft_B_cache[ADAPTER_NAME].copy_(U)
        core = torch.diag(sigma / layer.scaling[ADAPTER_NAME])
        layer.psoft_R[ADAPTER_NAME].weight.copy_(torch.eye(rank, dtype=core.dtype) + core)


def _adapted(model: nn.Module) -> dict[str, PsoftLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PsoftLayer)}
