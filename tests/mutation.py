"""Mutants of a module, one change each, and which its tests let pass.

make mutants MODULE=fedlr.privacy.grid TESTS="tests/privacy/test_grid.py" MOST=60

Every comparison, sum, product, number, `and`, `or`, `not`, choice, `min` and `max` of its functions is changed by
itself. A mutant is a fork of a process that has imported everything: the changed code is put under the functions that
are there, whoever imported them, and the tests run until the first that fails. Survivors are printed with their line.
Not changed: numbers at the module's top, messages, defaults of arguments.
"""

import ast
import contextlib
import copy
import importlib
import inspect
import io
import os
import random
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all"}
LIMIT_S = 120
SILENT = (ast.JoinedStr, ast.Raise, ast.Assert)  # messages and types are no behaviour


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield each node that one of a node's fields may become."""
    found = copy.copy(node)
    match node:
        case ast.Compare(ops=[op, *others]) if type(op) in SWAPS:
            found.ops = [SWAPS[type(op)](), *others]  # type: ignore[attr-defined]
            yield found
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            found.op = SWAPS[type(op)]()  # type: ignore[attr-defined]
            yield found
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=value) if type(value) in (int, float):
            yield ast.copy_location(ast.Constant(value + 1), node)
        case ast.Constant(value=bool() as value):
            yield ast.copy_location(ast.Constant(not value), node)
        case ast.IfExp():
            found.body, found.orelse = node.orelse, node.body  # type: ignore[attr-defined]
            yield found
        case ast.Name(id=name) if name in NAMES:
            yield ast.copy_location(ast.Name(NAMES[name], ast.Load()), node)


def mutants(tree: ast.Module) -> Iterator[tuple[int, ast.Module]]:
    """Yield line and tree of each mutant: one node in the body of one function is another."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[int, ast.Module]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
                continue
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if not isinstance(item, ast.AST) or isinstance(item, SILENT):
                    continue
                for changed in changes(item) if inside else ():
                    before = items[index]
                    if isinstance(value, list):
                        value[index] = changed
                    else:
                        setattr(node, name, changed)
                    yield getattr(item, "lineno", 0), tree
                    if isinstance(value, list):
                        value[index] = before
                    else:
                        setattr(node, name, before)
                yield from visit(item, inside or isinstance(item, ast.FunctionDef))

    yield from visit(tree, False)


def functions(scope: Any, module: str) -> dict[str, types.FunctionType]:
    """Return the functions of a module or class by qualified name, without what wraps them."""
    found = {}
    for value in list(vars(scope).values()):
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        value = inspect.unwrap(value) if callable(value) else value
        if getattr(value, "__module__", None) != module:
            continue
        if isinstance(value, types.FunctionType):
            found[value.__qualname__] = value
        elif isinstance(value, type) and value is not scope:
            found |= functions(value, module)
    return found


def put_under(module: types.ModuleType, tree: ast.Module) -> None:
    """Make the functions of a module do what a changed tree says."""
    scratch = types.ModuleType(module.__name__)
    scratch.__dict__.update({k: v for k, v in vars(module).items() if k.startswith("__")})
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), scratch.__dict__)
    originals = functions(module, module.__name__)
    for name, function in functions(scratch, module.__name__).items():
        if name in originals and len(originals[name].__code__.co_freevars) == len(function.__code__.co_freevars):
            originals[name].__code__ = function.__code__
    for value in vars(module).values():
        getattr(value, "cache_clear", lambda: None)()


def survives(module: types.ModuleType, tree: ast.Module, tests: list[str]) -> bool:
    """Return whether all tests pass, in a fork whose module is changed; one that hangs is killed, and does not."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            put_under(module, tree)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                status = pytest.main([*tests, "-x", "-q", "--no-header", "-p", "no:cacheprovider"])
        except BaseException:
            status = 1
        os._exit(int(status))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(name: str, tests: list[str], *, most: int, limit_s: float) -> int:
    """Try mutants of a module, `most` of them drawn at random, while there is time; return how many survived."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    number = sum(1 for _ in mutants(tree))
    chosen = set(random.Random(0).sample(range(number), min(most, number)))
    tried, until = 0, time.monotonic() + limit_s
    if pytest.main([*tests, "-q", "--no-header", "-p", "no:cacheprovider"]):
        raise SystemExit("Expected tests that pass, got a failure")
    if not survives(module, tree, tests):  # else every mutant would count as killed, whatever the tests ask
        raise SystemExit(
            f"Expected tests that pass with {name} read a second time, got a failure: it cannot be changed"
        )
    survivors = 0
    for index, (line, changed) in enumerate(mutants(tree)):
        if index not in chosen or time.monotonic() > until:
            continue
        tried += 1
        if survives(module, changed, tests):
            survivors += 1
            print(f"survived: {module.__file__}:{line}: {ast.unparse(_statement(changed, line))}", flush=True)
    print(f"{name}: {tried - survivors} of {tried} mutants killed ({number} there are)")
    return survivors


def _statement(tree: ast.Module, line: int) -> ast.AST:
    found = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or 0)]
    return min(found, key=lambda n: (n.end_lineno or 0) - n.lineno)


if __name__ == "__main__":
    raise SystemExit(
        bool(
            main(
                sys.argv[1],
                sys.argv[2:],
                most=int(os.environ.get("MOST", "60")),
                limit_s=float(os.environ.get("WITHIN_S", "600")),
            )
        )
    )
