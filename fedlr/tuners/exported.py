"""What is exported of another system than LoRA: a model whose saved folder holds all that its logits depend on.

PEFT saves no bases of PSOFT, of which LoRA-XS is one case, and makes them anew by an SVD whose signs are free. Their
layer is W + scaling * B (R - 1) A with fixed A and B, so it is exported as what it equals: LoRA with lora_A = A and
lora_B = scaling * B (R - 1), which any PEFT tool opens.

Legend: D out_features, K in_features, R rank.
"""

from typing import Any, cast

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.psoft.layer import PsoftLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fedlr.adapter import ADAPTER_NAME, LAYOUT, LoraFactors, read_adapter, write_adapter
from fedlr.models import AdaptedModel


def title_of(model: nn.Module) -> str:
    """Return the name of the adapter's system, for people."""
    layout = getattr(model, LAYOUT, None)
    return "LoRA" if layout is None else str(layout.tuner.title)


@torch.no_grad()
def portable(model: AdaptedModel) -> AdaptedModel:
    """Return a model with the same logits whose folder opens anywhere: this one, or LoRA in the place of PSOFT."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PsoftLayer)}
    if not layers:
        return model
    factors = {path: _factors(layer) for path, layer in layers.items()}
    rank = max(len(layer.lora_A) for layer in factors.values())
    heads = [
        path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        target_modules=sorted(path.removeprefix("base_model.model.") for path in layers),
        modules_to_save=sorted(set(heads)) or None,
    )
    plain = get_peft_model(cast(Any, model).unload(), config, autocast_adapter_dtype=False)
    state = read_adapter(plain)
    write_adapter(plain, state.with_factors(factors).tensors)
    return plain


def _factors(layer: Any) -> LoraFactors:
    """Return A (R, K) and scaling * B (R - 1) (D, R) of a PSOFT layer."""
    lora_A, B = layer._psoft_A_cache[ADAPTER_NAME], layer._psoft_B_cache[ADAPTER_NAME]
    turn = layer.psoft_R[ADAPTER_NAME].get_matrix().double()
    core = turn - torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    return LoraFactors(lora_A, (layer.scaling[ADAPTER_NAME] * B.double() @ core).to(B.dtype))
