"""`fedlr COMMAND`: the right function gets the rest of the words, and nothing else is imported."""

import errno
import io
import os
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

def long(argv):
    for number in range(20_000):
        print(number)
    return 0

def cut(argv):
    raise BrokenPipeError(32, "a connection of its own")

def full(argv):
    raise OSError(28, 'No space left on device', 'x/model')

def odd(argv):
    print("\\u00e9\\udcff")
    return 0
'''


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    (tmp_path / "a_house.py").write_text(HOUSE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_house", raising=False)
    targets = {"add": "a_house:add", "fail": "a_house:fail", "lost": "no_such_house:run"}
    targets |= {name: f"a_house:{name}" for name in ("long", "cut", "full", "odd")}
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


@pytest.mark.parametrize(
    ("word", "hint"), [("ad", "`fedlr add`"), ("zzz", "one of add, fail, lost, long, cut, full, odd")]
)
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


@pytest.mark.parametrize("words", [["long"], ["add", "1", "2"], []])
def test_a_reader_that_leaves_ends_a_command_without_a_word(words, commands, monkeypatch, capsys):
    """`fedlr methods | head`; a short output is only found out when it is flushed."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words, commands=commands) == 141
        stream.flush()  # goes nowhere: the interpreter, when it ends, has nothing to complain of
    assert capsys.readouterr().err == ""


def test_a_connection_that_breaks_is_no_reader_that_left(commands):
    with pytest.raises(BrokenPipeError, match="a connection of its own"):
        main(["cut"], commands=commands)


@pytest.mark.parametrize("words", [["long"], ["add", "1", "2"], ["--version"]])
def test_output_on_a_full_disk_is_one_line(words, commands, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words, commands=commands) == 75
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and os.strerror(errno.ENOSPC) in told


def test_a_full_disk_of_a_command_is_named_and_counts_where_nothing_can_be_said(commands, monkeypatch, capsys):
    assert main(["full"], commands=commands) == 75
    assert "room" in (told := capsys.readouterr().err) and "x/model" in told
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["full"], commands=commands) == 75


def test_a_letter_that_the_terminal_lacks_is_shown_by_its_number(commands, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["odd"], commands=commands) == 0
        stream.flush()
        assert stream.buffer.getvalue() == b"\\xe9\\udcff\n"
