"""Run directories that somebody edited by hand, or a crash tore: one line from every reader, and never a traceback.

What is hashed is hashed anew here, so that it is the content which is found wrong, and not the hash.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlr.runs.plain_yaml
import fedlr.runs.report.picture
import fedlr.runs.report.records
import fedlr.runs.report.run_files
import fedlr.simulations.resume
import fedlr.simulations.simulate
from fedlr.adapters.state import AdapterState, Slot
from fedlr.errors import InputError
from fedlr.models.products import library_of
from fedlr.privacy.statement import recompute
from fedlr.runs.directory import CHECKPOINTS, IDENTITY, LEDGER, write_json
from fedlr.runs.report import comparison_table
from fedlr.runs.report.page import report_page
from fedlr.runs.report.run_files import read_run
from fedlr.runs.verified_folder import read_sealed, write_sealed
from fedlr.server.run import Run
from fedlr.simulations.resume import resume
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import experiment, federation

OVERRIDES = ("data.num_examples=80", "cohort_size=2", "num_rounds=2", "num_clients=2", "trainer.num_steps=1")
# What a whole file may become.
RAW = (
    b"",
    b"[]",
    b"null",
    b"{}",
    b"{",
    b'"x"',
    b"[]\n[]\n",
    b"\xff\xfe\0junk",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5_000,
    b"{}\n{}\n",
)
# What a value may become.
VALUES: tuple[Any, ...] = (
    [], {}, "x", None, True, math.inf, math.nan, -1, 0, 10**30, 10**400, 1e308, [[1]], {"a": "b"}, ["a"], [None]
)  # fmt: skip
REPORTED = (
    "summary.json",
    "metrics.jsonl",
    "clients.jsonl",
    "privacy.json",
    "versions.json",
    "partition.json",
    "config.yaml",
    "adapter/adapter_config.json",
    "baselines/alone.json",
    LEDGER,
)
NUM_CHANGES = 300  # of single values, drawn from some thousands


class Cut(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs of the same federation: `finished`, and `killed` after its first round."""
    folder, f = tmp_path_factory.mktemp("runs"), federation(*OVERRIDES)
    with pytest.MonkeyPatch.context() as patch:
        for module in (fedlr.simulations.simulate, fedlr.simulations.resume):
            patch.setattr(module, "assemble", lambda e, **options: replace(f, experiment=e))
            patch.setattr(module, "write_report", read_run)
        patch.setattr(fedlr.runs.report.picture, "inline_svg", lambda name, title, paint, **size: "<svg/>")
        for module in (fedlr.runs.report.run_files, fedlr.runs.report.records):
            patch.setattr(module, "plain_yaml", parsed_once(fedlr.runs.plain_yaml.plain_yaml))
        begun = experiment(*OVERRIDES, f"tracking.output_dir={folder / 'x'}", "seed=0")
        simulate(begun, say=lambda line: None).rename(folder / "finished")
        (folder / "finished" / "baselines").mkdir()
        clients = [{"client_id": client, "accuracy": 0.5, "epsilon": 1.0} for client in range(2)]
        write_json(folder / "finished" / "baselines" / "alone.json", {"privacy": "dp", "clients": clients})
        with patch.context() as dying, pytest.raises(Cut):
            dying.setattr(fedlr.simulations.simulate, "metrics_row", dies_at(3, fedlr.simulations.simulate.metrics_row))
            simulate(begun, say=lambda line: None)
        (killed,) = (folder / "x").glob("*/*/")
        killed.rename(folder / "killed")
        yield folder


def parsed_once(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that remembers texts; half of what these tests took was the same configuration, parsed anew."""
    values: dict[str, Any] = {}

    def remembered(text: str) -> Any:
        if text not in values:
            values[text] = parse(text)
        return copy.deepcopy(values[text])

    return remembered


def dies_at(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[None] = []

    def act(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            raise Cut
        return real(*args, **options)

    return act


def changed(value: Any) -> Iterator[Any]:
    """Yield a JSON value with one thing in it taken out, or another."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in VALUES)
            yield from ({**value, key: other} for other in changed(inner))
    elif isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in (*VALUES, *changed(value[0])))


