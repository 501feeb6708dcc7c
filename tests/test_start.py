"""A run starts without the libraries that it needs only later, or never.

The import graph is read, not run: imports inside functions are later ones.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTS = (
    "fedlr.simulations.cli",
    "fedlr.simulations.plan",
    "fedlr.simulations.simulate",
    "fedlr.simulations.sweep",
    "fedlr.config.build",
)
LATER = {"matplotlib", "flwr", "ray", "pandas", "datasets"}


def file_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Names of what a module imports while it is loaded."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from at_once([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from at_once([*node.body, *node.orelse, *node.finalbody])


def loaded_by(start: str) -> dict[str, str]:
    """Return all that a module loads, by name, and who asked for it."""
    found, waiting = {start: "the start"}, [start]
    while waiting:
        module = waiting.pop()
        if (path := file_of(module)) is None:
            continue
        for name in at_once(ast.parse(path.read_text(encoding="utf-8")).body):
            parts = name.split(".")
            for one in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if one not in found:
                    found[one] = module
                    waiting.append(one)
    return found


@pytest.mark.parametrize("start", STARTS)
def test_a_start_loads_no_pictures_no_flower_and_no_ray(start: str) -> None:
    found = loaded_by(start)
    assert "torch" in found or start == "fedlr.simulations.cli"
    assert {name: found[name] for name in LATER & found.keys()} == {}


def test_the_graph_sees_what_is_loaded() -> None:
    assert "matplotlib" in loaded_by("fedlr.runs.report.page") and "flwr" in loaded_by("fedlr.flower.records")
