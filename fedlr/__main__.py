"""The front door, `fedlr COMMAND ...`: finds the command among the installed ones and calls it, nothing more.

A command is an entry point of the group `fedlr.commands`: a function that takes the rest of the command line
and returns the exit code. Only the command asked for is imported; the list of commands reads docstrings from
the source files, so that it prints at once.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import fedlr

GROUP = "fedlr.commands"
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None, *, commands: Iterable[EntryPoint] | None = None) -> int:
    """Run the command that the first word names with the other words; return its exit code.

    Without `commands` the installed ones are taken. A word that is no command gives exit code 2.
    """
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
