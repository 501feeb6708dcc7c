"""The house rules of CONTRIBUTING.md, checked on the source text of every module.

ruff says the same while you type (pyproject.toml, TID251), but it exempts a whole file at a time and sees no
lazy import of a house. Here each library has its own list of places, and imports inside functions count.

Mutants this file kills: each snippet of `OFFENCES`, put into a module where it is not allowed.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]
HOUSES = ("simulations", "server", "client")
MAX_LINES = 400
VAGUE_NAMES = {"utils.py", "common.py", "base.py", "types.py", "helpers.py", "misc.py"}

RIVALS = "simulations/bench/rivals/"  # what we are measured against, used as its own users do
# Who may import what. A place is a file, or a folder when it ends in "/".
PLACES = {
    "flwr": ("fedlr/flower/", "server/", "client/", "simulations/flower_run.py", RIVALS),
    "opacus": ("fedlr/privacy/", "fedlr/training/", RIVALS),
    "peft": ("fedlr/models/", RIVALS),
    "hydra": ("fedlr/config/schema.py", "simulations/cli.py", "server/", "client/"),
}
# Never, anywhere: they run code from a file, or write files that only such a reader opens.
NEVER = (
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "numpy.load",
    "torch.load",
    "torch.save",
)
# Rarer ways to the same, of which only this test knows.
NOR_EVER = (
    "_pickle",
    "jsonpickle",
    "numpy.lib.npyio",
    "numpy.lib._npyio_impl",
    "pandas.HDFStore",
    "pandas.read_hdf",
    "pandas.read_pickle",
    "torch.hub",
    "torch.jit.load",
    "torch.package",
    "torch.serialization",
    "yaml.full_load",
    "yaml.unsafe_load",
)
# What of these is reached by name, as in getattr(numpy, "load"), or is given as a word, as in **{"allow_pickle": True}.
BY_NAME = ("load", "save", "read_pickle", "read_hdf", "HDFStore")
READERS = ("read_array", "read_pickle", "to_pickle", "Unpickler", "load_from_checkpoint")

# The rooms of fedlr, the lowest first: each imports its own modules and those of rooms above it in this list.
ROOMS = (
    "errors",
    "streams",
    "files",
    "adapters",
    "privacy",
    "data",
    "tasks",
    "models",
    "methods",
    "training",
    "rounds",
    "config",
    "runs",
    "flower",
)
FRONT_DOOR = ("__init__", "__main__")
RANK = {room: number for number, room in enumerate((*ROOMS, *FRONT_DOOR))}
MOST_ENTRIES = 14
# A round sees a ClientPool, never how a client trains.
NEVER_TOGETHER = {"fedlr/rounds/round.py": "fedlr.training", "fedlr/rounds/cohorts.py": "fedlr.training"}
# Tables of names, which are looked up late and by text: a string there is no import.
TABLES = ("fedlr/config/parts.py", "fedlr/config/old_names.py")
# Flower's simulation starts both apps by name, in processes that import nothing of simulations.
APPS = {"simulations/flower_run.py": ("fedlr.server.app.app", "fedlr.client.app.app")}
RULES = "fedlr.methods.method, fedlr.methods.aggregate.fair, fedlr.methods.finalise.renewal, fedlr.runs.report.wording"
A_NAME = re.compile(r"fedlr(\.\w+)+(:\w+)?")


def names_used(source: str, package: str = "") -> Iterator[str]:
    """Dotted names of everything a module imports, or reaches through an import (`np.load` is numpy.load)."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            folders = package.split(".")
            parents = folders[: len(folders) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield f"{module}.{alias.name}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if (name := dotted(node, bound)) is not None:
                yield name
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[arg, *_]):
                yield str(arg.value) if isinstance(arg, ast.Constant) else "a computed name"


def dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    """Return what a chain of names stands for: `np.lib.npyio.load` is numpy.lib.npyio.load; None for anything else."""
    match node:
        case ast.Name(id=name) if name in bound:
            return bound[name]
        case ast.Attribute(value=value, attr=attr) if (parent := dotted(value, bound)) is not None:
            return f"{parent}.{attr}"
    return None