def changes(path: Path) -> Iterator[str]:
    """Yield a file's text with one value of it changed, of the last line where it has several."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        yield from map(json.dumps, changed(json.loads(text)))
    elif path.suffix == ".jsonl" and path.name != LEDGER:
        *before, last = text.splitlines()
        yield from ("\n".join([*before, json.dumps(value)]) + "\n" for value in changed(json.loads(last)))


def one_line_or_right(act: Callable[[], object], what: object) -> bool:
    """Return whether a reader refused, in one line; whatever else it raises fails."""
    try:
        act()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, f"{error}: {what}"
        return True
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error!s:.200}: {what}") from error
    return False


def readers(run_dir: Path, other: Path) -> Mapping[str, Callable[[], object]]:
    return {
        "report": lambda: report_page(read_run(run_dir)),
        "compare": lambda: comparison_table([run_dir, other]),
        "statement": lambda: recompute(run_dir),
    }


def test_a_file_that_is_another_gives_one_line(runs: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "finished", tmp_path / "run"))
    refused = 0
    for name in REPORTED:
        path, kept = run_dir / name, (run_dir / name).read_bytes()
        for raw in (*RAW, kept[: len(kept) // 2], kept + b"\0", None):
            path.unlink()
            path.mkdir() if raw is None else path.write_bytes(raw)
            for reader, act in readers(run_dir, runs / "finished").items():
                refused += one_line_or_right(act, (name, raw and raw[:20], reader))
            path.rmdir() if raw is None else None
            path.write_bytes(kept)
    assert refused > 200


def test_a_value_that_is_another_gives_one_line_or_is_shown(runs: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "finished", tmp_path / "run"))
    every = [(name, text) for name in REPORTED for text in changes(run_dir / name)]
    chosen = np.random.default_rng(0).choice(len(every), NUM_CHANGES, replace=False)
    for name, text in (every[int(index)] for index in chosen):
        kept = (run_dir / name).read_bytes()
        (run_dir / name).write_text(text, encoding="utf-8")
        for reader, act in readers(run_dir, runs / "finished").items():
            one_line_or_right(act, (name, text[:400], reader))
        (run_dir / name).write_bytes(kept)


# What of a killed run may become what, where its hashes are made anew.
FACTS: Mapping[str, Any] = {
    "config_sha256": 3,
    "versions": [],
    "seed": "0",
    "num_lines": {"metrics.jsonl": "2"},
    "seconds": "long",
    "ledger_head": [],
    "private": 1,
    "start_sha256": None,
}
ABOUT: Mapping[str, Any] = {"round_index": 7, "scale": "one", "adapter_sha256": 3, "facts": []}
ONE = torch.ones(1, 1)


def test_resume_of_a_run_that_was_edited_gives_one_line_and_charges_nothing(runs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def refused(what: object, edit: Callable[[], object]) -> None:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(runs / "killed", run_dir)
        for path in sorted((run_dir / CHECKPOINTS).iterdir())[:-1]:
            shutil.rmtree(path)
        edit()
        ledger = run_dir / LEDGER
        before = ledger.read_bytes() if ledger.is_file() else b""
        assert one_line_or_right(lambda: resume(run_dir, say=lambda line: None), what), what
        assert not ledger.is_file() or ledger.read_bytes() == before

    def rewritten(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[], None]:
        def edit() -> None:
            (path,) = (run_dir / CHECKPOINTS).iterdir()
            tensors, facts = read_sealed(path)
            change(tensors, facts)
            write_sealed(path, tensors, facts)

        return edit

    def replaced(name: str, raw: bytes | None) -> Callable[[], object]:
        def edit() -> None:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.mkdir() if raw is None else path.write_bytes(raw)

        return edit

    def put(place: str, key: str, value: Any) -> Callable[[], None]:
        def change(_: dict[str, Any], about: dict[str, Any]) -> None:
            section = about["facts"] if place == "facts" else about
            section.pop(key) if value is ... else section.update({key: value})

        return rewritten(change)

    for raw in (*RAW, None):
        refused(("config.yaml", raw), replaced("config.yaml", raw))
        refused(("summary.json", raw), replaced("summary.json", raw))
        if raw is None or raw.endswith(b"\n"):
            for name in ("metrics.jsonl", "clients.jsonl"):
                refused((name, raw), replaced(name, raw))
    for raw in (None, b"", b"{}\n", b"\xff\xfe\0\n"):
        refused((LEDGER, raw), replaced(LEDGER, raw))
    refused(CHECKPOINTS, replaced(CHECKPOINTS, b"x"))
    for place, table in (("facts", FACTS), ("about", ABOUT)):
        for key, wrong in table.items():
            refused((key, wrong), put(place, key, wrong))
            refused((key, "gone"), put(place, key, ...))
    refused("no adapter", rewritten(lambda tensors, _: tensors.pop("adapter")))
    refused("half a side", rewritten(lambda tensors, _: tensors["side"].update({Slot("x", "side_A"): ONE})))
    refused("another adapter", rewritten(another_adapter))
    for name, key in (("metrics.jsonl", "accuracy"), ("metrics.jsonl", "bytes_up"), ("clients.jsonl", "status")):
        for wrong in (..., [], 10**400):
            refused((name, key), lambda n=name, k=key, v=wrong: edit_line(run_dir / n, k, v))  # type: ignore[misc]


def test_resume_advises_no_key_that_it_cannot_take(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by oneDNN, where this PyTorch lacks it: the start advises runtime.matmul=mkl."""
    run_dir = Path(shutil.copytree(runs / "killed", tmp_path / "run"))
    monkeypatch.setattr("fedlr.models.products.has_onednn", lambda: False)
    monkeypatch.setattr(fedlr.simulations.resume, "assemble", lambda e, **options: library_of("onednn"))
    with pytest.raises(InputError, match=r"runtime\.matmul=mkl.*; `fedlr resume` takes no key: .*start it anew$"):
        resume(run_dir, say=lambda line: None)


