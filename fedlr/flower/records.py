"""Adapter tensors and facts as Flower records: one flat array a dtype, a layout that says what follows what, and JSON.

Flower moves every array as an object of its own (a request each way and hop), so a LoRA state of hundreds of small
tensors is its worst case; packed, it is one. The only module of the library that knows Flower.

A record is read as a stranger's: its size is looked at before anything is parsed, an array's header is compared with
the one that its bytes must have and never read, and nothing in it is unpickled or unzipped.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.app import RecordDict as RecordDict
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.adapters.state import num_bytes as num_bytes
from fedlr.errors import InputError

ARRAYS, LAYOUT, FACTS = "arrays", "layout", "facts"
# Flower's arrays are numpy's, which has no bfloat16: such tensors travel as the integers of their bits.
CARRIERS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.int16}
# What a codec makes of an update besides: only a server that asked for such takes them.
OF_CODECS = {"int8": torch.int8, "int32": torch.int32}
ALL_CARRIERS = CARRIERS | OF_CODECS
NUMPY_HEADER = 128  # bytes before the numbers of a one-dimensional array


class Entry(TypedDict):
    """One tensor: it lies in its dtype's array, right after the entries before it."""

    path: str
    role: str
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Limits:
    """What a record may hold at most; a server knows what it asked for."""

    num_bytes: int = 1 << 32  # of all tensors
    num_tensors: int = 100_000
    fact_chars: int = 1 << 20
    coded: bool = False  # integers too


ANY = Limits()  # what comes from a server


def to_record(tensors: Mapping[Slot, Tensor], facts: Mapping[str, Any] | None = None) -> RecordDict:
    """Pack tensors into a record that Flower sends as one object a dtype.

    They are float32, float64 or bfloat16, and of a codec's message also int8 or int32. `facts` is whatever JSON can
    hold; None leaves it out.
    """
    parts: dict[str, list[Tensor]] = {}
    layout: list[Entry] = []
    for slot, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ALL_CARRIERS:
            raise InputError(
                f"Expected a float32, float64, bfloat16, int8 or int32 tensor to send, got {dtype} for {slot}"
            )
        layout.append(Entry(path=slot.path, role=slot.role, dtype=dtype, shape=list(tensor.shape)))
        parts.setdefault(dtype, []).append(tensor.detach().reshape(-1).view(ALL_CARRIERS[dtype]))
    arrays = {dtype: Array(torch.cat(flat).numpy()) for dtype, flat in parts.items()}
    record = RecordDict({ARRAYS: ArrayRecord(arrays), LAYOUT: ConfigRecord({LAYOUT: json.dumps(layout)})})
    if facts is not None:
        record[FACTS] = ConfigRecord({FACTS: json.dumps(facts)})
    return record


def from_record(record: RecordDict, limits: Limits = ANY) -> dict[Slot, Tensor]:
    """Unpack what `to_record` packed; the sender is not trusted to have told the truth about anything.

    Raises:
        InputError: if the record is not of this form, is larger than the limits, or its layout does not fill the arrays
            exactly.
    """
    try:
        arrays, text = record.array_records[ARRAYS], record.config_records[LAYOUT][LAYOUT]
        others = set(record) - {ARRAYS, LAYOUT, FACTS}
        if others or list(record.config_records[LAYOUT]) != [LAYOUT] or not isinstance(text, str):
            raise ValueError("there is more in it")
        if not arrays.keys() <= (ALL_CARRIERS if limits.coded else CARRIERS).keys():
            raise ValueError("there are other arrays in it")
        if len(text) > 1000 * limits.num_tensors + 100 or sum(map(_num_bytes, arrays.values())) > limits.num_bytes:
            raise ValueError("it is too large")
        flat = {dtype: _numbers(array, dtype) for dtype, array in arrays.items()}
        return _unpack([_checked(entry) for entry in json.loads(text)], flat)
    except Exception as error:  # Flower, numpy and json each have their own for bytes that make no sense
        raise InputError(
            f"Expected a packed adapter record whose layout fills its arrays, got another ({type(error).__name__})"
        ) from error


def facts_of(record: RecordDict, limits: Limits = ANY) -> dict[str, Any]:
    """Return the facts of a record: a JSON object, of which nothing has been checked yet.

    Raises:
        InputError: if there is none.
    """
    try:
        section = record.config_records[FACTS]
        text = section[FACTS]
        if list(section) != [FACTS] or not isinstance(text, str) or len(text) > limits.fact_chars:
            raise ValueError("not one text")
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError("not an object")
        return facts
    except Exception as error:  # RecursionError for deeply nested JSON too
        raise InputError(f"Expected the facts of a message as JSON, got another ({type(error).__name__})") from error


def _num_bytes(array: Array) -> int:
    return max(0, len(array.data) - NUMPY_HEADER)


def _numbers(array: Array, dtype: str) -> np.ndarray:
    """Return the numbers of an array whose bytes, header included, are those that numpy itself writes for them."""
    carrier = torch.empty(0, dtype=ALL_CARRIERS[dtype]).numpy().dtype
    size = _num_bytes(array) // carrier.itemsize
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": carrier.str, "fortran_order": False, "shape": (size,)})
    is_whole = len(array.data) == header.tell() + size * carrier.itemsize and array.data.startswith(header.getvalue())
    if not is_whole or (array.stype, array.dtype, tuple(array.shape)) != ("numpy.ndarray", str(carrier), (size,)):
        raise ValueError("an array is not what it says")
    return np.frombuffer(array.data, dtype=carrier, offset=header.tell())


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
        if part.dtype != ALL_CARRIERS[dtype] or part.shape != (end - start,):
            raise ValueError("an array is not what the layout says")
        tensors[Slot(entry["path"], entry["role"])] = part.view(getattr(torch, dtype)).reshape(shape)
        taken[dtype] = end
    if len(tensors) != len(layout) or dict(taken) != {dtype: array.size for dtype, array in flat.items()}:
        raise ValueError("a slot comes twice, or values are left over")
    return tensors