def unpickling(source: str) -> Iterator[int]:
    """Lines of calls that let a library unpickle: `allow_pickle` that is not False, or a reader of its default."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value == "allow_pickle":
            yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        allowed = [key.value for key in node.keywords if key.arg == "allow_pickle"]
        if any(not (isinstance(value, ast.Constant) and value.value is False) for value in allowed):
            yield node.lineno
        match node.func:
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in READERS:
                yield node.lineno
            case ast.Name(id="getattr"):
                match node.args:
                    case [_, ast.Constant(value=name), *_] if name in (*BY_NAME, *READERS):
                        yield node.lineno


def is_in(place: str, path: str) -> bool:
    return path.startswith(place) if place.endswith("/") else path == place


def within(name: str, banned: str) -> bool:
    return name == banned or name.startswith(f"{banned}.")


def offences(path: str, source: str) -> list[str]:
    """What a module at `path`, relative to the repository, does against the rules."""
    house, *folders = path.split("/")[:-1]
    package = ".".join([house, *folders] if house == "fedlr" else ["fedlr", house, *folders])
    named = set(named_modules(source)) - set(APPS.get(path, ())) if path not in TABLES else set()
    used = sorted({*names_used(source, package), *named})
    found = [f"{path}: {name} is never used" for name in used if any(within(name, ban) for ban in (*NEVER, *NOR_EVER))]
    found += [f"{path}: line {line} allows pickle" for line in unpickling(source)]
    for library, places in PLACES.items():
        if not any(is_in(place, path) for place in places):
            found += [f"{path}: {name}, but {library} stays in {places}" for name in used if within(name, library)]
    for other in set(HOUSES) - {house}:
        names = [name for name in used if within(name, f"fedlr.{other}")]
        found += [f"{path}: {name}, but {house} never imports {other}" for name in names]
    outside = [name for name in used if any(within(name, other) for other in (*HOUSES, "configs"))]
    found += [f"{path}: {name}, but a wheel has it under fedlr only" for name in outside]
    return found + ([o for name in used for o in _against_order(path, name)] if house == "fedlr" else [])


def _against_order(path: str, name: str) -> list[str]:
    """Return what is wrong with a name that a module of fedlr uses: it stands below in the list of rooms."""
    mine, theirs = path.split("/")[1].removesuffix(".py"), (name.split(".") + [""])[1]
    if not within(name, "fedlr") or theirs not in RANK:
        return []
    upwards = RANK[theirs] > RANK.get(mine, -1)
    together = path in NEVER_TOGETHER and within(name, NEVER_TOGETHER[path])
    return [f"{path}: {name}, but imports inside fedlr go down"] if upwards or together else []


def named_modules(source: str) -> Iterator[str]:
    """Names of modules of this project that stand in strings, as `"fedlr.server.app:app"` does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and A_NAME.fullmatch(node.value):
            name = node.value.replace(":", ".")
            parts = name.split(".")
            if any((ROOT / Path(*parts[:end])).with_suffix(".py").is_file() for end in range(2, len(parts) + 1)):
                yield name


def unknown_rooms(entries: Iterable[str]) -> set[str]:
    """Return the entries of fedlr/ that are in no line of the rule."""
    return {entry.removesuffix(".py") for entry in entries} - {*ROOMS, *FRONT_DOOR, "py.typed", "__pycache__"}


