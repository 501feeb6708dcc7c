"""Tensors out of a file that torch.save wrote before 1.6, read as data: nothing in it is imported, called or unpickled.

Such a file is a few pickles and then the raw numbers of each storage. The opcodes of a pickle are walked with
`pickletools`, which only names them; of the few that a state dict needs each has its plain meaning here, what would
call a function is kept as a tuple, and any other opcode is refused.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlr.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C  # the number such a file begins with
_MARK = object()


def legacy_tensors(content: bytes) -> dict[str, Tensor]:
    """Return the float and long tensors of a state dict, by name.

    Raises:
        InputError: for a file of another kind, or with anything else in it.
    """
    stream = io.BytesIO(content)
    try:
        if read_plain(stream) != _MAGIC:
            raise InputError("Expected a file of torch.save before 1.6, got another number at its start")
        read_plain(stream), read_plain(stream)  # of the protocol, of the machine
        state, keys = read_plain(stream), read_plain(stream)
        storages: dict[str, bytes] = {}
        kinds = {call[2][0][1][2]: call[2][0][1][1] for call in state.values()}
        for key in keys:
            count = int.from_bytes(stream.read(8), "little")
            storages[key] = stream.read(count * _KINDS[kinds[key]].itemsize)
        return {name: _tensor(*call[2][:4], storages=storages) for name, call in state.items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError("Expected the file of a state dict") from error


_KINDS: dict[str, np.dtype[Any]] = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *, storages: Any) -> Tensor:
    _, kind, key, *_ = storage[1]
    flat = torch.from_numpy(np.frombuffer(storages[key], _KINDS[kind]).copy())
    return flat.as_strided(size, stride, offset).contiguous()


def read_plain(stream: io.BytesIO) -> Any:
    """Return what one pickle in a stream describes: plain values, and ("call", name, arguments) for what it would call.

    Raises:
        InputError: for an opcode that is not among the few.
    """
    stack: list[Any] = []
    memory: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _PUSHED:
            stack.append(argument)
        elif opcode.name in _MADE:
            stack.append(_MADE[opcode.name]())
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memory[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memory[argument])
        elif opcode.name in _TUPLES:
            count = _TUPLES[opcode.name]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode.name in _ACTIONS:
            _ACTIONS[opcode.name](stack)
        elif opcode.name == "STOP":
            return stack.pop()
        elif opcode.name != "PROTO":
            raise InputError(f"Expected the opcodes of a state dict, got {opcode.name}")
    raise InputError("Expected a whole pickle, got one that is cut short")


def _since_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1 - next(i for i, value in enumerate(reversed(stack)) if value is _MARK)
    values = stack[place + 1 :]
    del stack[place:]
    return values


def _call(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append({} if function == "collections OrderedDict" else ("call", function, arguments))


def _set_items(stack: list[Any]) -> None:
    values = _since_mark(stack)
    stack[-1].update(zip(values[::2], values[1::2], strict=True))


def _set_item(stack: list[Any]) -> None:
    value, name = stack.pop(), stack.pop()
    stack[-1][name] = value


def _append_all(stack: list[Any]) -> None:
    values = _since_mark(stack)
    stack[-1].extend(values)


def _build(stack: list[Any]) -> None:
    stack.pop()  # attributes of a dict, such as its version: of no use


_PUSHED = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "GLOBAL")
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "REDUCE": _call,
    "BINPERSID": lambda stack: stack.append(("storage", stack.pop())),
    "SETITEMS": _set_items,
    "SETITEM": _set_item,
    "APPENDS": _append_all,
    "BUILD": _build,
}
