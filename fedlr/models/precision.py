"""A frozen base in bfloat16: its tensors, and what passes between its layers. All that trains stays float32.

Half the memory of the base, and on processors with bfloat16 instructions about two thirds of the time of a step of a
wide model. The adapter reads what the base gives, so its gradients differ from those over a float32 base by the
rounding of eight binary digits; clipping bounds them just the same, because norms are taken, in float32, of the
gradients that are summed.
"""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.models.peft_state import ADAPTER_NAME, adapter_parameters
from fedlr.tasks.probe import probe_inputs

# How torch.cpu.get_capabilities names instructions that multiply bfloat16: x86 and Arm.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

Model = TypeVar("Model", bound=nn.Module)


def with_bfloat16_base(model: Model) -> Model:
    """Return a copy of a PEFT model whose frozen base is bfloat16; the model itself is not changed.

    Adapter tensors (lora_A, lora_B, a head, trained or not) are copies in float32. Buffers keep their type: rotary
    frequencies and positions are not precise enough in eight digits. A head gets its input in float32, so what it
    gives, and the loss, are float32. On a processor attention is eager, product by product.

    Raises:
        InputError: if the model does not run so.
    """
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    halved = {
        id(parameter): nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
        for parameter in model.parameters()
        if id(parameter) not in adapter and parameter.is_floating_point()
    }
    # To deepcopy, these are copies that it has made already; tied tensors stay tied.
    low = copy.deepcopy(model, dict(halved))
    if next(model.parameters()).device.type == "cpu":
        # PyTorch's fused attention has a slow bfloat16 backward pass on processors (measured in docs/log.md).
        cast(Any, low).set_attn_implementation("eager")
    for module in low.modules():
        # The wrapper that PEFT puts around a head, told by its attribute as in fedlr.training.supported.
        heads = getattr(module, "modules_to_save", None)
        if isinstance(heads, nn.ModuleDict) and ADAPTER_NAME in heads:
            module.register_forward_pre_hook(_widen_inputs)
    _check_runs(low)
    return low


def bfloat16_note() -> str | None:
    """Say that the processor has no instructions for bfloat16; None if it has."""
    found = torch.cpu.get_capabilities()
    if any(found.get(name) for name in _INSTRUCTIONS):
        return None
    return (
        "this processor has no instructions for bfloat16, so the run takes longer than with runtime.base_dtype=float32"
    )


def _widen_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in inputs)


@torch.no_grad()
def _check_runs(model: nn.Module) -> None:
    try:
        model(**probe_inputs(model))
    except Exception as error:  # what torch says of two types in one operation, or a foreign forward of anything
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"Expected a model that runs in bfloat16 for runtime.base_dtype=bfloat16, got {name}: "
            f"{first_line(error)}; set runtime.base_dtype=float32"
        ) from error
