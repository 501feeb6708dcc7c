"""`fedlr bench`, apart from what it measures: turns, ratios, checks, results, table, pictures, command.

Mutants this file kills: an order that is never drawn, warm-ups that count, a ratio upside down, a check that nan
passes, contestants that do nothing and agree, an old result that stays where a benchmark failed.
"""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

import fedlr.simulations.bench.outcome as outcome_module
import fedlr.simulations.bench.timing as timing_module
from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.simulations.bench import report
from fedlr.simulations.bench.command import bench, parse
from fedlr.simulations.bench.goals import BY_KEY, GOALS
from fedlr.simulations.bench.machine import about
from fedlr.simulations.bench.outcome import (
    BenchmarkFailed,
    Check,
    Measure,
    Outcome,
    check_equal,
    read_outcome,
    spread,
    write_outcome,
)
from fedlr.simulations.bench.pictures import better
from fedlr.simulations.bench.registry import BENCHMARKS
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import Times, alternate
from tests.training.small_models import mutant

SLOT = Slot("layer", "lora_B")
OUTCOME = Outcome(
    "cohort",
    (
        Measure("cohort", "times faster", (2.0, 2.5, 3.0, 3.5), " x"),
        Measure("cohort-bf16", "times faster, bf16", (2.9,), " x"),
        Measure("extra", "no goal", (1.0,)),
    ),
    (Check("equal", 1e-7, 1e-3),),
    {"threads": 2},
    {"wall_s": {"ours": [1.0]}},
)


