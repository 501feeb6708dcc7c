"""Adapter tensors as Flower records: one flat array a dtype, and a layout that says what is where.

Flower moves every array as an object of its own (a request each way and hop), so a LoRA state of hundreds of small
tensors is its worst case; packed, it is one. The only module of the library that knows Flower.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlr.adapter import Slot
from fedlr.errors import InputError

ARRAYS, LAYOUT = "arrays", "layout"
# Flower's arrays are numpy's, which has no bfloat16: such tensors travel as the integers of their bits.
CARRIERS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.int16}


class Entry(TypedDict):
    """Where one tensor lies: which flat array, from which element, in which shape."""

    path: str
    role: str
    dtype: str
    offset: int
    shape: list[int]


def to_record(tensors: Mapping[Slot, Tensor]) -> RecordDict:
    """Pack tensors (float32, float64 or bfloat16) into a record that Flower sends as one object a dtype."""
    parts: dict[str, list[Tensor]] = {}
    layout: list[Entry] = []
    for slot, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in CARRIERS:
            raise InputError(f"Expected a float32, float64 or bfloat16 tensor to send, got {dtype} for {slot}")
        flat = parts.setdefault(dtype, [])
        offset = sum(part.numel() for part in flat)
        layout.append(Entry(path=slot.path, role=slot.role, dtype=dtype, offset=offset, shape=list(tensor.shape)))
        flat.append(tensor.detach().contiguous().view(CARRIERS[tensor.dtype]).reshape(-1))
    arrays = {dtype: Array(torch.cat(flat).numpy()) for dtype, flat in parts.items()}
    return RecordDict({ARRAYS: ArrayRecord(arrays), LAYOUT: ConfigRecord({LAYOUT: json.dumps(layout)})})


def from_record(record: RecordDict) -> dict[Slot, Tensor]:
    """Unpack what `to_record` packed; the sender is not trusted to have told the truth about sizes.

    Raises:
        InputError: if the record is not of this form, or its layout does not fill the arrays exactly.
    """
    try:
        layout: list[Entry] = json.loads(str(record.config_records[LAYOUT][LAYOUT]))
        flat = {key: array.numpy() for key, array in record.array_records[ARRAYS].items()}
        tensors = {Slot(e["path"], e["role"]): _take(flat[e["dtype"]], e) for e in layout}
        used = {key: sum(math.prod(e["shape"]) for e in layout if e["dtype"] == key) for key in flat}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"Expected a packed adapter record, got one that cannot be read ({type(error).__name__})"
        ) from error
    if len(tensors) != len(layout) or used != {key: array.size for key, array in flat.items()}:
        raise InputError("Expected a packed adapter record whose layout fills its arrays once, got another")
    return tensors


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the payload of a packed record in bytes: the numbers themselves, without layout and transport."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _take(flat: np.ndarray, entry: Entry) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    size = math.prod(entry["shape"])
    part = flat[entry["offset"] : entry["offset"] + size]
    if flat.ndim != 1 or torch.from_numpy(flat[:0].copy()).dtype != CARRIERS[dtype] or min([0, *entry["shape"]]) < 0:
        raise ValueError("dtype or shape is not what the layout says")
    return torch.from_numpy(part.copy()).view(dtype).reshape(entry["shape"])
