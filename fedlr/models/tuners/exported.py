"""What is exported of another system than LoRA: a model whose saved folder holds all that its logits depend on.

PEFT saves no bases of PSOFT, of which LoRA-XS is one case, and makes them anew by an SVD whose signs are free. Their
layer is W + scaling * B (R - 1) A with fixed A and B, so it is exported as what it equals: LoRA with lora_A = A and
lora_B = scaling * B (R - 1), which any PEFT tool opens. So is a system with something folded into W: as LoRA of what
was folded, and of what its tensors add to it.

Legend: D out_features, K in_features, R rank.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.psoft.layer import PsoftLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LoraFactors
from fedlr.models.network import AdaptedModel
from fedlr.models.peft_state import ADAPTER_NAME, LAYOUT, read_adapter, write_adapter
from fedlr.models.tuners.layer_means import Folded, layers_of

INSIDE = "base_model.model."  # of the names of PEFT's modules, beside the base model's own


def title_of(model: nn.Module) -> str:
    """Return the name of the adapter's system, for people."""
    layout = getattr(model, LAYOUT, None)
    return "LoRA" if layout is None else str(layout.tuner.title)


@torch.no_grad()
def portable(model: AdaptedModel, side: Mapping[str, LoraFactors]) -> AdaptedModel:
    """Return a model with the same logits whose folder opens anywhere: this one, or LoRA in its place.

    Args:
        side: what has been folded into the model's layers; not LoRA's own, which is no other system.
    """
    if side and hasattr(model, LAYOUT):
        return _as_lora(model, _whole(model, side))
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PsoftLayer)}
    return _as_lora(model, {path: _factors(layer) for path, layer in layers.items()}) if layers else model


def _as_lora(model: AdaptedModel, factors: Mapping[str, LoraFactors]) -> AdaptedModel:
    """Put LoRA of these factors, of a scale of 1, in the place of a model's adapter; its head stays."""
    ranks = {f"^{re.escape(path.removeprefix(INSIDE))}": len(layer.lora_A) for path, layer in factors.items()}
    rank = max(ranks.values())
    others = {place: own for place, own in ranks.items() if own != rank}
    heads = [p.removeprefix(INSIDE) for p, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    config = LoraConfig(
        task_type=model.peft_config[ADAPTER_NAME].task_type,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(path.removeprefix(INSIDE) for path in factors),
        modules_to_save=sorted(set(heads)) or None,
    )
    plain = get_peft_model(cast(Any, model).unload(), config, autocast_adapter_dtype=False)
    state = read_adapter(plain)
    write_adapter(plain, state.with_factors(factors).tensors)
    return plain


def _whole(model: AdaptedModel, side: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return what every layer adds to the weights that the base model has: its side, and what its tensors add."""
    layout = getattr(model, LAYOUT)
    mean, state, found = layout.tuner.layer_mean, read_adapter(model), {}
    if not isinstance(mean, Folded):
        raise ValueError(f"Expected nothing folded beside {layout.tuner.title}, which is averaged in its own form")
    for path, layer in layers_of(model).items():
        start = mean.start_delta(layer, {block: state.tensors[slot].double() for block, slot in layer.slots.items()})
        total = LowRankSum(max_rank=min(len(start.lora_B), start.lora_A.shape[1]))
        if path in side:
            total.add(side[path])
        if not mean.reads_base or path not in side:  # where it reads W, the start adds nothing
            total.add(start)
        both = total.factors()
        found[path] = LoraFactors(both.lora_A.float(), both.lora_B.float())
    return found


def _factors(layer: Any) -> LoraFactors:
    """Return A (R, K) and scaling * B (R - 1) (D, R) of a PSOFT layer."""
    lora_A, B = layer._psoft_A_cache[ADAPTER_NAME], layer._psoft_B_cache[ADAPTER_NAME]
    turn = layer.psoft_R[ADAPTER_NAME].get_matrix().double()
    core = turn - torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    return LoraFactors(lora_A, (layer.scaling[ADAPTER_NAME] * B.double() @ core).to(B.dtype))
