"""From names in a configuration to objects: the only place that calls what a `_target_` names."""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pkgutil import resolve_name
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import nn

from fedlr.config.auto_rates import provisional
from fedlr.config.parts import GET_METHOD, PATH, TARGET, is_part, name_of, place_of, section_of
from fedlr.config.schedules import server_rates
from fedlr.config.schema import DataSection, Experiment, Target, TrainerSection
from fedlr.config.slots import check_kind, check_name
from fedlr.data.partition import Partition
from fedlr.data.table import Table
from fedlr.errors import InputError, in_range
from fedlr.errors.messages import dotted, first_problem, keyed, one_line, shown, unknown_key
from fedlr.methods.codecs.codec import NONE, Codec
from fedlr.methods.method import Method
from fedlr.models.network import BaseModel
from fedlr.tasks.task import Task

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)

# What the callable of a section returns, and which of its parameters the program gives it.
SECTIONS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "data": (Table, ("seed",)),
    "partition": (Partition, ("data", "num_clients", "seed")),
    "model": (BaseModel, ("label_names", "seed")),
    "task": (Task, ("label_names", "label_weights")),
    "codec": (Codec, ()),
}
CHOICES = ("block_schedule", "aggregate", "finalise", "broadcast", "client")


def check_sections(experiment: Experiment) -> None:
    """Check every `_target_` and its arguments without reading data or loading a model.

    Raises:
        InputError: for the first that cannot be built.
    """
    build_method(experiment)
    build_optimizer(provisional(experiment).trainer)
    for where, (_, given) in SECTIONS.items():
        checked(getattr(experiment, where).section(), where, given)


