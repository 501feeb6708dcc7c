"""The errors a user of fedlr is meant to read, and the exit code that each ends a command with."""


class InputError(ValueError):
    """A configuration, file or message that cannot be used: the text names the value and what to change."""

    exit_code = 2


class PassingError(InputError):
    """What passes by itself or with room made: whoever watches the process starts it again (EX_TEMPFAIL)."""

    exit_code = 75


class ShutOutError(InputError):
    """Somebody decided that this process may not go on: starting it again is no use (EX_NOPERM)."""

    exit_code = 77


def in_range(least: float, most: float, **named: float) -> None:
    """Refuse a number that is not between two others; nan is between none.

    Raises:
        InputError: which names the number.

    >>> in_range(0, 1, share=0.5)
    >>> in_range(0, 1, share=2)
    Traceback (most recent call last):
    fedlr.errors.InputError: Expected share in [0, 1], got 2
    """
    for name, value in named.items():
        if not least <= value <= most:
            raise InputError(f"Expected {name} in [{least:,}, {most:,}], got {value}")
