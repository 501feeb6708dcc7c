"""What no configuration needs, refused before anything reads it: numbers, texts and trees beyond any use.

Ranges of single keys stand in the schema (`fedlr.config.schema`) and at the functions that a `_target_` names; these
limits hold for every key alike, so that no library behind one is ever asked for more than it can do.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedlr.errors import InputError
from fedlr.errors.messages import dotted

LARGEST_INTEGER = 2**53  # beyond it a JSON reader may round
LARGEST, SMALLEST = 1e30, 1e-30  # of a float that is not zero: beyond them float32 overflows, or holds zero
MOST_CHARACTERS = 2_000
MOST_ENTRIES = 1_000_000
MOST_DEPTH = 12
MOST_WORD_CHARACTERS = 20_000  # of one override, which is parsed character by character
MOST_WORD_DEPTH = 16
MOST_DIGITS = 300

DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # by them a text looks like another

# Of a pattern that is matched against module names of some 100 characters: 64 places for the end of each repetition,
# two ways for each alternative. A million steps are milliseconds.
MOST_PATTERN_CHARACTERS = 500
BITS_OF_REPEAT, BITS_OF_CHOICE, MOST_BITS = 6, 1, 20


def check_word(text: str) -> None:
    """Refuse an override that its parser would not survive.

    Raises:
        InputError: it is too long, too deep, or holds what no value may.
    """
    key = text.partition("=")[0].lstrip("+~")[:80]
    if len(text) > MOST_WORD_CHARACTERS:
        raise InputError(f"Expected at most {MOST_WORD_CHARACTERS:,} characters for {key!r}, got {len(text):,}")
    depth = deepest = 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if deepest > MOST_WORD_DEPTH:
        raise InputError(f"Expected at most {MOST_WORD_DEPTH} brackets inside each other for {key!r}, got {deepest}")
    if digits := re.search(rf"\d{{{MOST_DIGITS},}}", text):
        raise InputError(f"Expected {key} to be a number of use, got one of {len(digits[0]):,} digits")
    if problem := _unprintable(text):
        raise InputError(f"Expected a value without {problem} for {key!r}, got one that holds it")


def check_limits(tree: Mapping[str, Any]) -> None:
    """Refuse a value of a configuration that no key could use.

    Raises:
        InputError: which names the key.
    """
    num_entries = 0
    for where, value, depth in _entries(tree):
        num_entries += 1
        if depth > MOST_DEPTH:
            raise InputError(f"Expected at most {MOST_DEPTH} levels in {where[:80]}, got more")
        if num_entries > MOST_ENTRIES:
            raise InputError(
                f"Expected a configuration of at most {MOST_ENTRIES:,} values, got more, up to {where[:80]}"
            )
        _check_value(where, value)


def _entries(tree: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield every value of a tree with its dotted key and depth; without recursion, whatever the depth."""
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        where, value, depth = waiting.pop()
        if where:
            yield where, value, depth
        if isinstance(value, Mapping):
            waiting += [(dotted(where, key), child, depth + 1) for key, child in value.items()]
        elif isinstance(value, list):
            waiting += [(where, child, depth + 1) for child in value]


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise InputError(f"Expected {where} of at most {MOST_CHARACTERS:,} characters, got {len(value):,}")
        if problem := _unprintable(value):
            raise InputError(f"Expected {where} without {problem}, got {value[:40]!r}")
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_INTEGER:
        num_digits = int(abs(value).bit_length() * math.log10(2)) + 1
        raise InputError(f"Expected {where} to be an integer of at most 2**53, got one of {num_digits} digits")
    elif isinstance(value, float) and math.isfinite(value) and value and not SMALLEST <= abs(value) <= LARGEST:
        raise InputError(f"Expected {where} to be 0, or between {SMALLEST:g} and {LARGEST:g} in size, got {value:g}")


def pattern_problem(pattern: str) -> str | None:
    """Return why a regular expression may take for ever to match, None where it cannot.

    A backtracking matcher tries every way to divide a name among repetitions. Without a repeated group there are at
    most as many as places to the power of repetitions, times the alternatives.

    >>> pattern_problem(r".*layer\\.[45]\\..*\\.(query|value)")
    >>> pattern_problem("(.*)*x")
    'without a repeated group'
    """
    if len(pattern) > MOST_PATTERN_CHARACTERS:
        return f"of at most {MOST_PATTERN_CHARACTERS} characters"
    plain = re.sub(r"\\.", "x", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    if re.search(r"\)[*+{]", plain):
        return "without a repeated group"
    if re.search(r"\(\?[=!<P(>]", plain) or re.search(r"\\[1-9]", pattern):
        return "without look-arounds and back-references"
    num_repeats = len(re.findall(r"[*+{]", plain))
    num_choices = len(re.findall(r"(?<![*+}(])[?]|\|", plain))
    if num_repeats * BITS_OF_REPEAT + num_choices * BITS_OF_CHOICE > MOST_BITS:
        return f"with at most {MOST_BITS // BITS_OF_REPEAT} repetitions (*, +, {{n}}) and few alternatives (|, ?)"
    return None


def _unprintable(text: str) -> str:
    """Return what a text holds that no file name, label or key may, "" if nothing."""
    if "\0" in text:
        return "the character NUL"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half a character (a lone surrogate)"
    if any(ord(character) < 32 and character != "\t" or ord(character) == 127 for character in text):
        return "line breaks and other control characters"
    if any(character in DIRECTIONS for character in text):
        return "characters that change the direction of writing"
    return ""
