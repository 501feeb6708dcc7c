"""What the commands of the houses share: options as `--name VALUE`, and bad input as one line with exit code 2."""

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from fedlr.config.offline import go_offline
from fedlr.errors import InputError, PassingError
from fedlr.files import is_full

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

Command = Callable[[Sequence[str]], int]
USAGE_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143


def command(function: Callable[[list[str]], None], *, interrupted: str = "") -> Command:
    """Make `fedlr HOUSE NAME ...` out of a function NAME of a module of HOUSE; of simulations it is `fedlr NAME ...`.

    --help prints its docstring; an InputError is one line and its exit code (2: bad input, 75: passes by itself, 77:
    shut out), a full disk is one line and 75, an interrupt is 130 and SIGTERM 143, with the
    line `interrupted` if there is one.
    """
    house = function.__module__.removeprefix("fedlr.").partition(".")[0]
    name = f"fedlr {function.__name__}" if house == "simulations" else f"fedlr {house} {function.__name__}"

    @wraps(function)
    def run(arguments: Sequence[str]) -> int:
        if {"-h", "--help"} & set(arguments):
            print(function.__doc__)
            return 0
        quiet_libraries()
        try:
            with ending_by_signal():
                function(list(arguments))
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return error.exit_code
        except (MemoryError, RecursionError, OverflowError) as error:  # ranges come first; this is what they missed
            print(
                f"{name}: Expected numbers that this machine can work with, got {type(error).__name__} "
                f"({' '.join(str(error).split())[:120] or 'no details'}): lower what is large, and raise what is tiny",
                file=sys.stderr,
            )
            return USAGE_ERROR
        except Exception as error:
            if not is_full(error):
                raise
            print(
                f"{name}: Expected room on the disk, got none ({error}); make some and start this again",
                file=sys.stderr,
            )
            return PassingError.exit_code
        except KeyboardInterrupt as stop:
            if interrupted:
                print(f"\n{interrupted}", file=sys.stderr)
            return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        return 0

    return run


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what is in hand ends as by Ctrl-C, with another exit code."""


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Raise `Terminated` where SIGTERM comes, once; nothing where somebody else handles it, or in a thread."""
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminated(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def dispatch(house: str, doc: str | None, commands: Mapping[str, tuple[str, str]], arguments: Sequence[str]) -> int:
    """Call the command that the first word names, of `commands`: by name, its module and the function in it.

    Only the one asked for is imported. Without a word, or with --help, `doc` is printed.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(doc)
        return 0
    if name not in commands:
        print(f"fedlr {house}: Expected one of {', '.join(commands)}, got {name!r}", file=sys.stderr)
        return USAGE_ERROR
    module, function = commands[name]
    chosen: Command = getattr(import_module(module), function)
    return chosen(rest)


def ready(overrides: Sequence[str]) -> "Experiment":
    """Compose an experiment and check all that needs neither data nor model; tell hub libraries if it is offline."""
    from fedlr.config.schema import compose_experiment

    experiment = compose_experiment(overrides)
    go_offline(experiment.runtime.offline)
    from fedlr.config.build import check_sections  # imports hub libraries, which read the environment once

    check_sections(experiment)
    return experiment


def option(arguments: list[str], name: str, what: str) -> str | None:
    """Take an option and its value out of the arguments and return the value, None without it.

    >>> option(words := ["a", "--out", "b.html"], "--out", "a file name"), words
    ('b.html', ['a'])
    """
    if name not in arguments:
        return None
    place = arguments.index(name)
    if place + 1 == len(arguments):
        raise InputError(f"Expected {what} after {name}, got none")
    arguments.pop(place)
    return arguments.pop(place)


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of the run's own lines; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|opacus|torch)\b")


def quiet_flower() -> None:
    """Keep Flower's debugging out of our own lines; call it once Flower is imported, which sets its level."""
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.WARNING)
    flower.propagate = False


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
