"""A finding of the doctor: one line that says ok, or REFUSE and what to change."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlr.errors import InputError


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found.

    >>> print(Finding("disk", "120.0 GB free"))
    ok      disk     120.0 GB free
    """

    name: str
    text: str
    is_ok: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.is_ok else 'REFUSE':<8}{self.name:<9}{self.text}"


def found(name: str, check: Callable[..., str], *arguments: object) -> Finding:
    """Return what a check says, or why it failed: one that fails hides no other."""
    try:
        return Finding(name, check(*arguments))
    except InputError as error:
        return Finding(name, str(error), is_ok=False)
    except Exception as error:  # a machine may lack anything
        return Finding(name, f"{type(error).__name__}: {' '.join(str(error).split())}", is_ok=False)
