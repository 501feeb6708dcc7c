"""`fedlr bench`: measure, print the table of goals, leave JSON and pictures behind."""

import difflib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.simulations.cli import command, say

DEFAULT_FOLDER = Path("outputs/bench")
ALL, DOCUMENT = "all", "docs"


@command
def bench(arguments: list[str]) -> None:
    """Measure ours against its rivals: fedlr bench NAME|all [--quick] [--out DIR]

    NAME: step, cohort, round, memory, overhead, parity, aggregate, noise, robust, federation, gpu, profile; several may
    be given. Each writes DIR/NAME.json with every raw time, the machine and the versions; then the table of goals is
    printed and drawn from all results in DIR. `fedlr bench docs --out DIR` writes them into docs/performance.md and
    docs/robustness.md.
    --quick   fewer turns: all of it in about 15 minutes on two cores
    --out     where results go, and replace older ones of the same name; default outputs/bench
    """
    names, quick, folder = parse(arguments)
    go_offline(True)
    from fedlr.simulations.bench.report import draw, fill_document, table_text
    from fedlr.simulations.bench.settings import Settings, scratch_root

    if names == [DOCUMENT]:
        for path in fill_document(folder):
            say(str(path))
        return
    failed = []
    with tempfile.TemporaryDirectory(dir=scratch_root(), prefix="fedlr-bench-") as scratch:
        settings = Settings("quick" if quick else "full", Path(scratch), say)
        for name in names:
            if reason := run_one(name, settings, folder):
                failed.append(name)
                say(f"  failed: {reason}")
    say("\n" + table_text(folder))
    for path in draw(folder):
        say(str(path))
    if failed:
        raise InputError(f"{', '.join(failed)} failed; the reasons are above, and older results of theirs are gone")


def parse(arguments: Sequence[str]) -> tuple[list[str], bool, Path]:
    """Return the benchmarks to run, whether quickly, and the folder of the results.

    >>> parse(["step", "parity", "--quick"])
    (['step', 'parity'], True, PosixPath('outputs/bench'))
    """
    from fedlr.simulations.bench.registry import BENCHMARKS

    words, quick, folder = list(arguments), False, DEFAULT_FOLDER
    if "--out" in words:
        place = words.index("--out")
        if place + 1 == len(words):
            raise InputError("Expected a folder after --out, got none")
        folder = Path(words.pop(place + 1))
        words.pop(place)
    while "--quick" in words:
        words.remove("--quick")
        quick = True
    known = [*BENCHMARKS, ALL, DOCUMENT]
    if not words:
        raise InputError(f"Expected the name of a benchmark ({', '.join(known)}), got none")
    for word in words:
        if word not in known:
            nearest = difflib.get_close_matches(word, known, n=1)
            raise InputError(f"Expected {' or '.join(nearest) or ', '.join(known)}, got {word!r}")
    if len(words) > 1 and {ALL, DOCUMENT} & set(words):
        raise InputError(f"Expected {ALL} or {DOCUMENT} alone, got {' '.join(words)}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected --out to be a folder, got {str(folder)!r}, which is a file")
    return (list(BENCHMARKS) if words == [ALL] else words), quick, folder


def run_one(name: str, settings: object, folder: Path) -> str:
    """Run one benchmark and write its result; return why it failed, or nothing."""
    from fedlr.simulations.bench.machine import about
    from fedlr.simulations.bench.outcome import BenchmarkFailed, Outcome, write_outcome
    from fedlr.simulations.bench.registry import BENCHMARKS, benchmark
    from fedlr.simulations.bench.settings import Settings

    assert isinstance(settings, Settings)
    say(f"{name}: {BENCHMARKS[name]}")
    before, started = about(), time.perf_counter()
    reason = ""
    try:
        outcome = benchmark(name)(settings)
    except BenchmarkFailed as error:
        # What an earlier run measured must not stand where this one found contestants that disagree.
        reason = str(error)
        outcome = Outcome(name, not_run=f"failed: {reason}")
    seconds = time.perf_counter() - started
    about_it = {**before, "size": settings.size, "seconds": round(seconds, 1)}
    write_outcome(folder, replace(outcome, name=name), about=about_it)
    say(f"  {seconds:.0f} s" + (f", not run: {outcome.not_run}" if outcome.not_run and not reason else ""))
    return reason