def modules() -> list[Path]:
    return sorted(path for house in ("fedlr", *HOUSES) for path in (ROOT / house).rglob("*.py") if path.is_file())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_module_imports_only_what_its_place_allows(path: Path) -> None:
    assert offences(relative(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_module_is_short_and_named_for_what_it_holds(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines: split it by idea"
    assert path.name not in VAGUE_NAMES


def test_every_room_has_its_place_in_the_order_and_there_are_few() -> None:
    links = {path.name for path in (ROOT / "fedlr").iterdir() if path.is_symlink()}
    assert links == {*HOUSES, "configs"}
    entries = {path.name for path in (ROOT / "fedlr").iterdir()} - links
    assert unknown_rooms(entries) == set() and {*ROOMS} <= {entry.removesuffix(".py") for entry in entries}
    assert len(ROOMS) <= MOST_ENTRIES
    assert unknown_rooms([*entries, "helpers.py", "trackers"]) == {"helpers", "trackers"}


def test_linter_exempts_exactly_the_places_of_this_table() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert set(config["flake8-tidy-imports"]["banned-api"]) == {*PLACES, *NEVER}
    houses = {f"fedlr.{house}" for house in HOUSES}
    assert set(config["flake8-tidy-imports"]["banned-module-level-imports"]) == houses
    exempt = {place for place, rules in config["per-file-ignores"].items() if "TID251" in rules}
    expected = {place for places in PLACES.values() for place in places} | {"tests/"}
    assert {place.removesuffix("*") for place in exempt} == expected


OFFENCES = {
    "import pickle": "fedlr/flower/records.py",
    "from pickle import loads": "fedlr/privacy/ledger.py",
    "import torch\nstate = torch.load('x')": "fedlr/models/network.py",
    "import torch as t\nt.save({}, 'x')": "simulations/cli.py",
    "from torch import load": "fedlr/training/local.py",
    "import numpy as np\nread = np.load": "fedlr/data/table.py",
    "import io, numpy as np\nnp.lib.format.read_array(io.BytesIO(b''), allow_pickle=True)": "fedlr/flower/records.py",
    "from numpy.lib.format import read_array\nread_array(file)": "fedlr/flower/records.py",
    "from numpy import lib\nlib.npyio.NpzFile('x', allow_pickle=1)": "fedlr/flower/records.py",
    "import pandas\npandas.read_pickle('x')": "fedlr/data/table.py",
    "import pandas as pd\nread = pd.read_pickle": "fedlr/data/table.py",
    "import numpy as np\ngetattr(np, 'load')('x')": "fedlr/data/table.py",
    "import numpy as np\nnp.lib.npyio.load('x')": "fedlr/data/table.py",
    "import numpy as np\nnp.lib.npyio.NpzFile('x')": "fedlr/data/table.py",
    "def f(read, file):\n    read(file, **{'allow_pickle': True})": "fedlr/data/table.py",
    "def f(array):\n    array.dump('x')\n    array.to_pickle('y')": "fedlr/data/table.py",
    "import torch\ntorch.serialization.load('x')": "fedlr/models/network.py",
    "import torch\ntorch.hub.load('x', 'y')": "fedlr/models/network.py",
    "import torch\ntorch.jit.load('x')": "fedlr/models/network.py",
    "import torch\ntorch.load('x', weights_only=True)": "fedlr/models/network.py",
    "import yaml\nyaml.unsafe_load('x')": "fedlr/runs/plain_yaml.py",
    "import flwr.app": "fedlr/rounds/round.py",
    "from flwr.app import Message": "fedlr/privacy/ledger.py",
    "import opacus": "fedlr/flower/records.py",
    "def f():\n    from opacus.accountants import RDPAccountant": "fedlr/rounds/evaluate.py",
    "from peft import LoraConfig": "fedlr/training/local.py",
    "from hydra.utils import instantiate": "fedlr/rounds/pools/local.py",
    "def f():\n    import fedlr.simulations.cli": "fedlr/config/schema.py",
    "import importlib\nimportlib.import_module('fedlr.simulations.cli')": "fedlr/runs/report/page.py",
    "from fedlr.server import app": "client/app.py",
    "from fedlr import server": "client/app.py",
    "from server import app": "server/cli.py",
    "from fedlr.training import local": "fedlr/rounds/round.py",
    "from fedlr import training": "fedlr/rounds/round.py",
    "from fedlr.rounds.round import run_round": "fedlr/methods/aggregate/mean.py",
    "from ..methods import method": "fedlr/privacy/accountant.py",
    "from fedlr.config.schema import Experiment": "fedlr/rounds/round.py",
    "from fedlr.models.peft_state import read_adapter": "fedlr/adapters/state.py",
    "from fedlr.training.gradients import clip_weights": "fedlr/models/precision.py",
    "APP = 'fedlr.server.app:app'": "fedlr/flower/messages.py",
    "RULE = 'fedlr.config.parts'": "fedlr/privacy/ledger.py",
    "import fedlr.runs.prepare": "fedlr/config/build.py",
}


@pytest.mark.parametrize(("source", "path"), OFFENCES.items())
def test_each_offence_is_found(source: str, path: str) -> None:
    assert offences(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fedlr/privacy/accountant.py", "import opacus\nfrom fedlr.errors import InputError"),
        (
            "fedlr/methods/aggregate/mean.py",
            "from fedlr.models.peft_state import AdapterState\nfrom .fair import x",
        ),
        (
            "fedlr/rounds/round.py",
            "from fedlr.methods.method import Method\nfrom fedlr.methods.measure.diagnostics import x",
        ),
        ("fedlr/config/schema.py", "import hydra\nfrom fedlr.rounds.round import run_round"),
        ("fedlr/data/table.py", "import json\nload = json.load\nimport numpy as np\nnp.loadtxt"),
        ("simulations/cli.py", "from hydra import compose\nfrom fedlr.rounds.pools.local import x\nimport fedlr"),
    ],
)
def test_what_the_design_allows_is_no_offence(path: str, source: str) -> None:
    assert offences(path, source) == []


def test_rules_load_no_framework_and_the_package_loads_nothing() -> None:
    """In one fresh process each, as this one has imported everything."""
    heavy = "{'torch', 'peft', 'transformers', 'flwr', 'opacus', 'hydra', 'pydantic', 'datasets', 'matplotlib'}"
    for imports, allowed in (("fedlr", set[str]()), (RULES, {"torch"})):
        code = f"import sys, {imports}; print(*sorted({heavy} & set(sys.modules)))"
        loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(loaded.stdout.split()) <= allowed, imports


def test_a_wheel_takes_no_name_but_fedlr() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = find_namespace_packages(str(ROOT), include=config["find"]["include"])
    assert {package.partition(".")[0] for package in packages} == {"fedlr"}
    assert {"fedlr.simulations.bench.rivals", "fedlr.server.view", "fedlr.client", "fedlr.configs.data"} <= {*packages}
