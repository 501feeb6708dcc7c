"""`fedlr bench robust` counts what it says: accuracy by rule, attack and share, and honest clients left out."""

from dataclasses import asdict
from pathlib import Path

import pytest

import fedlr.simulations.bench.report as report
from fedlr.adapters.state import ClientUpdate
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.multi_krum import MultiKrum
from fedlr.methods.method import Always, Method, keep, trained_block
from fedlr.rounds.round import ServerState, run_round
from fedlr.simulations.attacks.pool import AttackedPool
from fedlr.simulations.bench.outcome import Outcome, write_outcome
from fedlr.simulations.bench.report import draw, fill_document, marks
from fedlr.simulations.bench.robust import left_out, rules, run
from fedlr.simulations.bench.robust_table import CLEAN, IID, Played, read_played, robust_picture, setting_rows, table
from fedlr.simulations.bench.settings import Settings
from tests.server.small_federation import Outcomes
from tests.test_outlying import STATE, B, honest

PLAYED = [
    Played(CLEAN, 0.80, 0.0, None, IID, "mean"),
    Played(CLEAN, 0.78, 0.3, None, IID, "multi-Krum"),
    Played("little", 0.50, 0.0, 0.0, IID, "mean", 0.3),
    Played("little", 0.60, 0.1, 1.0, IID, "multi-Krum", 0.3),
    Played("little", 0.70, 0.3, 0.0, IID, "multi-Krum", 0.3, seed=1),
]


def test_the_table_has_means_over_seeds_the_worst_attack_and_who_was_left_out() -> None:
    assert setting_rows(PLAYED) == [
        ("attack", "hostile", "mean", "multi-Krum"),
        ("none", "0%", "80.0", "78.0"),
        ("little", "30%", "50.0", "65.0"),
        ("worst", "", "50.0", "65.0"),
        ("honest left out", "0%", "0.0", "30.0"),
        ("honest left out", "attacked", "0.0", "20.0"),
    ]
    assert table(PLAYED).splitlines()[0] == "iid: accuracy in percent"


def test_results_are_read_back_drawn_and_written_into_their_document_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome("robust", raw={"played": [asdict(one) for one in PLAYED]})
    assert read_played(outcome) == PLAYED
    machine = {"cores": 2, "processor": "x", "memory_gb": 1.0, "vector_unit": "y", "gpu": None, "load_average": [0.1]}
    about = {"machine": machine, "versions": {}, "git": "abc", "size": "quick", "time": "2026-11-30T00:00:00"}
    write_outcome(tmp_path, outcome, about=about)
    assert "robustness.svg" in [path.name for path in draw(tmp_path)]
    start, end = marks("robust")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "robustness.md").write_text(f"before\n{start}\n{end}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(report, "DOCS", docs)
    written = fill_document(tmp_path)
    assert [path.name for path in written] == ["robustness.md", "robustness.svg"]
    text = (docs / "robustness.md").read_text(encoding="utf-8")
    assert "| little | 30% | 50.0 | 65.0 |" in text and text.startswith("before") and text.endswith("after\n")
    assert robust_picture(Outcome("robust")).svg is None


def test_who_is_left_out_is_who_was_rejected_and_whom_a_rule_gave_little() -> None:
    updates = [ClientUpdate(c, {B: honest(c)[B]}, 1.0, 0) for c in range(7)]
    far = ClientUpdate(5, {B: updates[5].tensors[B] + 3.0}, 1.0, 0)
    too_far = ClientUpdate(6, {B: updates[6].tensors[B] + 1e4}, 1.0, 0)
    for rule, expected in ((MultiKrum(1), {5, 6}), (weighted_mean, {6})):
        pool = AttackedPool(Outcomes([*updates[:5], far, too_far]), craft=None, bad=(), enrolled=STATE.adapter, seed=0)
        method = Method("rule", Always(["lora_B"]), rule, keep, trained_block)
        _, diagnostics = run_round(STATE, range(7), pool=pool, method=method)
        assert left_out(rule, ServerState(STATE.adapter), pool, diagnostics) == expected


def test_a_toy_run_plays_every_rule_and_tells_of_each(tmp_path: Path) -> None:
    told: list[str] = []
    outcome = run(Settings("tiny", tmp_path, told.append))
    played = read_played(outcome)
    assert {one.rule for one in played} == set(rules(1)) and {one.share for one in played} == {0.0, 0.2}
    assert all(0 <= one.accuracy <= 1 and 0 <= one.honest_left_out <= 1 for one in played)
    krum = [one for one in played if one.rule == "multi-Krum" and one.attack == CLEAN]
    assert [one.honest_left_out for one in krum] == [0.2]  # one of five, whoever is there
    assert len(outcome.measures) == 2 * len(rules(1)) and "multi-Krum" in told[-1]
    assert played == read_played(run(Settings("tiny", tmp_path, told.append)))
