"""By which library a processor multiplies with frozen float32 weights: PyTorch's default (MKL on x86) or oneDNN.

Both compute in float32 and round differently in the last bits, so the choice is part of what a seed repeats: `auto`
becomes a name before a run begins, and the run's config.yaml and versions.json keep it.

Notable choices:
- `auto` asks what the processor is and times nothing. A timing is a lottery under load, and a device, a simulation and
  a Ray actor on one machine must all draw the same lot. Where nobody measured, PyTorch's default stays, and
  `fedlr bench step` says what the other would bring.
- oneDNN wins where MKL does not know the processor: measured on AMD family 26 (Zen 5), 212 to 228 GFLOP/s against 84 to
  103, one thread. On family 25 without AVX-512 (Zen 3) MKL is ahead, 71 to 85 against 57 to 78.
- A frozen layer keeps its weights and its place and changes its class: nothing is packed or copied, whoever folds into
  the weights is seen by the next product, and a copy of the model in bfloat16 computes as it would have.
- PyTorch offers oneDNN in float32 by an operator that its own compiler uses, without gradients; they are here. Where
  that operator is missing, `onednn` is refused, never replaced.

Legend: N rows, K in_features, D out_features.
"""

import platform
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlr.errors import InputError
from fedlr.models.peft_state import adapter_parameters

Library = Literal["mkl", "onednn"]
AUTO = "auto"
# The least family of AMD's processors on which oneDNN was measured to be ahead, by a factor of two.
AMD_FAMILY = 26


def library_of(asked: str) -> Library:
    """Return the library that `runtime.matmul` stands for on this machine.

    Raises:
        InputError: it names one that this PyTorch lacks.
    """
    if asked == AUTO:
        return fastest(_processor(), torch.cpu.get_capabilities(), has_onednn=has_onednn())
    if asked not in get_args(Library):
        raise InputError(f"Expected runtime.matmul to be auto, {' or '.join(get_args(Library))}, got {asked!r}")
    if asked == "onednn" and not has_onednn():
        raise InputError(
            f"Expected a PyTorch whose oneDNN multiplies in float32 for runtime.matmul=onednn, got "
            f"{torch.__version__}; set runtime.matmul=mkl, which rounds differently in the last bits"
        )
    return cast(Library, asked)


def fastest(processor: Mapping[str, str], instructions: Mapping[str, Any], *, has_onednn: bool) -> Library:
    """Return the library for a processor, by rule.

    Args:
        processor: its `vendor_id` and `cpu family`, as Linux names them.
        instructions: what `torch.cpu.get_capabilities` found.
        has_onednn: whether PyTorch can call it.

    >>> fastest({"vendor_id": "AuthenticAMD", "cpu family": "26"}, {"avx512_f": True}, has_onednn=True)
    'onednn'
    >>> fastest({"vendor_id": "GenuineIntel", "cpu family": "6"}, {"avx512_f": True}, has_onednn=True)
    'mkl'
    """
    is_amd = processor.get("vendor_id") == "AuthenticAMD"
    family = processor.get("cpu family", "")
    is_new = is_amd and family.isdecimal() and int(family) >= AMD_FAMILY
    return "onednn" if has_onednn and is_new and instructions.get("avx512_f") else "mkl"


@cache
def has_onednn() -> bool:
    """Return whether PyTorch has the operator, and it computes what it should."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight, bias = torch.eye(4)[:3], torch.arange(20.0).view(5, 4), torch.arange(5.0)
    try:
        # Small whole numbers: every library must be exact.
        forward, backward = _onednn(x, weight, bias), _onednn(torch.eye(5), weight.t(), None)
    except (RuntimeError, TypeError, NotImplementedError):  # the operator is nobody's promise
        return False
    return torch.equal(forward, weight.t()[:3] + bias) and torch.equal(backward, weight)


def use_library(model: nn.Module, library: Library) -> None:
    """Let the frozen linear layers of a PEFT model multiply by a library, forward and backward; in place.

    What belongs to the adapter (lora_A, lora_B, a head, trained or not) stays as it is.
    """
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    classes = _BY_ONEDNN if library == "onednn" else {ours: plain for plain, ours in _BY_ONEDNN.items()}
    for module in model.modules():
        if type(module) in classes and not any(id(parameter) in adapter for parameter in module.parameters()):
            module.__class__ = classes[type(module)]


def library_in(layer: nn.Module) -> Library:
    """Return the library by which a linear layer multiplies."""
    return "onednn" if type(layer) in _BY_ONEDNN.values() else "mkl"


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes x W^T + b and nothing else, by either library."""
    return type(layer) in (nn.Linear, OneDnnLinear)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, library: Library) -> Tensor:
    """Return x W^T + b, (..., D), for x (..., K) and W (D, K), which may be a transposed view; no gradients.

    Beside float32 on a processor there is one way, PyTorch's own.
    """
    if library == "onednn" and _in_reach(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


class OneDnnLinear(nn.Linear):
    """A frozen linear layer that multiplies by oneDNN."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `product`."""
        return product(x, weight, bias, "onednn")

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., K) to (..., D)."""
        if self.weight.requires_grad or not _in_reach(input, self.weight):
            return super().forward(input)
        return _frozen(input, self.weight, self.bias)


class OneDnnConv1D(Conv1D):
    """GPT-2's linear layer, its weight (K, D), frozen and by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) to (..., D)."""
        if self.weight.requires_grad or not _in_reach(x, self.weight):
            return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]
        return _frozen(x, self.weight.t(), self.bias)


_BY_ONEDNN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: OneDnnLinear, Conv1D: OneDnnConv1D}


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b for a W and b that get no gradient; the gradient of x is another such product."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias, "onednn")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return (_frozen(grad, weight.t(), None) if ctx.needs_input_grad[0] else None), None, None

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        where, *others = in_dims
        if where is None or any(place is not None for place in others):
            raise InputError("Expected a frozen layer with one weight for all examples; set runtime.matmul=mkl")
        return _frozen(x.movedim(where, 0), weight, bias), 0


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    apply: Callable[..., Tensor] = _FrozenProduct.apply
    return apply(x, weight.detach(), None if bias is None else bias.detach())


def _in_reach(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@cache
def _processor() -> Mapping[str, str]:
    """Return the first processor's lines of /proc/cpuinfo; elsewhere than on Linux nothing that a rule knows."""
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.exists():
        return {}
    found: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
