"""Federated, private low-rank fine-tuning with LoRA methods and accounted DP-SGD."""

import os
from importlib.metadata import entry_points
from typing import Any

__version__ = "0.1.0"

# What a notebook uses (docs/python.md); each is loaded when it is first asked for, so that the import costs nothing.
__all__ = ["InputError", "Run", "federation", "read_run", "score", "simulate", "train"]

# The same numbers wherever a tensor lies in memory: without this, small products of Intel's library depend on the
# alignment of their operands (measured on an AMD Zen 4: multiples of 16 bytes that are not multiples of 64). It is read
# at the first product of the process, and costs nothing that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")


def __getattr__(name: str) -> Any:
    """Load what `__all__` names: an entry point of the group `fedlr.python`, as fedlr itself imports no house."""
    if name == "InputError":
        from fedlr.errors import InputError

        return InputError
    if name in __all__:
        for found in entry_points(group="fedlr.python", name=name):
            return found.load()
        raise AttributeError(
            f"fedlr.{name} is not installed: run `pip install -e .` in the repository, or install it anew"
        )
    raise AttributeError(f"module 'fedlr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what may be asked for."""
    return sorted([*globals(), *__all__])
