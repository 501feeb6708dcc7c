"""What a part of a user's own must be, by where it stands: found out before it is called.

A name of Python's own library is refused unread, so that a slip such as `data._target_=os.system` runs nothing. Any
other is imported, and must say what it makes, in its return annotation or by being a class; what it makes must be what
belongs there. An annotation can lie: the result is checked too, by whoever calls (`fedlr.config.build`).
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

import torch

from fedlr.adapters.state import AdapterState
from fedlr.config.parts import PATH, TARGET, is_part, name_of, section_of
from fedlr.data.partition import Partition
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.codecs.codec import Codec
from fedlr.methods.method import Method
from fedlr.models.network import BaseModel
from fedlr.tasks.task import Task


@dataclass(frozen=True)
class Kind:
    """What a part makes: an object of a type, or a callable of so many positional arguments that returns the type."""

    made: type
    num_arguments: int | None = None  # None: an object

    def __str__(self) -> str:
        if self.made is torch.optim.Optimizer:
            return "a torch optimizer"
        if self.num_arguments is None:
            return f"a function or a class that makes a {self.made.__name__}"
        return f"a function or a class of {self.num_arguments} argument(s) that gives a {self.made.__name__}"


KINDS: Mapping[str, Kind] = {
    "data": Kind(Table),
    "partition": Kind(Partition),
    "model": Kind(BaseModel),
    "task": Kind(Task),
    "codec": Kind(Codec),
    "method": Kind(Method),
    "method.block_schedule": Kind(frozenset, 2),
    "method.aggregate": Kind(AdapterState, 2),
    "method.finalise": Kind(AdapterState, 1),
    "method.broadcast": Kind(Mapping, 2),
    "method.client": Kind(ClientRule),
    "trainer.optimizer": Kind(torch.optim.Optimizer),
    "trainer.after_noise": Kind(ClientRule),
    "client_rule": Kind(ClientRule),  # method.client, as terms call it
}


def check_name(name: str, where: str) -> None:
    """Refuse a name of Python's own library before it is imported.

    Raises:
        InputError: which says what belongs at the key.
    """
    if is_pythons_own(name):
        kind = KINDS[section_of(where)]
        raise InputError(f"Expected {where} to name {kind}, got {name!r}, which belongs to Python itself")


def check_kind(found: Callable[..., Any], name: str, where: str) -> None:
    """Refuse a callable that does not say that it makes what belongs at a key; it is not called.

    Raises:
        InputError: which says what it makes instead.
    """
    section, key = section_of(where), where.rpartition(".")[2]
    is_used_as_it_is = key == PATH or (key != TARGET and not isinstance(found, type))  # its path stands alone
    if is_part(name_of(name, section), section):
        return
    while isinstance(found, partial):
        found = found.func
    if is_pythons_own(getattr(found, "__module__", None) or "builtins"):
        raise InputError(f"Expected {where} to name {KINDS[section]}, got {name!r}, which belongs to Python itself")
    kind = KINDS[section]
    if not (_gives(found, kind) if is_used_as_it_is and kind.num_arguments is not None else _makes(found, kind)):
        says = "which is no such class, and no function whose return annotation says so"
        raise InputError(f"Expected {where} to name {kind}, got {name!r}, {says}")


def is_pythons_own(name: str) -> bool:
    """Return whether a dotted name begins with a module of Python's own library."""
    return name.replace(":", ".").partition(".")[0] in sys.stdlib_module_names


def _makes(found: Any, kind: Kind) -> bool:
    """Return whether a call of `found` makes what the kind is."""
    made = found if isinstance(found, type) else _returned(found)
    if kind.num_arguments is None:
        return _is(made, kind.made)
    if get_origin(made) is Callable:
        return _is(get_args(made)[-1], kind.made)
    call = getattr(made, "__call__", None) if isinstance(made, type) else None  # noqa: B004
    return call is not None and _is(_returned(call), kind.made) and _takes(call, 1 + kind.num_arguments)


def _gives(found: Any, kind: Kind) -> bool:
    """Return whether `found` itself is the callable that the kind asks for."""
    assert kind.num_arguments is not None
    given = found if isinstance(found, type) else _returned(found)
    return _is(given, kind.made) and _takes(found, kind.num_arguments)


def _takes(function: Any, num_arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except (TypeError, ValueError):
        return False
    return True


def _returned(function: Any) -> Any:
    """Return what a function's annotation says that it returns: a type, a text that names one, or None."""
    if not inspect.isroutine(function):
        function = getattr(type(function), "__call__", function)  # noqa: B004
    try:
        return get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        return getattr(function, "__annotations__", {}).get("return")


def _is(made: Any, wanted: type) -> bool:
    if isinstance(made, str):  # could not be read: the name must do, and the result is checked
        names = {wanted.__name__, "Block"} if wanted is frozenset else {wanted.__name__}
        return made.partition("[")[0].rpartition(".")[2] in names
    origin = get_origin(made) or made
    return isinstance(origin, type) and issubclass(origin, wanted)
