"""From the results in a folder to the table of goals, the pictures, and docs/performance.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.runs.report.svg import standing_alone
from fedlr.simulations.bench.flame import flame_svg
from fedlr.simulations.bench.goals import GOALS, Goal
from fedlr.simulations.bench.outcome import Measure, Outcome, read_outcome
from fedlr.simulations.bench.pictures import goals_picture, step_picture
from fedlr.simulations.bench.profile import colour_of
from fedlr.simulations.bench.registry import BENCHMARKS
from fedlr.simulations.bench.robust_table import read_played, robust_picture
from fedlr.simulations.bench.robust_table import table_markdown as played_markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"
FLAME = "performance-flame.svg"
GOALS_PICTURE, STEP_PICTURE = "performance-goals.svg", "performance-step.svg"
ROBUST, ROBUST_PICTURE = "robust", "robustness.svg"
PARTS_OF_DOCUMENT = ("goals", "profile", "details")


Results = dict[str, tuple[Outcome, dict[str, Any]]]  # by benchmark: what it measured, and on what


def read_all(folder: Path) -> Results:
    """Return the results of a folder by benchmark, in the order of the registry.

    Raises:
        InputError: if there is none.
    """
    found = {name: read_outcome(folder / f"{name}.json") for name in BENCHMARKS if (folder / f"{name}.json").exists()}
    if not found:
        raise InputError(f"Expected results of `fedlr bench` in {str(folder)!r}, got none")
    return found


def rows(found: Results) -> list[tuple[Goal, Measure | None, str]]:
    """Return each goal with its measure, or with why there is none."""
    measures = {measure.key: measure for outcome, _ in found.values() for measure in outcome.measures}
    lines = []
    for goal in GOALS:
        name = goal.key.partition("-")[0]
        why = found[name][0].not_run if name in found else "not measured"
        lines.append((goal, measures.get(goal.key), why or "not measured"))
    return lines


def value_text(value: float, unit: str) -> str:
    """Return a number as the table shows it.

    >>> value_text(2.2049, " x"), value_text(3.1e-7, ""), value_text(0.0123, " ms")
    ('2.20 x', '3.1e-07', '0.0123 ms')
    """
    if abs(value) >= 100:
        return f"{value:,.0f}{unit}"
    short = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return short + unit


def cells(goal: Goal, measure: Measure | None, why: str) -> tuple[str, str, str, str, str]:
    """Return what is shown of one goal: text, goal, value, spread, whether reached."""
    bound = f"{goal.kind} {value_text(goal.bound, goal.unit)}"
    if measure is None:
        return goal.text, bound, f"not run: {why}" if why.startswith("no ") else why, "", ""
    return goal.text, bound, *figures(measure), "yes" if measure.reached else "no"


def figures(measure: Measure) -> tuple[str, str]:
    """Return a measure's median, and its quartiles with the number of values."""
    s, number = measure.spread, len(measure.values)
    quartiles = f"{value_text(s.lower, '')} to {value_text(s.upper, '')} ({number})" if number > 1 else "1 value"
    return value_text(s.median, measure.goal.unit if measure.goal else measure.unit), quartiles


HEADERS = ("measure", "goal", "median", "quartiles (values)", "reached")


def table_text(folder: Path) -> str:
    """Return the goals with what was reached, as aligned text."""
    table = [HEADERS, *(cells(*row) for row in rows(read_all(folder)))]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADERS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def table_markdown(folder: Path) -> str:
    """Return the same table in Markdown, with the machine below."""
    found = read_all(folder)
    lines = [HEADERS, tuple("---" for _ in HEADERS), *(cells(*row) for row in rows(found))]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    return f"{table}\n\n{machine_text([about for _, about in found.values()])}"


def machine_text(abouts: Sequence[dict[str, Any]]) -> str:
    """Say on what, with what and how thoroughly the results were measured."""
    first = abouts[0]
    machine, versions = first["machine"], first["versions"]
    loads = [about["machine"]["load_average"][0] for about in abouts]
    commits = sorted({str(about["git"]) for about in abouts})
    sizes = " and ".join(sorted({str(about["size"]) for about in abouts}))
    names = ("python", "torch", "opacus", "peft", "transformers", "flwr", "ray")
    used = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    return (
        f"Measured on {machine['cores']} cores of {machine['processor']}, {machine['memory_gb']:g} GB, "
        f"{machine['vector_unit']}, GPU: {machine['gpu'] or 'none'}; {used}; {sizes} turns; "
        f"commit {', '.join(commits)}; {min(a['time'] for a in abouts)[:10]}. Load of the machine when the benchmarks "
        f"began: {min(loads):g} to {max(loads):g}."
    )


