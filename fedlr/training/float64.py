"""Formulas in float64: some tuners narrow to float32 inside, which would hide what is exact behind rounding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Float32AsFloat64(TorchFunctionMode):
    """Every request for float32 gives float64, and so does a new tensor without a type."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        words: Mapping[str, Any] = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if function is Tensor.float:
            return args[0].double()
        if function is torch.zeros and "dtype" not in words:
            words = {**words, "dtype": torch.float64}
        return function(*map(_widened, args), **words)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def float32_as_float64() -> AbstractContextManager[Any]:
    """Return a context in which code that asks for float32 computes in float64: for measuring, never for training."""
    return _Float32AsFloat64()


def in_float64(model: nn.Module) -> None:
    """Widen a model, what its layers keep outside their state included."""
    model.double()
    for module in model.modules():
        if isinstance(module.__dict__.get("dtype"), torch.dtype):
            module.__dict__["dtype"] = torch.float64
