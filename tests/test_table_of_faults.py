"""The log's table of faults: each row of the list has a line, and the tests that hold it exist under their names."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
LOG = TESTS.parent / "docs" / "log.md"
HEAD = "| row | cause | test | old |"
ROWS = {f"{kind}{number}" for kind, last in {"P": 8, "S": 4, "R": 20, "O": 11}.items() for number in range(1, last + 1)}
NAMED = re.compile(r"((?:\w+/)*test_\w+\.py)(?:::(test_\w+))?")


def table() -> list[list[str]]:
    """Return the cells of each line: row, cause, test, how the old code failed."""
    lines = LOG.read_text(encoding="utf-8").partition(HEAD)[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def test_every_row_of_the_list_has_a_line() -> None:
    found = {row for cells in table() for row in re.findall(r"\b[PSRO]\d+\b", cells[0])}
    assert found == ROWS


def test_every_line_names_tests_that_exist() -> None:
    missing = []
    for row, _, tests, _ in table():
        named = NAMED.findall(tests)
        assert named, row
        for path, name in named:
            text = (TESTS / path).read_text(encoding="utf-8") if (TESTS / path).is_file() else None
            if text is None or (name and f"def {name}(" not in text):
                missing.append((row, path, name))
    assert missing == []
