"""`fedlr adapters`: measure every tuner of the registry, and compare the figures with what the registry declares."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.simulations.cli import command, say

if TYPE_CHECKING:
    from fedlr.models.tuners import Tuner
    from fedlr.simulations.tuner_measure.measure import Figures

MEASURED, REFUSED_PART = "adapters", "refused"
COLUMNS = ("name", "form", "all blocks", "one block alone", "gradients by", "off by", "trained", "shipped once")


@command
def adapters(arguments: list[str]) -> None:
    """Measure every adapter of the registry: fedlr adapters [NAME ...] [--out FILE.md]

    Exactness of averaging and per-example gradients, of each on a small network; seconds for all. Fails if a
    figure says otherwise than the registry.
    --out     fill the tables of this document (docs/adapters.md); not with NAME
    """
    names, document = parse(arguments)
    go_offline(True)
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # of torch, for every sparse tensor
    from fedlr.models.tuners.registry import REFUSED, TUNERS, tuner
    from fedlr.simulations.tuner_measure.measure import disagreements, measure

    chosen = {name: tuner(name) for name in names or TUNERS}
    found = {name: measure(entry) for name, entry in chosen.items()}
    say(text_table([COLUMNS, *(plain_row(name, chosen[name], found[name]) for name in chosen)]))
    wrong = [line for name in chosen for line in disagreements(chosen[name], found[name])]
    if wrong:
        raise InputError("the registry and the figures disagree:\n  " + "\n  ".join(wrong))
    if document is not None:
        fill(document, {MEASURED: measured_table(chosen, found), REFUSED_PART: refused_table(REFUSED)})
        say(str(document))


def parse(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the names to measure (none: all) and the document to fill, if any.

    >>> parse(["--out", "docs/adapters.md"])
    ([], PosixPath('docs/adapters.md'))
    """
    words, document = list(arguments), None
    if "--out" in words:
        place = words.index("--out")
        if place + 1 == len(words):
            raise InputError("Expected a file after --out, got none")
        document = Path(words.pop(place + 1))
        words.pop(place)
        check_document(document)
    if flags := [word for word in words if word.startswith("-")]:
        raise InputError(f"Expected names of adapters or --out FILE.md, got {flags[0]!r}")
    if words and document is not None:
        raise InputError(f"Expected --out for all adapters, got it with {' '.join(words)}; leave the names out")
    return words, document


def check_document(document: Path) -> str:
    """Return the document's text.

    Raises:
        InputError: if it is no file, or has no place for a table.
    """
    if not document.is_file():
        raise InputError(f"Expected --out to be a document with places for the tables, got {str(document)!r}, no file")
    text = document.read_text(encoding="utf-8")
    for name in (MEASURED, REFUSED_PART):
        start, end = marks(name)
        if text.count(start) != 1 or text.partition(start)[2].count(end) != 1:
            raise InputError(f"Expected {document.name} to hold {start} and {end} once, in this order")
    return text


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a table of the document stands."""
    return f"<!-- {name}: written by fedlr adapters -->", f"<!-- end of {name} -->"


def fill(document: Path, tables: Mapping[str, str]) -> None:
    """Write the tables into the document, each between its marks."""
    text = check_document(document)
    for name, table in tables.items():
        start, end = marks(name)
        before, _, rest = text.partition(start)
        text = before + "\n\n".join([start, table, end]) + rest.partition(end)[2]
    write_whole(document, text)


def measured_table(tuners: "Mapping[str, Tuner]", figures: "Mapping[str, Figures]") -> str:
    """Return the table of the document, one line a tuner."""
    columns = (COLUMNS[0], "system", *COLUMNS[1:], "source", "note")
    lines = [columns, tuple("---" for _ in columns)]
    for name, entry in tuners.items():
        first, *others = plain_row(name, entry, figures[name])
        lines.append((f"`{first}`", entry.title, *others, entry.source, entry.note))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def refused_table(refused: Mapping[str, str]) -> str:
    """Return the table of what is refused, one line a name."""
    return "\n".join(["| name | why |", "| --- | --- |", *(f"| `{name}` | {why} |" for name, why in refused.items())])


def plain_row(name: str, entry: "Tuner", figures: "Figures") -> tuple[str, ...]:
    """Return the cells of one tuner, in the order of `COLUMNS`."""
    from fedlr.simulations.tuner_measure.measure import ALL_BLOCKS

    alone = [f"{block} {error:.0e}" for block, error in figures.exactness.items() if block != ALL_BLOCKS]
    shipped = ", ".join(entry.ships) + f" ({figures.num_shipped} values)" if entry.ships else "nothing"
    return (
        name,
        entry.form,
        f"{figures.exactness[ALL_BLOCKS]:.0e}",
        ", ".join(alone) or "the only one",
        entry.path,
        f"{figures.gradients:.0e}",
        str(figures.num_trained),
        f"{shipped}; {entry.rebuilt}" if entry.rebuilt else shipped,
    )


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines with their cells in columns.

    >>> print(text_table([("a", "bc"), ("abc", "d")]))
    a    bc
    abc  d
    """
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