@pytest.fixture(autouse=True)
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collecting the garbage of a whole test session takes a third of a second, so here it is only counted."""
    calls: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    return calls


def turns_are_fair(alternate: Callable[..., Times]) -> None:
    """Both orders come up, every turn has each contestant once with one number, warm-ups leave no time."""
    seen: list[tuple[str, int]] = []
    contestants = {name: lambda turn, name=name: seen.append((name, turn)) for name in ("a", "b")}
    times = alternate(contestants, turns=12, warmups=2, seed=3)
    assert sorted(seen) == [(name, turn) for name in ("a", "b") for turn in range(14)]
    assert [turn for _, turn in seen] == [turn for turn in range(14) for _ in "ab"]
    assert {tuple(order) for order in times.orders} == {("a", "b"), ("b", "a")}
    assert [name for name, turn in seen if turn >= 2] == [name for order in times.orders for name in order]
    assert {len(values) for values in [*times.wall_s.values(), *times.cpu_s.values()]} == {12}
    assert alternate(contestants, turns=12, warmups=2, seed=3).orders == times.orders


def test_turns_are_fair(collected: list[int]) -> None:
    turns_are_fair(alternate)
    assert len(collected) == 2 * 2 * 14  # before each run of each contestant


@pytest.mark.parametrize(
    "change",
    [("generator.shuffle(order)", "pass"), ("if turn >= warmups:", "if True:"), ("random.Random(seed)", "random")],
    ids=["never shuffles", "counts warm-ups", "ignores the seed"],
)
def test_unfair_turns_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        turns_are_fair(mutant(timing_module, change).alternate)


def test_a_rival_that_raises_ends_the_benchmark() -> None:
    def crash(turn: int) -> None:
        if turn == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        alternate({"ours": lambda turn: None, "rival": crash}, turns=3, warmups=0, seed=0)


def test_ratios_are_of_the_same_turn() -> None:
    times = Times({"ours": [1.0, 2.0], "rival": [3.0, 8.0]}, {"ours": [1.0, 1.0], "rival": [5.0, 7.0]}, [])
    assert times.ratios("rival", "ours") == (3.0, 4.0)
    assert times.ratios("rival", "ours", clock="cpu_s") == (5.0, 7.0)


def test_spread_is_the_median_and_the_quartiles() -> None:
    values = [float(v) for v in torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    s = spread(values)
    assert (s.lower, s.median, s.upper) == (25.0, 50.0, 75.0) and s.median == median(values)
    assert spread([7.0]).lower == spread([7.0]).upper == 7.0


def checks_refuse(check_equal: Callable[..., Check]) -> None:
    """A check lets close tensors pass, and nothing else."""
    mine = {SLOT: torch.tensor([3.0, 4.0])}
    passed = check_equal("t", mine, {SLOT: torch.tensor([3.0, 4.001])}, unit=0.5, tolerance=0.01)
    assert math.isclose(passed.difference, 0.002, rel_tol=1e-2)
    for theirs in (
        {SLOT: torch.tensor([3.0, 4.1])},
        {SLOT: torch.tensor([3.0, math.nan])},
        {SLOT: torch.tensor([3.0])},
        {Slot("other", "lora_B"): mine[SLOT]},
        {},
    ):
        with pytest.raises(outcome_module.BenchmarkFailed):
            check_equal("t", mine, theirs, unit=0.5, tolerance=0.01)
    with pytest.raises(outcome_module.BenchmarkFailed, match="zeros"):
        check_equal("t", {SLOT: torch.zeros(2)}, {SLOT: torch.zeros(2)}, unit=1.0, tolerance=0.01)


def test_contestants_that_disagree_or_do_nothing_are_refused() -> None:
    checks_refuse(check_equal)


@pytest.mark.parametrize(
    "change",
    [("if not difference <= tolerance:", "if difference > tolerance:"), ("if joint_norm(ours) == 0:", "if False:")],
    ids=["nan passes", "zeros pass"],
)
def test_checks_that_let_nonsense_pass_are_seen(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(outcome_module, change)
    monkeypatch.setattr(outcome_module, "BenchmarkFailed", changed.BenchmarkFailed)
    with pytest.raises(pytest.fail.Exception):
        checks_refuse(changed.check_equal)


def test_a_result_holds_the_machine_and_every_number_and_can_be_read(tmp_path: Path) -> None:
    path = write_outcome(tmp_path, OUTCOME, about={**about(), "size": "tiny"})
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["machine"]["cores"] >= 1 and tree["machine"]["processor"] and len(tree["machine"]["load_average"]) == 3
    assert tree["versions"]["torch"] == torch.__version__.split("+")[0] or tree["versions"]["torch"]
    assert {"git", "time", "fedlr", "setting", "raw"} <= tree.keys()
    first = tree["measures"][0]
    assert first["values"] == [2.0, 2.5, 3.0, 3.5] and first["spread"]["median"] == 2.75
    assert first["goal"]["bound"] == 3.2 and first["reached"] is False and tree["measures"][2]["goal"] is None
    found, machine = read_outcome(path)
    assert found == OUTCOME and machine["size"] == "tiny"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="cohort.json"):
        read_outcome(path)


def test_the_table_shows_every_goal_with_what_was_reached(tmp_path: Path) -> None:
    write_outcome(tmp_path, OUTCOME, about={**about(), "size": "tiny"})
    write_outcome(tmp_path, Outcome("gpu", not_run="no GPU"), about={**about(), "size": "tiny"})
    lines = report.table_text(tmp_path).splitlines()
    assert len(lines) == 1 + len(GOALS)
    by_text = {goal.key: lines[1 + place] for place, goal in enumerate(GOALS)}
    assert "at least 3.20 x" in by_text["cohort"] and "2.75 x" in by_text["cohort"]
    assert "2.38 to 3.12 (4)" in by_text["cohort"] and by_text["cohort"].endswith("no")
    assert by_text["cohort-bf16"].endswith("1 value             no")
    assert by_text["gpu-110m"].endswith("not run: no GPU") and by_text["memory"].endswith("not measured")
    markdown = report.table_markdown(tmp_path)
    assert markdown.count("\n| ") == len(GOALS) + 1 and "cores of" in markdown and str(tmp_path) not in markdown


@pytest.mark.usefixtures("rendered_pictures")
def test_pictures_and_document_come_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(report, "DOCS", docs)
    step = Outcome("step", (Measure("encoder, batch 4 / plain", "t", (0.9, 1.1)), Measure("step-plain", "t", (1.0,))))
    profile = Outcome("profile", raw={"stacks": {"run (a/b);losses_of (t/gradients)": 3.0, "run (a/b)": 1.0}})
    for found in (OUTCOME, step, profile):
        write_outcome(results, found, about={**about(), "size": "tiny"})
    with pytest.raises(InputError, match="performance.md"):
        report.fill_document(results)
    document = docs / "performance.md"
    document.write_text("before\n\n<!-- results -->\n", encoding="utf-8")
    with pytest.raises(InputError, match="once"):
        report.fill_document(results)
    blocks = ["\nstale rows\n".join(report.marks(name)) for name in report.PARTS_OF_DOCUMENT]
    document.write_text("\n".join(["before", *blocks, "after\n"]), encoding="utf-8")
    written = report.fill_document(results)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "2.75 x" in text
    assert "| no goal | 1.00 | 1 value |" in text and "75.0 %" not in text
    assert {path.name for path in written} == {
        "performance.md",
        "performance-goals.svg",
        "performance-step.svg",
        report.FLAME,
    }
    for path in written[1:]:
        svg = path.read_text(encoding="utf-8")
        assert svg.count("<svg") == 1 and "<script" not in svg and 'href="http' not in svg
    assert "75.0 %" in (docs / report.FLAME).read_text(encoding="utf-8")
    assert "cohort of 64, fp32" in (docs / "performance-goals.svg").read_text(encoding="utf-8")
    report.fill_document(results)
    assert document.read_text(encoding="utf-8") == text


def test_better_is_to_the_right_for_both_kinds_of_goals() -> None:
    for goal in GOALS:
        assert better(goal, goal.bound) == pytest.approx(1.0)
        reached = goal.bound * (0.5 if goal.kind == "at most" else 2.0)
        assert goal.reached(reached) and better(goal, reached) == pytest.approx(2.0)
        assert not goal.reached(math.nan)


def test_goals_are_those_of_benchmarks() -> None:
    assert len(BY_KEY) == len(GOALS)
    assert {goal.key.partition("-")[0] for goal in GOALS} <= BENCHMARKS.keys()


@pytest.mark.parametrize(
    "words",
    [[], ["stepp"], ["all", "step"], ["step", "--out"], ["step", "--fast"], ["docs", "all"]],
)
def test_words_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(words) == 2
    assert capsys.readouterr().err.startswith("fedlr bench: Expected")


def test_all_is_every_benchmark(tmp_path: Path) -> None:
    assert parse(["all", "--quick", "--out", str(tmp_path)]) == (list(BENCHMARKS), True, tmp_path)


def test_the_command_leaves_results_and_replaces_those_of_a_benchmark_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Settings] = []

    def measured(settings: Settings) -> Outcome:
        told.append(settings)
        return replace(OUTCOME, name="")

    def disagrees(settings: Settings) -> Outcome:
        raise BenchmarkFailed("Expected the same numbers")

    monkeypatch.setattr("fedlr.simulations.bench.registry.benchmark", lambda name: measured)
    assert bench(["cohort", "--quick", "--out", str(tmp_path)]) == 0
    assert told[0].size == "quick" and not told[0].scratch.exists()
    shown = capsys.readouterr().out
    assert "2.75 x" in shown and "performance-goals.svg" in shown
    tree = json.loads((tmp_path / "cohort.json").read_text(encoding="utf-8"))
    assert tree["name"] == "cohort" and tree["size"] == "quick" and tree["seconds"] >= 0

    monkeypatch.setattr("fedlr.simulations.bench.registry.benchmark", lambda name: disagrees)
    assert bench(["cohort", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "Expected the same numbers" in printed.out and "cohort failed" in printed.err
    assert "2.75" not in printed.out
    assert json.loads((tmp_path / "cohort.json").read_text(encoding="utf-8"))["measures"] == []
