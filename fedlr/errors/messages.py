"""What is wrong with a configuration, in one line: the full key, the value, and what is allowed or meant."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that a key does not exist, with the nearest that do.

    >>> unknown_key("epsilon", ["seed", "privacy.epsilon"])
    "Expected a known key, got 'epsilon'; did you mean privacy.epsilon?"
    """
    keys = list(dict.fromkeys(known))
    parent, _, leaf = key.rpartition(".")
    here = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    leaves = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.75)
    near = [
        *(k for k in keys if k.rpartition(".")[2] == leaf),
        *difflib.get_close_matches(key, here, n=1, cutoff=0.75),
        *(k for k in keys if k.rpartition(".")[2] in leaves),
    ]
    hint = f"known are {', '.join(here)}" if here else "there are none here"
    if near:
        hint = f"did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?"
    return f"Expected a known key, got {key!r}; {hint}"


def unknown_option(group: str, got: str, options: Sequence[str]) -> str:
    """Say that a group has no such option, with those it has.

    >>> unknown_option("privacy", "pd", ["dp", "none"])
    "Expected privacy to be one of dp, none, got 'pd'; did you mean dp?"
    """
    near = difflib.get_close_matches(got, options, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"Expected {group} to be one of {', '.join(options)}, got {got!r}{hint}"


def first_problem(error: ValidationError, tree: Any, *, prefix: str = "", known: Iterable[str] = ()) -> str:
    """Render the first problem that validation found in `tree`: key, value and what is allowed.

    Args:
        tree: what was validated; its own keys tell keys from the names that pydantic gives to alternatives.
        prefix: the dotted key of the tree.
        known: dotted keys, for the hint about an unknown one.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    parts = list(first["loc"]) if first["type"] == "missing" else _parts(first["loc"], tree)
    where = dotted(prefix, *parts)
    if first["type"] == "extra_forbidden":
        return unknown_key(where, [key for key in known if key != where])
    if first["type"] == "missing":
        return f"Expected a value for {where}, got none"
    if first["type"] == "model_type":
        return f"Expected {where} to be a section with keys of its own, got {shown(first['input'])}"
    alternatives = [p for p in problems if _parts(p["loc"], tree) == parts]
    plain = [p for p in alternatives if p["type"] != "needs_python_object"] or alternatives
    wanted = " or ".join(dict.fromkeys(_wanted(p["msg"]) for p in plain))
    return f"Expected {where} to be {wanted}, got {shown(_at(tree, parts))}"


def keyed(text: str, where: str, names: Iterable[str]) -> str:
    """Give the parameters in a function's own message their full keys.

    A name is taken for a parameter right after "Expected", before "=", and wherever it has an underscore.

    >>> keyed("Expected alpha >= 1e-06, got 0; or lower min_examples", "partition", ["alpha", "min_examples"])
    'Expected partition.alpha >= 1e-06, got 0; or lower partition.min_examples'
    """
    for name in names:
        anywhere = rf"(?<![\w.]){name}(?![\w.])" if "_" in name else rf"(?<![\w.]){name}(?==)"
        text = re.sub(rf"(?<=^Expected ){name}(?![\w.])|{anywhere}", f"{where}.{name}", text)
    return text


def shown(value: object) -> str:
    """Write a value as it may be typed, on one line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def dotted(*parts: object) -> str:
    """Join the parts of a key."""
    return ".".join(str(part) for part in parts if part != "")


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Return every key of a tree, those of sections included."""
    if not isinstance(node, Mapping):
        return []
    return [k for key, value in node.items() for k in (dotted(prefix, key), *dotted_keys(value, dotted(prefix, key)))]


def one_line(error: BaseException) -> str:
    """Return the text of another library's error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the text of another library's error, which may be a page long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parts(loc: Sequence[str | int], tree: Any) -> list[str | int]:
    """Return the part of a location that is in the tree."""
    parts: list[str | int] = []
    for part in loc:
        inside = isinstance(part, int) and isinstance(tree, list) and part < len(tree)
        if not inside and not (isinstance(tree, Mapping) and part in tree):
            break
        parts.append(part)
        tree = tree[part]
    return parts


def _at(tree: Any, parts: Sequence[str | int]) -> Any:
    for part in parts:
        tree = tree[part]
    return tree


def _wanted(message: str) -> str:
    message = message.replace("String should have at least 1 character", "a text that is not empty")
    return message.removeprefix("Input should be ").removeprefix("Value error, ").replace("valid list", "list")
