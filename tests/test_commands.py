"""A command is a line on bad input, never a traceback."""

import os

import pytest

import fedlr.server.cli
from fedlr.errors import InputError
from fedlr.runs.commands import Options, command


@command
def add(arguments: list[str]) -> None:
    """Add two numbers."""
    options = Options()
    options.add_argument("--to", type=int, required=True)
    chosen = options.parse_args(arguments)
    if chosen.to < 0:
        raise InputError("Expected --to to be positive")
    if chosen.to == 0:
        raise KeyboardInterrupt
    print(chosen.to + 1)


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--to", "2"], 0, "3\n", ""),
        (["--help"], 0, "Add two numbers.\n", ""),
        (["--to", "-1"], 2, "", "add: Expected --to to be positive\n"),
        (["--to", "x"], 2, "", "add: Argument --to: invalid int value: 'x'; --help shows the options\n"),
        (["--t", "1"], 2, "", "add: The following arguments are required: --to; --help shows the options\n"),
        (["--to", "0"], 130, "", ""),
    ],
)
def test_a_command_answers_with_an_exit_code_and_one_line(arguments, code, out, err, capsys) -> None:
    assert add(tuple(arguments)) == code
    printed = capsys.readouterr()
    assert printed.out == out
    assert printed.err == (err and f"fedlr tests {err}")


def test_a_server_asks_no_hub_unless_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    assert (
        fedlr.server.cli.run(["experiment=tiny", "runtime=local"]) == 2
    )  # it serves devices only, and has composed by then
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"]) == ("1", "1")
