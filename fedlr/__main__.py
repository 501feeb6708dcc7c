"""The front door, `fedlr COMMAND ...`: finds the command among the installed ones and calls it, nothing more.

A command is an entry point of the group `fedlr.commands`: a function that takes the rest of the command line
and returns the exit code. Only the command asked for is imported; the list of commands reads docstrings from
the source files, so that it prints at once.

What a command prints may go to a reader that leaves (`fedlr methods | head`), to a full disk, or to a terminal that
cannot show every letter: none of these is a traceback.
"""

import ast
import contextlib
import difflib
import errno
import importlib.util
import io
import os
import select
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import fedlr

GROUP = "fedlr.commands"
USAGE_ERROR = 2
OUTPUT_LOST = 75  # with room made, the same command goes well (`fedlr.errors.PassingError`)
READER_LEFT = 141  # 128 + SIGPIPE, as a shell reports a program that wrote to a pipe nobody reads


def main(argv: Sequence[str] | None = None, *, commands: Iterable[EntryPoint] | None = None) -> int:
    """Run the command that the first word names with the other words; return its exit code.

    Without `commands` the installed ones are taken. A word that is no command gives exit code 2; output that nobody
    reads any more ends the command with 141, without a word, and output that the disk does not take with 75 and one
    line.
    """
    for stream in _streams():
        if stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is shown by its number
    try:
        code = _called(argv, commands)
    except OSError as error:
        is_left = error.errno == errno.EPIPE and any(map(_has_no_reader, _streams()))
        if not is_left and error.errno != errno.ENOSPC:
            raise  # a connection of the command's own
        code = _lost(error)
    return _flushed(code)


def _streams() -> list[io.TextIOWrapper]:
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]


def _has_no_reader(stream: io.TextIOWrapper) -> bool:
    ends = select.poll()
    ends.register(stream.fileno(), 0)  # of what is asked for nothing: errors are always told
    return any(event & select.POLLERR for _, event in ends.poll(0))


def _flushed(code: int) -> int:
    """Write what is still to be printed; return the exit code, another one where that fails."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:  # or the interpreter tries once more when it ends
                os.dup2(nowhere.fileno(), stream.fileno())
            code = _lost(error)
    return code


def _lost(error: OSError) -> int:
    """Say that something could not be written, where its reader does not know; return the exit code."""
    if error.errno == errno.EPIPE:
        return READER_LEFT
    where = f" in {error.filename}" if error.filename else ""
    fix = "make room, or send what is printed elsewhere"  # it may be a file of the command's own
    with contextlib.suppress(OSError):  # standard error is on the same disk: the code alone is left to say it
        print(f"fedlr: Expected room for all that is written{where}, got: {error.strerror}; {fix}", file=sys.stderr)
    return OUTPUT_LOST


def _called(argv: Sequence[str] | None, commands: Iterable[EntryPoint] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    found = {c.name: c for c in (entry_points(group=GROUP) if commands is None else commands)}
    match words:
        case [] | ["-h" | "--help" | "help", *_]:
            print(overview(found))
            return 0
        case ["--version", *_]:
            print(f"fedlr {fedlr.__version__}")
            return 0
        case [name, *rest] if name in found:
            return int(found[name].load()(rest))
        case _:
            print(_unknown(words[0], found), file=sys.stderr)
            return USAGE_ERROR


def overview(commands: Mapping[str, EntryPoint]) -> str:
    """Usage and one line a command."""
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:<{width}}  {_first_line(command)}".rstrip() for name, command in commands.items()]
    body = "\n".join(lines) if lines else "  none is installed: run `pip install -e .` in the repository"
    usage = "usage: fedlr COMMAND [KEY=VALUE ...]   (fedlr --version)"
    return f"{fedlr.__doc__}\n\n{usage}\n\ncommands:\n{body}\n\n`fedlr COMMAND --help` says more."


def _first_line(command: EntryPoint) -> str:
    """First docstring line of the command's function, read without importing its module; "" without one."""
    try:
        spec = importlib.util.find_spec(command.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"({command.module} is not installed)"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == command.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _unknown(name: str, commands: Mapping[str, EntryPoint]) -> str:
    if not commands:
        return f"fedlr: no command {name!r}: none is installed, run `pip install -e .` in the repository."
    nearest = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean `fedlr {nearest[0]}`?" if nearest else f"expected one of {', '.join(commands)}."
    return f"fedlr: no command {name!r}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
