"""Single values of a table: what is a text, and what is the name of a label or group.

No message holds a value of a row: they are private, and messages are read by others and kept in logs.
"""

import math
import re
import unicodedata
from collections.abc import Collection
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_NAME = 200  # characters; what is longer is a text
# As pandas and R write what is missing; upper and lower case do not count.
MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "#n/a"})
_NUMBER = re.compile(r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,4})?")


def text_problem(text: Any) -> str:
    """Return what is wrong with a value of the text column, '' if nothing."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return "the text is missing"
    if not isinstance(text, str):
        return f"the text is a {type(text).__name__}, expected a string"
    if not text or text.isspace():
        return "the text is empty"
    return "" if _is_unicode(text) else "the text holds half a character (a lone surrogate, such as \\ud800)"


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a JSON escape can name half a character, on which tokenizers fail."""
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def as_name(value: Any, *, known: Collection[str] = ()) -> tuple[str, str]:
    """Return a label or group as a name, and what is wrong with it.

    A name is in Unicode's normal form C, so that two ways to write an accent are one name. A word that stands for
    "missing" is a name where it is `known` to be one.
    """
    if isinstance(value, str):
        return _name(value, known)
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower(), ""
    if isinstance(value, Integral):
        return (str(int(value)), "") if abs(int(value)) < 10**MAX_NAME else ("", "is a number of too many digits")
    if isinstance(value, Real):
        number = float(value)
        if number.is_integer():
            return str(int(number)), ""
        return "", "is missing" if math.isnan(number) else "is no whole number, expected a name or an integer"
    if value is None:
        return "", "is missing"
    return "", f"is a {type(value).__name__}, expected a name or an integer"


def named(value: Any) -> str:
    """Return a label of the configuration as a name, '' if it is none; a word such as NA is one there."""
    return as_name(value, known=(unicodedata.normalize("NFC", value).strip(),) if isinstance(value, str) else ())[0]


def _name(value: str, known: Collection[str]) -> tuple[str, str]:
    if not _is_unicode(value):
        return "", "holds half a character"
    name = unicodedata.normalize("NFC", value).strip()
    if not name or (name not in known and name.casefold() in MISSING):
        return "", "is missing (empty, or a word such as NA, null or None)"
    if len(name) > MAX_NAME:
        return "", f"has more than {MAX_NAME} characters, expected a name"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "", "holds a line break or another control character"
    return name, ""


def class_name(value: Any, class_names: tuple[str, ...]) -> tuple[str, str]:
    """Return the name of a ClassLabel value (an index; -1 by its authors' convention is 'no label')."""
    if value is None or value == -1:
        return "", "is missing"
    if not isinstance(value, Integral) or not 0 <= int(value) < len(class_names):
        return "", f"is no index below {len(class_names)}, the number of classes"
    return class_names[int(value)], ""


def as_number(name: str) -> Decimal | None:
    """Return the number that a name spells, None if it spells none.

    >>> as_number("01") == as_number("1e0") == as_number("1.0")
    True
    """
    return Decimal(name) if _NUMBER.fullmatch(name) else None
