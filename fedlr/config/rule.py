"""One rule of what goes together: the keys that it compares, why it is there, and the sentence that refuses."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from fedlr.errors import InputError

S = TypeVar("S")  # what a rule is asked of: a configuration, or that with the method built from it


@dataclass(frozen=True)
class Rule(Generic[S]):
    """Values that are right one by one and wrong together."""

    keys: tuple[str, ...]  # what it compares, first the key to change
    why: str  # for the page that lists all rules
    refusals: Callable[[S], Iterator[str]]  # a sentence with the value and the fix for each thing that is wrong
    module: str  # where it is written


@dataclass(frozen=True)
class Rules(Generic[S]):
    """Rules that are asked at the same moment, in the order in which they are written."""

    title: str  # a heading on the page that lists all rules
    when: str  # a sentence below it: what they are asked of, and when
    rules: tuple[Rule[S], ...]

    def check(self, subject: S) -> None:
        """Refuse what the first rule that does not hold says.

        Raises:
            InputError: which names the key, its value and what to set.
        """
        for one in self.rules:
            for sentence in one.refusals(subject):
                raise InputError(sentence)

    def refused(self, subject: S) -> list[str]:
        """Return the sentence of everything that is refused."""
        return [sentence for one in self.rules for sentence in one.refusals(subject)]


def rule(*keys: str) -> Callable[[Callable[[S], Iterator[str]]], Rule[S]]:
    """Make a rule of a function that yields a sentence for each thing that is wrong; its docstring says why.

    >>> @rule("rank", "layers")
    ... def rank_of_layers(found: dict[str, int]) -> Iterator[str]:
    ...     '''A layer has one rank at least.'''
    ...     if found["rank"] < found["layers"]:
    ...         yield f"Expected rank >= {found['layers']}, got {found['rank']}; set a larger one"
    >>> rank_of_layers.keys, list(rank_of_layers.refusals({"rank": 1, "layers": 2}))
    (('rank', 'layers'), ['Expected rank >= 2, got 1; set a larger one'])
    """

    def made(function: Callable[[S], Iterator[str]]) -> Rule[S]:
        return Rule(keys, " ".join((function.__doc__ or "").split()), function, function.__module__)

    return made


def rules_of(*modules: ModuleType) -> tuple[Rule[S], ...]:
    """Return the rules that are written in these modules, in that order."""
    return tuple(
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, Rule) and found.module == module.__name__
    )


def page(lists: Iterable[Rules[Any]]) -> str:
    """Return the tables of docs/rules.md: a section for each list, a row for each rule."""
    return "\n".join(_section(one) for one in lists)


def _section(rules: Rules[Any]) -> str:
    rows = [f"| {', '.join(f'`{key}`' for key in one.keys)} | {one.why} |" for one in rules.rules]
    return "\n".join([f"## {rules.title}", "", rules.when, "", "| keys | rule |", "| --- | --- |", *rows, ""])
