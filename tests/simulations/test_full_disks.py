"""A run on a disk that fills up at any of its files: one line, nothing half written, and `resume` ends as if it
had not.

Mutants this file kills: a report that is drawn where it is read, a run that says it is finished before its report is
drawn (`MUTANTS`).
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fedlr.files as files
import fedlr.simulations.resume
import fedlr.simulations.simulate
from fedlr.errors import InputError, PassingError
from fedlr.files import NotWritten, write_whole
from fedlr.privacy.charges import read_ledger
from fedlr.runs.directory import FINISHED, LEDGER
from fedlr.simulations import cli
from fedlr.simulations.resume import resume
from fedlr.simulations.simulate import simulate
from tests.simulations.every_write import FULL, full_from
from tests.simulations.killed_runs import only_run
from tests.simulations.small_runs import experiment, federation, lines

OVERRIDES = ("data.num_examples=80", "cohort_size=2", "num_rounds=1", "num_clients=2", "trainer.num_steps=1")
# Where the disk is full: a part of a path, and how many opens of it before went well.
PLACES = [
    ("asked.yaml", 0),
    ("config.yaml", 0),
    ("versions.json", 0),
    ("partition.json", 0),
    (LEDGER, 0),  # it is made
    (LEDGER, 3),  # a charge
    ("metrics.jsonl", 0),
    ("metrics.jsonl", 1),
    ("clients.jsonl", 0),
    (".round-00000.partial", 0),
    (".round-00001.partial", 0),
    (".round-00001.partial", 1),
    ("privacy.json", 0),
    ("adapter.partial", 0),
    ("summary.json", 0),
    ("report.html", 0),
    ("summary.json", 1),  # that it is finished
]


@contextmanager
def full_at(place: str, number: int) -> Iterator[list[str]]:
    """Let every write to a file fail from its open of that number on, after half of what was written."""
    seen: list[str] = []
    files_full: set[int] = set()
    real_open, real_write, real_mkdir = os.open, os.write, os.mkdir

    def refuse(path: Any) -> bool:
        if place in str(path):
            seen.append(str(path))
        return place in str(path) and len(seen) > number

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        file = real_open(path, flags, *args, **options)
        files_full.discard(file)
        if flags & (os.O_WRONLY | os.O_RDWR) and refuse(path):
            files_full.add(file)
        return file

    def write(file: int, data: bytes) -> int:
        if file in files_full:
            real_write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, data)

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        if place.endswith(".partial") and "adapter" in place and refuse(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_mkdir(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, call in (("open", opened), ("write", write), ("mkdir", mkdir)):
            patch.setattr(os, name, call)
        yield seen


def drawn(run_dir: Path) -> Path:
    """Stand for the report, which takes most of a tiny run's time, and is written as it is."""
    write_whole(run_dir / "report.html", "<html>" + "a picture " * 100 + "</html>")
    return run_dir / "report.html"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assemble the federation once: it is the same for all these runs."""
    f = federation(*OVERRIDES)

    def assembled(e: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(f, experiment=e)

    for module in (fedlr.simulations.simulate, fedlr.simulations.resume):
        monkeypatch.setattr(module, "assemble", assembled)
        monkeypatch.setattr(module, "write_report", drawn)


def begin(folder: Path) -> Path:
    return simulate(experiment(*OVERRIDES, f"tracking.output_dir={folder}", "seed=0"), say=lambda line: None)


def outcome(run_dir: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "clients.jsonl"):
        found[name] = lines(run_dir / name)
    for name in ("summary.json", "privacy.json", "partition.json"):
        content = json.loads((run_dir / name).read_text(encoding="utf-8"))
        found[name] = {
            key: value for key, value in content.items() if key not in ("seconds", "ledger_head", "num_torn_rows")
        }
    found["adapter"] = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    found["files"] = sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))
    charges = read_ledger(run_dir / LEDGER)[1].by_client
    found[LEDGER] = {client: {n: charge.steps for n, charge in rounds.items()} for client, rounds in charges.items()}
    return found


def check_whole(run_dir: Path) -> None:
    """Every file there is can be read to its end."""
    assert not [path for path in run_dir.rglob("*partial*") if path.is_file()]
    for path in run_dir.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl" and path.name != LEDGER:  # whose last line may be torn, and is kept as such
            assert path.read_bytes()[-1:] in (b"\n", b"")
    if (run_dir / "report.html").exists():
        assert (run_dir / "report.html").read_text().endswith("</html>")


def check_place(folder: Path, place: str, number: int, expected: Mapping[str, Any]) -> None:
    with full_at(place, number) as seen, pytest.raises(InputError) as told:
        begin(folder)
    assert len(seen) > number and isinstance(told.value, NotWritten), (place, number)
    assert "\n" not in str(told.value) and "No space left on device" in str(told.value)
    assert place.strip(".").partition(".")[0] in str(told.value)
    run_dir = only_run(folder)
    check_whole(run_dir)
    has_checkpoint = any((run_dir / "checkpoints").glob("round-*")) if (run_dir / "checkpoints").exists() else False
    if not has_checkpoint:
        with pytest.raises(InputError, match=r"config\.yaml|start the run anew"):
            resume(run_dir, say=lambda line: None)
        return
    resume(run_dir, say=lambda line: None)
    assert outcome(run_dir) == expected, (place, number)
    with pytest.raises(InputError, match="which is finished"):
        resume(run_dir, say=lambda line: None)


def test_a_disk_that_is_full_at_any_file_leaves_a_run_to_go_on_with(tmp_path: Path, quick: None) -> None:
    expected = outcome(begin(tmp_path / "whole"))
    assert expected["summary.json"][FINISHED] is True
    for index, (place, number) in enumerate(PLACES):
        check_place(tmp_path / str(index), place, number, expected)


def check_write(folder: Path, number: int, expected: Mapping[str, Any], *, num_refused: float) -> int:
    """Return how many calls of a run change the disk, where from the call of that number on so many fail."""
    with full_from(number, folder, num_refused=num_refused) as calls:
        try:
            begin(folder)
        except InputError as error:
            assert "\n" not in str(error) and FULL in str(error), calls[number]
            assert error.exit_code == PassingError.exit_code, (calls[number], str(error))
        else:
            assert len(calls) <= number, calls[number]
    runs = list(folder.glob("*/*/"))
    if not runs:
        return len(calls)
    check_whole(runs[0])
    try:
        resume(runs[0], say=lambda line: None)
    except InputError as error:
        assert number < FIRST_CHECKPOINT or "which is finished" in str(error), (calls[number], str(error))
        assert "\n" not in str(error)
        if "which is finished" not in str(error):
            return len(calls)
    assert outcome(runs[0]) == expected, calls[number]
    return len(calls)


FIRST_CHECKPOINT = 45  # calls, before there is a whole one


@pytest.mark.slow
@pytest.mark.parametrize("num_refused", [1, math.inf], ids=["for a moment", "for good"])
def test_a_disk_that_is_full_at_any_write_leaves_a_run_to_go_on_with(
    tmp_path: Path, quick: None, num_refused: float
) -> None:
    expected = outcome(begin(tmp_path / "whole"))
    number = 0
    while check_write(tmp_path / str(number), number, expected, num_refused=num_refused) > number:
        number += 1
    assert number > 2 * FIRST_CHECKPOINT


def finished_first(run_dir: Path, summary: Mapping[str, Any], *, draw: Callable[[Path], object]) -> None:
    files.write_whole(run_dir / "summary.json", json.dumps({**summary, FINISHED: True}))
    draw(run_dir)


def in_place(run_dir: Path) -> None:
    with files.writing(run_dir / "report.html"):
        file = os.open(run_dir / "report.html", os.O_WRONLY | os.O_CREAT)
        files.fill(file, "<html>" + "a picture " * 100 + "</html>")


MUTANTS: dict[str, tuple[str, Any, tuple[str, int]]] = {
    "finished before its report is drawn": (
        "fedlr.simulations.simulate.finish_run",
        finished_first,
        ("report.html", 0),
    ),
    "a report that is drawn where it is read": (
        "fedlr.simulations.simulate.write_report",
        in_place,
        ("report.html", 0),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_run_that_hides_what_is_left_to_do_is_seen(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    expected = outcome(begin(tmp_path / "whole"))
    name, wrong, (place, number) = MUTANTS[mutant]
    monkeypatch.setattr(name, wrong)
    with pytest.raises((AssertionError, InputError)):
        check_place(tmp_path / "mutant", place, number, expected)


def test_a_run_of_before_is_finished_when_it_has_a_report(tmp_path: Path, quick: None) -> None:
    run_dir = begin(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    del summary[FINISHED]
    write_whole(run_dir / "summary.json", json.dumps(summary))
    with pytest.raises(InputError, match="which is finished"):
        resume(run_dir, say=lambda line: None)
    (run_dir / "report.html").unlink()
    resume(run_dir, say=lambda line: None)
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) == {**summary, FINISHED: True}


def test_the_command_says_it_in_one_line(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlr.simulations.cli.ready", lambda overrides: experiment(*overrides))
    words = [*OVERRIDES, f"tracking.output_dir={tmp_path}", "seed=0"]
    with full_at("clients.jsonl", 0):
        assert cli.simulate(words) == 75  # it goes on once there is room
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "clients.jsonl, got: No space left on device" in told
