"""No test asserts how long something took: that fails on a busy machine. Count work, or write a benchmark.

A deadline of a loop that waits (`while time.monotonic() < deadline`) is no such assertion: it ends what would hang.
Mutants these rules reject are below: a difference compared at once, through a name, through a call of `timeit`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
# Files whose comparisons of seconds are yet to become counts of work: the list may only get shorter.
ALLOWED = {"tests/data/test_hostile_files.py", "tests/privacy/test_accountant.py", "tests/privacy/test_ledger.py"}


def is_clock(node: ast.AST) -> bool:
    """Whether this is `time.monotonic()`, `perf_counter_ns()` and the like, or a call of timeit."""
    if not isinstance(node, ast.Call):
        return False
    called, owner = node.func, None
    if isinstance(called, ast.Attribute):
        called, owner = ast.Name(called.attr), ast.unparse(called.value)
    name = called.id.removesuffix("_ns") if isinstance(called, ast.Name) else ""
    return owner in (None, "time") and name in CLOCKS or name in ("timeit", "repeat") and owner == "timeit"


def is_elapsed(node: ast.AST, moments: set[str], spans: set[str]) -> bool:
    """Whether an expression holds seconds that passed: a difference from a clock, or a name of one."""
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub):
            if any(is_clock(n) or (isinstance(n, ast.Name) and n.id in moments) for n in ast.walk(part)):
                return True
        if (isinstance(part, ast.Name) and part.id in spans) or (is_clock(part) and "timeit" in ast.unparse(part)):
            return True
    return False


def comparisons_of_seconds(source: str) -> Iterator[int]:
    """Yield the lines on which seconds that passed are compared."""
    if not re.search(r"\b(time|perf_counter|monotonic|process_time|thread_time|timeit)", source):
        return
    for scope in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]:
        moments, spans = set[str](), set[str]()
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
                if is_elapsed(node.value, moments, spans):
                    spans |= names
                elif any(map(is_clock, ast.walk(node.value))):
                    moments |= names
        for node in ast.walk(scope):
            if isinstance(node, ast.Compare) and is_elapsed(node, moments, spans):
                yield node.lineno


def test_no_test_compares_seconds_that_passed() -> None:
    found = {}
    for path in sorted(ROOT.glob("tests/**/*.py")):
        if lines := sorted(set(comparisons_of_seconds(path.read_text(encoding="utf-8")))):
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found.keys() <= ALLOWED, f"{found}: count work instead, or write a benchmark"


SLOW = [
    "start = time.monotonic()\nwork()\nassert time.monotonic() - start < 10",
    "start = perf_counter()\nwork()\nend = perf_counter()\nassert end - start < 1",
    "start = time.perf_counter_ns()\ntook = (time.perf_counter_ns() - start) / 1e9\nassert took < limit",
    "took: float = time.time() - start\nassert 1 > took",
    "took = timeit.timeit(work, number=3)\nassert took < 2",
    "took = []\nif (seconds := time.monotonic() - start) > 3:\n    raise AssertionError",
]
RIGHT = [
    "deadline = time.monotonic() + 60\nwhile time.monotonic() < deadline:\n    pass",
    "assert len(rows) - 1 < 3",
    "seconds = time.monotonic() - start\nprint(seconds)",
    "assert row['time'] - 1 < 2",
]


@pytest.mark.parametrize("body", SLOW + RIGHT)
def test_the_rule_finds_seconds_and_nothing_else(body: str) -> None:
    source = "def test_it():\n" + "\n".join(f"    {line}" for line in body.splitlines())
    assert bool(list(comparisons_of_seconds(source))) == (body in SLOW)
