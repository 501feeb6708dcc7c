"""`audit.KEY=VALUE` on the command line of `fedlr audit`: how much is measured, never what is audited."""

from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from fedlr.config.schema import Count, Section
from fedlr.errors import InputError
from fedlr.errors.messages import first_problem

PREFIX = "audit."


class Options(Section):
    """How much an audit measures."""

    canaries: Annotated[int, Field(ge=20, le=100_000)] = 1000  # rows of the data that are put in by coins
    guesses: Annotated[float, Field(gt=0, le=1)] = 0.1  # share of the canaries; the auditor abstains from the others
    draws: Annotated[int, Field(ge=4_000, le=100_000_000)] = 40_000  # of noise, at least
    rounds: Count | None = None  # of the run as configured; None: all
    planted: bool = True  # whether faults are planted, which the audit must find


def split_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the options among the words of a command line, and the other words.

    Raises:
        InputError: naming the key and what it may be.

    >>> split_options(["experiment=tiny", "audit.canaries=200"])[0].canaries
    200
    """
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith(PREFIX):
            key, equals, value = word.removeprefix(PREFIX).partition("=")
            if not equals:
                raise InputError(f"Expected {PREFIX}KEY=VALUE, got {word!r}")
            try:
                found[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise InputError(f"Expected {PREFIX}{key} to be a number, got {value!r}") from error
    known = [f"{PREFIX}{key}" for key in Options.model_fields]
    try:
        options = Options.model_validate(found)
    except ValidationError as error:
        raise InputError(first_problem(error, found, prefix="audit", known=known)) from error
    return options, [word for word in words if not word.startswith(PREFIX)]
