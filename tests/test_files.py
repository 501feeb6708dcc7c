"""Whatever the disk refuses: one line with the path, the file before or the file after, and nothing in between.

Mutants this file kills (`MUTANTS`): a file that is written where it is read, lines of which a part stays, one write
that is taken for all of it, a new file that is left half, a folder that keeps its name while it is filled.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import fedlr.files as files
from fedlr.errors import InputError
from fedlr.files import NotWritten, append_whole, create_whole, make_folder, whole_folder, write_whole
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "ftruncate")
CODES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


@contextmanager
def failing(number: int, code: int) -> Iterator[list[str]]:
    """Let the call of that number of the operating system fail, from 0, and every later write; tell the calls."""
    calls: list[str] = []

    def injected(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and args[1] == os.O_RDONLY:
                return real(*args, **options)
            calls.append(name)
            if len(calls) - 1 >= number and name != "ftruncate":
                if name == "write" and len(args[1]) > 1:
                    real(args[0], args[1][: len(args[1]) // 2])  # a full disk takes what it has room for
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, injected(name, getattr(os, name)))
        yield calls


def fill(folder: Path, content: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder) as partial:
        write_whole(partial / "one", content)
        write_whole(partial / "two", content * 2)


def ledger(path: Path) -> None:
    PrivacyLedger.create(path, PrivacyBudget(1.0, 1e-5), dataset_id="rows", randomness="os", accountant="rdp")


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found | {path.relative_to(folder).as_posix() + "/": b"" for path in folder.rglob("*/") if path.is_dir()}


Act = Callable[[Path], None]
ACTS: dict[str, tuple[Act, Act]] = {  # what is there before, and what is done
    "a new file": (lambda f: None, lambda f: write_whole(f / "x", "new content")),
    "another file": (lambda f: write_whole(f / "x", "old"), lambda f: write_whole(f / "x", "new content")),
    "a file that must not exist": (lambda f: None, lambda f: create_whole(f / "x", b"new", mode=0o600)),
    "first lines": (lambda f: None, lambda f: append_whole(f / "x", b"one\ntwo\n")),
    "more lines": (lambda f: append_whole(f / "x", b"one\n"), lambda f: append_whole(f / "x", b"two\nthree\n")),
    "a folder": (lambda f: None, lambda f: fill(f / "x", "content")),
    "a ledger": (lambda f: None, lambda f: ledger(f / "x")),
}


def check_act(folder: Path, before: Act, act: Act) -> None:
    """Fail at each call in turn."""
    (folder / "whole").mkdir(parents=True)
    before(folder / "whole")
    act(folder / "whole")
    after = contents(folder / "whole")
    for number in range(100):
        here = folder / str(number)
        here.mkdir()
        before(here)
        was = contents(here)
        with failing(number, CODES[number % len(CODES)]) as calls:
            try:
                act(here)
            except NotWritten as error:
                assert str(here / "x") in str(error) and "\n" not in str(error)
                assert os.strerror(CODES[number % len(CODES)]) in str(error)
            else:
                assert len(calls) <= number
        found = {name: content for name, content in contents(here).items() if content or name in after}
        allowed = [was, after, *([{"x": b""}] if act is ACTS["first lines"][1] else [])]  # a file of no lines is whole
        assert found in allowed, number
        if len(calls) <= number:
            assert found == after and number > 0
            return
        act(here)  # with room again
        assert contents(here) == after or (found == after and "x" in found)
    raise AssertionError("it never ended")


@pytest.mark.parametrize("what", sorted(set(ACTS) - {"a ledger", "a file that must not exist"}))
def test_a_write_that_fails_at_any_call_changes_nothing(tmp_path: Path, what: str) -> None:
    check_act(tmp_path, *ACTS[what])


@pytest.mark.parametrize("what", ["a ledger", "a file that must not exist"])
def test_a_new_file_that_could_not_be_written_is_not_in_the_way(tmp_path: Path, what: str) -> None:
    """Nor is it there by half: it can be made once there is room."""
    _, act = ACTS[what]
    for number in range(5):
        here = tmp_path / str(number)
        here.mkdir()
        with failing(number, errno.ENOSPC) as calls:
            if number < 3:
                with pytest.raises(NotWritten, match=r"x, got: No space left on device"):
                    act(here)
                assert contents(here) == {}
                assert len(calls) > number
        if number < 3:
            act(here)
            assert (here / "x").stat().st_size > 0
    with pytest.raises((InputError, FileExistsError)):
        act(here if contents(here) else tmp_path / "0")


def test_what_exists_is_not_created_again(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", "kept")
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "x", b"other")
    assert (tmp_path / "x").read_text() == "kept"


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="no disk"), files.writing(tmp_path):
        raise SafetensorError("no disk at all")
    with pytest.raises(NotWritten, match="No space"), files.writing(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(NotWritten, match="Not a directory"):
        write_whole(tmp_path / "x", "")
        make_folder(tmp_path / "x" / "y")
    with pytest.raises(ValueError, match="mine"), whole_folder(tmp_path / "z") as partial:
        (partial / "half").touch()
        raise ValueError("mine")
    assert not list(tmp_path.glob("z*"))


def in_place(path: Path, content: str | bytes) -> None:
    with files.writing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        files.fill(file, content)


def without_taking_back(path: Path, content: bytes) -> None:
    with files.writing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        files.write_all(file, content)


@contextmanager
def under_its_name(folder: Path) -> Iterator[Path]:
    with files.writing(folder):
        folder.mkdir()
        yield folder


MUTANTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a file that is written where it is read": ("write_whole", in_place, "another file"),
    "lines of which a part stays": ("append_whole", without_taking_back, "more lines"),
    "a folder that is filled under its name": ("whole_folder", under_its_name, "a folder"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_writer_that_leaves_a_half_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    name, wrong, what = MUTANTS[mutant]
    monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises((AssertionError, NotWritten)):
        check_act(tmp_path, *ACTS[what])


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that a write returns is how much the disk took."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:3]))
    append_whole(tmp_path / "x", b"a line of some letters\n")
    write_whole(tmp_path / "y", "a text of some letters")
    assert (tmp_path / "x").read_bytes() == b"a line of some letters\n"
    assert (tmp_path / "y").read_bytes() == b"a text of some letters"
    shutil.rmtree(tmp_path)