def another_adapter(tensors: dict[str, Any], about: dict[str, Any]) -> None:
    """A state of other shapes, which has its own hash."""
    tensors["adapter"] = {slot: value[:1].clone() for slot, value in tensors["adapter"].items()}
    about["adapter_sha256"] = AdapterState(tensors["adapter"], about["scale"]).fingerprint()


def edit_line(path: Path, key: str, value: Any) -> None:
    """Change the first line of a file."""
    first, *others = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(first)
    row.pop(key) if value is ... else row.update({key: value})
    path.write_text("\n".join([json.dumps(row), *others]) + "\n", encoding="utf-8")


def test_a_servers_run_that_was_edited_gives_one_line(tmp_path: Path) -> None:
    e = experiment("runtime=superlink", "weighting=uniform", "deployment.rehearsal=true", "deployment.min_updates=2")
    for identity in ({}, [], {"seed": 0}, {"experiment_id": "x", "seed": 0}, {"experiment_id": "0" * 32, "seed": "x"}):
        (tmp_path / IDENTITY).write_text(json.dumps(identity))
        assert one_line_or_right(lambda: Run(e, tmp_path, say=lambda line: None), identity)
    write_json(tmp_path / IDENTITY, {"experiment_id": "0" * 32, "seed": 0})
    for raw in (*RAW, None):
        path = tmp_path / "config.yaml"
        path.unlink(missing_ok=True)
        path.mkdir() if raw is None else path.write_bytes(raw)
        assert one_line_or_right(lambda: Run(e, tmp_path, say=lambda line: None), raw)
