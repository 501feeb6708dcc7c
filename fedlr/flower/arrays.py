"""A Flower ArrayRecord under PEFT's names as an adapter of the library, and back.

The names are those of `get_peft_model_state_dict(model)` (`base_model.model.X.lora_A.weight`) or of `state_dict()`
(`base_model.model.X.lora_A.default.weight`). An array that is no LoRA factor, such as a classifier, is a head.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Block, Slot, in_block
from fedlr.errors import InputError

LORA_FACTOR = re.compile(r"(?P<path>.+)\.(?P<role>lora_[AB])(\.[^.]+)?\.weight")
DTYPES = (torch.float32, torch.float64)
FIX = "give start ArrayRecord(get_peft_model_state_dict(model))"


@dataclass(frozen=True)
class PeftNames:
    """Which array of a record is which tensor of the adapter."""

    slots: Mapping[str, Slot]  # in the order of the record

    def record(self, adapter: AdapterState) -> ArrayRecord:
        """Return all of the adapter under the names it came with."""
        return ArrayRecord({key: Array(adapter.tensors[slot].numpy()) for key, slot in self.slots.items()})

    def keys(self, block: Block) -> list[str]:
        """Return the names of the arrays that a block trains."""
        return [key for key, slot in self.slots.items() if in_block(slot, block)]


def read_arrays(arrays: ArrayRecord) -> tuple[PeftNames, AdapterState]:
    """Read the arrays that a run starts from.

    The scale is set to 1: no rule that a strategy offers reads it, so every layer keeps its own lora_alpha / r.

    Raises:
        InputError: if they are no finite float32 or float64 tensors of LoRA, at most with a head beside it.
    """
    slots = {key: _slot(key) for key in arrays}
    tensors: dict[Slot, Tensor] = {}
    for key, slot in slots.items():
        if slot in tensors:
            raise InputError(f"Expected one adapter a layer, got a second {slot.role} of it: {key!r}; {FIX}")
        tensors[slot] = _start(key, arrays[key])
    paths = {slot.path for slot in tensors if slot.role != HEAD}
    if not paths:
        raise InputError(f"Expected arrays named like 'X.lora_A.weight', got none among {list(arrays)[:3]}; {FIX}")
    for path in sorted(paths):
        shapes = [tuple(tensors[slot].shape) for role in (LORA_A, LORA_B) if (slot := Slot(path, role)) in tensors]
        if len(shapes) != 2 or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise InputError(f"Expected lora_A (R, K) and lora_B (D, R) of linear layers, got {shapes} for {path!r}")
    return PeftNames(slots), AdapterState(tensors, scale=1.0)


def decode(array: Array) -> Tensor:
    """Return a sender's array, from its bytes alone: what it declares beside them is not believed.

    Nothing is unpickled or unzipped, and no more is allocated than was sent.

    Raises: some exception for whatever is no numpy array of numbers that fill its shape.
    """
    file = io.BytesIO(array.data)
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an array as Flower writes it")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    values = np.frombuffer(array.data, dtype=dtype, offset=file.tell())
    return torch.from_numpy(values.reshape(shape, order="F" if is_fortran else "C").copy())


def _slot(key: str) -> Slot:
    if match := LORA_FACTOR.fullmatch(key):
        return Slot(match["path"], match["role"])
    if ".base_layer." in key:
        raise InputError(f"Expected the adapter without its base model, got {key!r}; {FIX}")
    if ".lora_" in key:
        raise InputError(f"Expected plain LoRA of linear layers, got {key!r}, which the rules are not meant for")
    return Slot(key, HEAD)


def _start(key: str, array: Array) -> Tensor:
    try:
        tensor = decode(array)
    except Exception as error:  # numpy and torch each have their own for bytes that make no sense
        raise InputError(f"Expected an array of numbers for {key!r}, got another ({type(error).__name__})") from error
    if tensor.dtype not in DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"Expected float32, as PEFT keeps adapters over any base, got {name} for {key!r}: .float() it")
    if not tensor.numel() or not torch.isfinite(tensor).all():
        raise InputError(f"Expected finite numbers to start from, got a NaN, an infinity or nothing in {key!r}")
    return tensor
