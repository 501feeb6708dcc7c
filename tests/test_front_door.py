"""`fedlr COMMAND`: the right function gets the rest of the words, and nothing else is imported."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import fedlr
from fedlr.__main__ import GROUP, main

HOUSE = '''
import sys

def add(argv):
    """Add two numbers.

    More of it.
    """
    print(int(argv[0]) + int(argv[1]))
    return 0

def fail(argv):
    return 3
'''


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    (tmp_path / "a_house.py").write_text(HOUSE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_house", raising=False)
    targets = {"add": "a_house:add", "fail": "a_house:fail", "lost": "no_such_house:run"}
    return [EntryPoint(name, target, GROUP) for name, target in targets.items()]


def test_command_gets_the_rest_of_the_words(commands, capsys):
    assert main(["add", "2", "40"], commands=commands) == 0
    assert capsys.readouterr().out == "42\n"


def test_result_of_the_command_is_the_exit_code(commands):
    assert main(["fail"], commands=commands) == 3


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_overview_has_a_line_a_command_and_imports_none(words, commands, capsys):
    assert main(words, commands=commands) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  add   Add two numbers." in lines
    assert "  fail" in lines
    assert "  lost  (no_such_house is not installed)" in lines
    assert "a_house" not in sys.modules


@pytest.mark.parametrize(("word", "hint"), [("ad", "`fedlr add`"), ("zzz", "one of add, fail, lost")])
def test_unknown_command_names_the_nearest_and_exits_with_2(word, hint, commands, capsys):
    assert main([word], commands=commands) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert repr(word) in captured.err and hint in captured.err


def test_without_any_command_the_message_says_how_to_install(capsys):
    assert main(["simulate"], commands=[]) == 2
    assert "pip install" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"], commands=[]) == 0
    assert capsys.readouterr().out == f"fedlr {fedlr.__version__}\n"
