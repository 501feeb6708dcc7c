"""From names in a configuration to objects: the only place that calls what a `_target_` names."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, get_type_hints

import torch
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from fedlr.errors import InputError
from fedlr.experiment import Experiment, first_problem, unknown_key
from fedlr.method import Method

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def build(section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Call what `_target_` names with the section's keys and the `given` arguments, checked against its signature.

    Raises:
        InputError: if there is no such callable, or a key is unknown, missing or of a wrong type.
    """
    target = section["_target_"]
    try:
        function = get_object(target)
    except Exception as error:  # hydra wraps whatever an import raises
        raise InputError(f"Expected {where}._target_ to be an importable name, got {target!r}") from error
    parameters = inspect.signature(function).parameters
    accepted = {name: given[name] for name in given if name in parameters}
    allowed = [name for name in parameters if name not in given]
    hints = get_type_hints(function)
    arguments: dict[str, Any] = {}
    for key, value in section.items():
        if key == "_target_":
            continue
        if key not in allowed:
            raise InputError(unknown_key(f"{where}.{key}", [f"{where}.{name}" for name in allowed]))
        try:
            arguments[key] = TypeAdapter(hints.get(key, Any), config=STRICT).validate_python(value)
        except ValidationError as error:
            raise InputError(first_problem(error, prefix=f"{where}.{key}")) from error
    missing = [n for n in allowed if n not in arguments and parameters[n].default is inspect.Parameter.empty]
    if missing:
        raise InputError(f"Expected a value for {where}.{missing[0]}, got none")
    return function(**arguments, **accepted)


def build_method(experiment: Experiment) -> Method:
    """Instantiate the method's four choices."""
    try:
        method = instantiate(experiment.method, _convert_="all")
    except HydraException as error:
        raise InputError(
            f"Expected `method` to be four choices (configs/method), got one that fails: {error}"
        ) from error
    if not isinstance(method, Method):
        raise InputError(f"Expected method._target_ to be fedlr.method.Method, got {type(method).__name__}")
    return method


def build_optimizer(experiment: Experiment) -> "partial[torch.optim.Optimizer]":
    """Return the local optimizer as a callable over parameters, tried once on a dummy."""
    section = experiment.trainer.optimizer.section()
    name, arguments = section.pop("_target_"), section
    try:
        make = partial(get_object(name), **arguments)
        optimizer = make([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever a foreign optimizer raises about its arguments
        raise InputError(
            f"Expected trainer.optimizer to be a torch optimizer, got {name} {arguments}: {error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"Expected trainer.optimizer to be a torch optimizer, got {name}")
    return make
