"""Single values of a table: what is a text, and what is the name of a label or group."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np


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


def as_name(value: Any) -> tuple[str, str]:
    """Return a label or group as a name, and what is wrong with it."""
    if isinstance(value, str):
        name = value.strip()
        if not name or name.casefold() == "nan":
            return "", "is missing"
        return (name, "") if _is_unicode(name) else ("", f"{name[:40]!r} holds half a character")
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower(), ""
    if isinstance(value, Integral):
        return str(int(value)), ""
    if isinstance(value, Real):
        number = float(value)
        if number.is_integer():
            return str(int(number)), ""
        return "", "is missing" if math.isnan(number) else f"is {number}, expected a name or an integer"
    if value is None:
        return "", "is missing"
    return "", f"is a {type(value).__name__}, expected a name or an integer"


def class_name(value: Any, class_names: tuple[str, ...]) -> tuple[str, str]:
    """Return the name of a ClassLabel value (an index; -1 by its authors' convention is 'no label')."""
    if value is None or value == -1:
        return "", "is missing"
    if not isinstance(value, Integral) or not 0 <= int(value) < len(class_names):
        return "", f"is {value!r}, expected an index below {len(class_names)}"
    return class_names[int(value)], ""
