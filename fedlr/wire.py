"""Adapter tensors as Flower records: one flat array a dtype, and a layout that says what follows what.

Flower moves every array as an object of its own (a request each way and hop), so a LoRA state of hundreds of small
tensors is its worst case; packed, it is one. The only module of the library that knows Flower.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlr.adapter import Slot
from fedlr.adapter import num_bytes as num_bytes
from fedlr.errors import InputError

ARRAYS, LAYOUT = "arrays", "layout"
# Flower's arrays are numpy's, which has no bfloat16: such tensors travel as the integers of their bits.
CARRIERS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.int16}


class Entry(TypedDict):
    """One tensor: it lies in its dtype's array, right after the entries before it."""

    path: str
    role: str
    dtype: str
    shape: list[int]


def to_record(tensors: Mapping[Slot, Tensor]) -> RecordDict:
    """Pack tensors (float32, float64 or bfloat16) into a record that Flower sends as one object a dtype."""
    parts: dict[str, list[Tensor]] = {}
    layout: list[Entry] = []
    for slot, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in CARRIERS:
            raise InputError(f"Expected a float32, float64 or bfloat16 tensor to send, got {dtype} for {slot}")
        layout.append(Entry(path=slot.path, role=slot.role, dtype=dtype, shape=list(tensor.shape)))
        parts.setdefault(dtype, []).append(tensor.detach().reshape(-1).view(CARRIERS[dtype]))
    arrays = {dtype: Array(torch.cat(flat).numpy()) for dtype, flat in parts.items()}
    return RecordDict({ARRAYS: ArrayRecord(arrays), LAYOUT: ConfigRecord({LAYOUT: json.dumps(layout)})})


def from_record(record: RecordDict) -> dict[Slot, Tensor]:
    """Unpack what `to_record` packed; the sender is not trusted to have told the truth about anything.

    Raises:
        InputError: if the record is not of this form, or its layout does not fill the arrays exactly.
    """
    try:
        layout = json.loads(str(record.config_records[LAYOUT][LAYOUT]))
        flat = {dtype: array.numpy() for dtype, array in record.array_records[ARRAYS].items()}
        return _unpack([_checked(entry) for entry in layout], flat)
    except Exception as error:  # Flower, numpy and json each have their own for bytes that make no sense
        raise InputError(
            f"Expected a packed adapter record whose layout fills its arrays, got another ({type(error).__name__})"
        ) from error


def _checked(entry: Entry) -> Entry:
    texts = (entry["path"], entry["role"], entry["dtype"])
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in entry["shape"]):
        raise ValueError("an entry is not two names, a dtype and a shape")
    return entry


def _unpack(layout: list[Entry], flat: Mapping[str, np.ndarray]) -> dict[Slot, Tensor]:
    tensors: dict[Slot, Tensor] = {}
    taken: Counter[str] = Counter()
    for entry in layout:
        dtype, shape, start = entry["dtype"], entry["shape"], taken[entry["dtype"]]
        end = start + math.prod(shape)
        part = torch.from_numpy(flat[dtype][start:end].copy())
        if part.dtype != CARRIERS[dtype] or part.shape != (end - start,):
            raise ValueError("an array is not what the layout says")
        tensors[Slot(entry["path"], entry["role"])] = part.view(getattr(torch, dtype)).reshape(shape)
        taken[dtype] = end
    if len(tensors) != len(layout) or dict(taken) != {dtype: array.size for dtype, array in flat.items()}:
        raise ValueError("a slot comes twice, or values are left over")
    return tensors