def build(section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Call what `_target_` names with the section's keys and the `given` arguments, checked against its signature.

    Raises:
        InputError: if there is no such callable, a key is unknown, missing or of a wrong type, or the result is not
            what belongs there.
    """
    function, arguments = checked(section, where, list(given))
    accepted = {name: value for name, value in given.items() if name in _names(function, where)}
    with naming(where, *sorted(set(_names(function, where)) - set(given))):
        result = function(**arguments, **accepted)
    kind = SECTIONS.get(where, (object, ()))[0]
    if not isinstance(result, kind):
        raise InputError(f"Expected {where}._target_ to return a {kind.__name__}, got {type(result).__name__}")
    return result


def build_task(experiment: Experiment, label_names: Sequence[str]) -> Task:
    """Build the task of a table with these classes, in the order of their indices.

    Raises:
        InputError: as `build`, and for weights of labels that there are not.
    """
    weights = experiment.data.label_weights
    task: Task = build(experiment.task.section(), "task", label_names=tuple(label_names), label_weights=weights)
    return task


def build_codec(section: Target) -> Codec | None:
    """Build what updates travel through; None: nothing.

    Raises:
        InputError: as `build`.
    """
    codec: Codec = build(section.section(), "codec")
    return None if section.target == NONE else codec


@contextmanager
def naming(where: str, *names: str) -> Iterator[None]:
    """Give the parameters in an InputError from within their full keys."""
    try:
        yield
    except InputError as error:
        raise InputError(keyed(str(error), where, names)) from error


def build_method(experiment: Experiment) -> Method:
    """Build the method: its name, and four choices that are each a `_target_`. A rate that is auto is no number yet.

    Raises:
        InputError: as `build`, with the key of the choice.
    """
    section = provisional(experiment).method
    built = {key: build_choice(section[key], f"method.{key}") for key in CHOICES if key in section}
    plain = {TARGET: "method", **{key: value for key, value in section.items() if key not in built}}
    function, arguments = checked(plain, "method", [*built, "server_momentum"])
    parameters = _names(function, "method")
    required = [key for key in CHOICES if key in parameters and parameters[key].default is inspect.Parameter.empty]
    absent = [key for key in required if key not in built]
    if absent:
        raise InputError(f"Expected a value for method.{absent[0]}, got none")
    with naming("method"):
        method = function(**arguments, **{k: v for k, v in built.items() if k in parameters})
    if not isinstance(method, Method):
        raise InputError(f"Expected method._target_ to make a Method, got {plain[TARGET]!r}")
    # Keys of the root: one for all methods.
    if experiment.server_momentum:
        method = replace(method, server_momentum=experiment.server_momentum)
    rates = server_rates(experiment)
    return method if rates.is_constant else replace(method, server_rates=rates)


def build_choice(choice: Any, where: str) -> Callable[..., Any]:
    """Build one choice of a method: a function by its name, or what the class of that name makes of the arguments.

    A function of a user's own is used as it is where its path stands alone, and called where it is a `_target_`.
    """
    if isinstance(choice, str):
        found = find(choice, where)
        return found if not isinstance(found, type) else build({TARGET: choice}, where)
    if not isinstance(choice, Mapping):
        raise InputError(f"Expected {where} to be a name, or a section with a _target_, got {shown(choice)}")
    name = name_of(choice.get(TARGET), where)
    if is_part(name, where) and not isinstance(function := find(name, f"{where}._target_"), type):
        if others := sorted(set(choice) - {TARGET}):
            raise InputError(f"Expected no argument of {where}={name}, which takes none, got {where}.{others[0]}")
        return function
    if name == GET_METHOD:
        if others := sorted(set(choice) - {TARGET, PATH}):
            raise InputError(unknown_key(f"{where}.{others[0]}", [f"{where}.path"]))
        return find(choice.get("path"), f"{where}.path")
    built = build(choice, where)
    if not callable(built):
        raise InputError(f"Expected {where}._target_ to make a callable, got {type(built).__name__}")
    return built  # type: ignore[no-any-return]


def build_optimizer(trainer: TrainerSection) -> "partial[torch.optim.Optimizer]":
    """Return the local optimizer as a callable over parameters, tried once on a dummy.

    Raises:
        InputError: if it is no torch optimizer, or refuses its arguments.
    """
    where, section = "trainer.optimizer", trainer.optimizer.section()
    function = find(section["_target_"], f"{where}._target_")
    if not (isinstance(function, type) and issubclass(function, torch.optim.Optimizer)):
        raise InputError(f"Expected {where}._target_ to be a torch optimizer, got {section['_target_']!r}")
    _, arguments = checked(section, where, ["params"])
    if isinstance(lr := arguments.get("lr"), int | float) and lr >= 0:  # of one below, torch has its own words
        in_range(1e-12, 1e6, **{f"{where}.lr": lr})
    make: partial[torch.optim.Optimizer] = partial(function, **arguments)
    try:
        make([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever a foreign optimizer raises about its arguments
        raise InputError(
            f"Expected {where} to have arguments that {function.__name__} takes, got {shown(arguments)}: "
            f"{one_line(error)}"
        ) from error
    return make


def checked(section: Mapping[str, Any], where: str, given: Sequence[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the callable of a section and its arguments, which fit the signature; nothing is called."""
    function = find(section.get("_target_"), f"{where}._target_")
    parameters = _names(function, where)
    own = [name for name in parameters if name not in given]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    hints = _hints(function)
    arguments = {key: value for key, value in section.items() if key != "_target_"}
    of_data = [name for name in DataSection.model_fields if "path" in own or not name.startswith("test_")]
    known = [*own, *(of_data if where == "data" else ())]
    for key, value in arguments.items():
        full = f"{where}.{key}"
        if key not in own and not open_ended:
            raise InputError(unknown_key(full, [f"{where}.{name}" for name in known if name != "target"]))
        check_value(value, hints.get(key, Any), full)
    for name in own:
        if name not in arguments and parameters[name].default is inspect.Parameter.empty:
            raise InputError(f"Expected a value for {where}.{name}, got none")
    return function, arguments


def check_value(value: Any, hint: Any, where: str) -> None:
    """Refuse a value of another type than the parameter's, and numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"Expected {where} to be a finite number, got {value}")
    try:
        # As JSON, in which a list may stand for a tuple.
        TypeAdapter(hint, config=STRICT).validate_json(json.dumps(value))
    except ValidationError as error:
        raise InputError(first_problem(error, value, prefix=where)) from error
    except PydanticSchemaGenerationError:  # a type of somebody else's: the callable will say
        return


def find(name: Any, where: str) -> Callable[..., Any]:
    """Import what a name stands for, and refuse what is not for this key, uncalled (`fedlr.config.slots`).

    Raises:
        InputError: if there is nothing of that name, or it cannot be called, or does not say that it makes what belongs
            there.
    """
    if not isinstance(name, str):
        beside = f"; beside arguments of it set {where}=NAME" if name is None and where.endswith(TARGET) else ""
        raise InputError(f"Expected {where} to be a part's name, got {shown(name)}{beside}")
    place = place_of(name, section_of(where), where)
    check_name(place, where)
    try:
        found = resolve_name(place)
    except Exception as error:  # whatever an import raises
        raise InputError(f"Expected {where} to be an importable name, got {name!r}{_similar(name)}") from error
    if not callable(found):
        raise InputError(f"Expected {where} to name a function or a class, got {name!r}, a {type(found).__name__}")
    check_kind(found, name, where)
    return found  # type: ignore[no-any-return]


def _similar(name: str) -> str:
    module, _, last = name.rpartition(".")
    try:
        near = get_close_matches(last, dir(resolve_name(module)), n=1)
    except Exception:  # the hint is not worth a second error
        return ""
    return f"; did you mean {dotted(module, near[0])}?" if near else ""


def _names(function: Callable[..., Any], where: str) -> dict[str, inspect.Parameter]:
    """Return the parameters that may be given by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:  # some builtins have none
        raise InputError(
            f"Expected {where}._target_ to be a callable with a signature, got {function.__name__}"
        ) from error
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the parameters, as far as they can be read."""
    try:
        return get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    except (AttributeError, NameError, TypeError):
        return {}