def draw(folder: Path) -> list[Path]:
    """Draw what the results in a folder allow; return the files."""
    found = read_all(folder)
    pictures = {GOALS_PICTURE: goals_picture(rows(found))}
    if "step" in found and found["step"][0].measures:
        pictures[STEP_PICTURE] = step_picture(found["step"][0])
    if ROBUST in found and read_played(found[ROBUST][0]):
        pictures[ROBUST_PICTURE] = robust_picture(found[ROBUST][0])
    drawn = []
    for name, picture in pictures.items():
        if picture.svg is not None:
            write_whole(folder / name, standing_alone(picture.svg))
            drawn.append(folder / name)
    if "profile" in found and (stacks := found["profile"][0].raw.get("stacks")):
        by_stack = {tuple(line.split(";")): seconds for line, seconds in stacks.items()}
        title = "A private step of a cohort: time by function, outermost on top"
        write_whole(folder / FLAME, flame_svg(by_stack, title=title, category=colour_of))
        drawn.append(folder / FLAME)
    return drawn


def fill_document(folder: Path) -> list[Path]:
    """Write the tables of a folder's results into docs/performance.md and docs/robustness.md, and the pictures beside
    them; a document that no result is of stays as it is.

    Raises:
        InputError: outside a checkout, or if a document has no place for a table.
    """
    found = read_all(folder)
    tables: dict[str, dict[str, str]] = {}
    if found.keys() - {ROBUST}:
        goals, profile, details = table_markdown(folder), profile_markdown(found), details_markdown(found)
        tables["performance.md"] = {"goals": goals, "profile": profile, "details": details}
    if ROBUST in found and (played := read_played(found[ROBUST][0])):
        machine = machine_text([found[ROBUST][1]])
        tables["robustness.md"] = {ROBUST: f"{played_markdown(played)}\n\n{machine}"}
    documents = [_filled(DOCS / name, parts) for name, parts in tables.items()]
    pictures = []
    for path in draw(folder):
        if found.keys() - {ROBUST} or path.name == ROBUST_PICTURE:
            write_whole(DOCS / path.name, path.read_text(encoding="utf-8"))
            pictures.append(DOCS / path.name)
    return [*documents, *pictures]


def _filled(document: Path, tables: dict[str, str]) -> Path:
    """Write tables between their marks in a document."""
    if not document.is_file():
        raise InputError(f"Expected docs/{document.name} of a checkout, got none at {document}")
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = marks(name)
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        if text.count(start) != 1 or rest.count(end) != 1:
            raise InputError(f"Expected {document.name} to hold {start} and {end} once, in this order")
        text = before + "\n\n".join([start, table, end]) + after
    write_whole(document, text)
    return document


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which `fedlr bench docs` writes one of `PARTS_OF_DOCUMENT`."""
    return f"<!-- {name}: written by fedlr bench docs -->", f"<!-- end of {name} -->"


def profile_markdown(found: Results) -> str:
    """Return where the time of a step goes, largest part first."""
    if "profile" not in found or not found["profile"][0].measures:
        return "Not measured."
    measures = found["profile"][0].measures
    shares = [m for m in measures if m.key.startswith("share: ")]
    lines = ["| part of a cohort's step | share |", "| --- | --- |"]
    for measure in sorted(shares, key=lambda m: -m.spread.median):
        lines.append(f"| {measure.key.removeprefix('share: ')} | {100 * measure.spread.median:.1f} % |")
    lines += ["", "| one client's step, relative to our private step | time |", "| --- | --- |"]
    for measure in measures:
        if measure.key.startswith("floor: "):
            lines.append(f"| {measure.key.removeprefix('floor: ')} | {value_text(measure.spread.median, '')} |")
    return "\n".join([*lines, "| our private step | 1.00 |"])


def details_markdown(found: Results) -> str:
    """Return the figures that have no goal, apart from those of a picture."""
    lines = ["| measure | median | quartiles (values) |", "| --- | --- | --- |"]
    for name, (outcome, _) in found.items():
        if name != "profile":
            for measure in outcome.measures:
                if measure.goal is None and " / " not in measure.key:
                    lines.append(f"| {measure.text} | {' | '.join(figures(measure))} |")
    return "\n".join(lines)
