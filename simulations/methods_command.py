"""`fedlr methods`: every method of configs/method, with what it was measured to do."""

import difflib
import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlr.config.folders import file_of, options
from fedlr.errors import InputError
from fedlr.simulations.cli import command, say

if TYPE_CHECKING:
    from fedlr.simulations.method_properties import Properties

HEADER = ("method", "trains", "up", "down", "aggregate", "noised under DP", "also")
LEGEND = (
    "Numbers up and down are those of a layer and client: W is D x K, the rank R, r where the server chooses it, the "
    "folded product of rank M. Exact: the server's function is the weighted mean of the clients'. Measured on made-up "
    "clients; fedlr methods NAME says more."
)
CHOICES = ("block_schedule", "aggregate", "finalise", "broadcast")
NO_TERMINAL = 200  # columns, where nobody looks
NARROWEST = 6


@command
def methods(arguments: list[str]) -> None:
    """List the methods and what each was measured to do: fedlr methods [NAME ...]

    Without a name: one line a method. With names: its source, its choices, and the figures behind the line.
    """
    known = names()
    for word in arguments:
        if word not in known:
            nearest = difflib.get_close_matches(word, known, n=1)
            raise InputError(f"Expected {' or '.join(nearest) or ', '.join(known)}, got {word!r}")
    width = shutil.get_terminal_size((NO_TERMINAL, 24)).columns
    from fedlr.simulations.method_properties import properties_of

    if not arguments:
        rows = [row(properties_of(name)) for name in known]
        say(fitted([HEADER, *rows], width))
        say("\n" + textwrap.fill(LEGEND, width))
    for number, name in enumerate(arguments):
        say(("\n" if number else "") + described(name, width))


def names() -> list[str]:
    """Return the methods that have a file, sorted."""
    from fedlr.config import schema as experiment

    return options("method", experiment.CONFIGS)


def row(properties: "Properties") -> tuple[str, ...]:
    """Return a method's line of the table, in the order of HEADER."""
    one = properties
    return (one.name, one.trains, one.up, one.down, one.aggregate, one.noised, "; ".join(one.notes))


def described(name: str, width: int) -> str:
    """Return the first lines of a method's file, its choices, and its properties with their figures."""
    from fedlr.config import schema as experiment
    from fedlr.simulations.method_properties import named_method, properties_of

    text = file_of("method", name, experiment.CONFIGS).read_text(encoding="utf-8")
    header = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    one, method = properties_of(name), named_method(name)
    told = [
        (key, choice_text(getattr(method, key))) for key in ("block_schedule", "aggregate", "finalise", "broadcast")
    ]
    if one.client_rule:
        told.append(("client", choice_text(method.client)))
    told += zip(("trains", "numbers up", "numbers down", "measured", "noised under DP"), row(one)[1:-1], strict=True)
    rounds = f"over {len(one.updates)} rounds of {len(one.updates[0])} clients that differ"
    figures = f"{one.aggregate_error:.1e} of the aggregate, {one.final_error:.1e} when finalised, {rounds}"
    told.append(("largest error", "none is defined: there is no one model" if one.personal else figures))
    if one.mixed_error is not None:
        told.append(("mixed ranks", f"largest error {one.mixed_error:.1e}"))
    if one.folds:
        told.append(("columns folded", f"{', '.join(map(str, one.side_columns))} at the start of rounds 0, 1, 2 ..."))
    if one.server_memory:
        told.append(("server memory", ", ".join(one.server_memory)))
    told.append(("also", "; ".join(one.notes) or "nothing"))
    margin = max(len(key) for key, _ in told) + 4
    lines = [name, *(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ") for line in header), ""]
    for key, value in told:
        lines.append(textwrap.fill(f"  {key:<{margin - 2}}{value}", width, subsequent_indent=" " * margin))
    return "\n".join(lines)


def choice_text(choice: Any) -> str:
    """Return a choice as it is named in YAML, its arguments, and the first line of its docstring.

    >>> choice_text(textwrap.dedent)
    'textwrap.dedent: Remove any common leading whitespace from every line in `text`.'
    """
    kind = choice if inspect.isroutine(choice) else type(choice)
    values: Mapping[str, Any] = {} if kind is choice else vars(choice)
    plain = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}
    shown = ", ".join(f"{name}={value!r}" for name, value in plain.items() if not name.startswith("_"))
    first = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({shown})" if shown else "") + f": {first}"


def fitted(rows: Sequence[Sequence[str]], width: int) -> str:
    """Return rows as aligned plain text no wider than `width`, as far as words can be broken into lines.

    >>> print(fitted([("a", "b"), ("one", "two words")], 10))
    a    b
    one  two
         words
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for cells in rows:
        wrapped = [textwrap.wrap(cell, each) or [""] for cell, each in zip(cells, widths, strict=True)]
        for number in range(max(map(len, wrapped))):
            parts = (part[number] if number < len(part) else "" for part in wrapped)
            lines.append("  ".join(part.ljust(each) for part, each in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)
