"""What the commands of the houses share: options as `--name VALUE`, and bad input as one line with exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NoReturn

from fedlr.errors import InputError

Command = Callable[[Sequence[str]], int]
USAGE_ERROR = 2
INTERRUPTED = 130


def command(function: Callable[[list[str]], None]) -> Command:
    """Make `fedlr HOUSE NAME ...` out of a function NAME of a module of HOUSE.

    --help prints its docstring; an InputError is one line and exit code 2, an interrupt is 130.
    """
    name = f"fedlr {function.__module__.partition('.')[0]} {function.__name__}"

    @wraps(function)
    def run(arguments: Sequence[str]) -> int:
        if {"-h", "--help"} & set(arguments):
            print(function.__doc__)
            return 0
        try:
            function(list(arguments))
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return USAGE_ERROR
        except KeyboardInterrupt:
            return INTERRUPTED
        return 0

    return run


class Options(argparse.ArgumentParser):
    """Options of one command; what cannot be parsed is an InputError.

    >>> options = Options()
    >>> _ = options.add_argument("--port", type=int)
    >>> options.parse_args(["--port", "8000"]).port
    8000
    """

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise InputError(message[:1].upper() + message[1:] + "; --help shows the options")
