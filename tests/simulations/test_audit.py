"""An audit bounds epsilon from below, below what is accounted, sees what is missing, and says so (R-A2).

Mutants this file kills: noise off, which all guesses see; a federation whose noise is reused, which the command must
not pass; a fault that no check finds, which the command must report.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.simulations.audit import audit as audit_module
from fedlr.simulations.audit.audit import CONFIGURED, WHOLE_BATCHES, Audit, audit, bound, over_whole_batches
from fedlr.simulations.audit.canaries import OneRun, guess_canaries, likeliest_noise
from fedlr.simulations.audit.command import audit as command
from fedlr.simulations.audit.command import conclusion, table
from fedlr.simulations.audit.mechanism import gather_noise
from fedlr.simulations.audit.options import Options, split_options
from fedlr.simulations.audit.planted import noise_off, noise_reused
from fedlr.simulations.audit.probe import Unmetered
from fedlr.simulations.audit.small import auditor_generator, with_rows
from fedlr.simulations.federation import Federation, prepare
from fedlr.simulations.simulate import simulate
from fedlr.streams import SeededRandomness
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import SMALL, experiment, federation

ROOT = Path(__file__).parents[2]
FEW = Options(canaries=200, guesses=0.25, draws=4_000, planted=False)
WORDS = [*SMALL, "audit.canaries=60", "audit.draws=4000", "audit.guesses=0.3"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


def whole_run(broken: Any = lambda f: f, seed: int = 0) -> OneRun:
    """Guess the rows of one step over whole batches, at epsilon 1."""
    f = over_whole_batches(federation())
    return guess_canaries(
        replace(broken(f), randomness=SeededRandomness(seed)),
        accounted=f.mechanism,
        ledger=Unmetered(),
        spent=lambda: 1.0,
        guessed=FEW.guesses,
        generator=np.random.default_rng(seed),
    )


def test_one_run_stays_below_epsilon_and_sees_that_noise_is_off() -> None:
    """Right noise exceeds 1.0 by chance in less than a twentieth of seeds; three fixed ones do not."""
    assert all(whole_run(seed=seed).lower_bound <= 1.0 for seed in range(3))
    off = whole_run(noise_off)
    assert off.num_correct == off.num_guesses == 24
    assert off.lower_bound == off.most > 1.0


def test_guesses_are_better_than_chance_where_noise_is_small() -> None:
    """Else a lower bound of 0 would only say that the auditor is blind."""

    def less_noise(f: Federation) -> Federation:
        return replace(f, mechanism=replace(f.mechanism, noise_multiplier=0.1 * f.mechanism.noise_multiplier))

    assert sum(whole_run(less_noise, seed=seed).num_correct for seed in range(3)) >= 50  # of 72; chance: 36


def test_a_run_is_charged_to_a_ledger_and_compared_with_it() -> None:
    f = federation("cohort_size=4")
    found = bound(f, CONFIGURED, FEW, generator=np.random.default_rng(0))
    step = f.training.sampler.dp_event(f.mechanism.noise_multiplier)
    spent = epsilon([(step, 2 * f.training.num_steps)], f.budget.delta, accountant="rdp")
    assert found.run.epsilon == pytest.approx(spent) and found.run.epsilon <= f.budget.epsilon
    assert found.holds and found.num_runs == 1 and not found.can_fail
    whole = bound(over_whole_batches(f), WHOLE_BATCHES, FEW, generator=np.random.default_rng(0))
    assert 0.9 < whole.run.epsilon <= 1.0 and whole.can_fail


def test_a_bound_fails_only_after_five_runs_with_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def too_good(f: Federation, **keywords: Any) -> OneRun:
        seen.append(f.randomness)
        return OneRun(100, 100, 100, 1, 0.5, 1e-5)

    monkeypatch.setattr(audit_module, "guess_canaries", too_good)
    found = bound(federation(), CONFIGURED, FEW, generator=np.random.default_rng(0))
    assert not found.holds and found.num_runs == 5 and len({randomness.seed for randomness in seen}) == 5


def test_the_likeliest_noise_is_that_of_the_sum() -> None:
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((30, 200))
    scales, directions = np.linalg.eigh(gradients @ gradients.T)
    for true in (4.0, 4e-3):
        seen = gradients.T @ generator.choice([-0.5, 0.5], 30) + true**0.5 * generator.standard_normal(200)
        along = directions.T @ (gradients @ seen)
        found = likeliest_noise(4.0, 0.25 * scales, along, scales, energy=float(seen @ seen), size=200)
        assert found == pytest.approx(true)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "PLANTED", {"noise off": noise_off})  # the others: test_audit_mechanism.py
    assert command([*WORDS, f"tracking.output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("tiny/*/audit.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["holds"] is True and written["conclusion"] in printed
    assert len(written["planted"]) == 1
    assert WHOLE_BATCHES in written["planted"][0]["found_by"]
    assert all(one["what"] in printed for one in [*written["findings"], *written["one_run"]])
    assert sorted(one.name for one in path.parent.iterdir()) == ["audit.json", "config.yaml", "versions.json"]
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    shown = {code for codes in re.findall(r"`([^`]+)`", text) for code in re.findall(r"[\w-]+", codes)}
    rows = [*written["findings"], *written["one_run"], *written["planted"]]
    assert {key for row in [written, *rows] for key in row} <= shown


def test_an_audit_of_a_run_stands_in_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = simulate(experiment(f"tracking.output_dir={tmp_path}"), say=lambda line: None)
    before = (run_dir / "report.html").read_text(encoding="utf-8")
    assert command([str(run_dir), "audit.draws=4000", "audit.canaries=60", "audit.planted=false"]) == 0
    report, written = (run_dir / "report.html").read_text("utf-8"), json.loads((run_dir / "audit.json").read_bytes())
    assert "Measured by an audit" not in before
    assert "Measured by an audit" in report and written["conclusion"][1:] in report
    assert written["seed"] == 0 and written["planted"] == []


def test_the_same_seed_gives_the_same_audit() -> None:
    def figures() -> tuple[Any, ...]:
        full = prepare(experiment(), seed=3)
        generator = auditor_generator(full)
        f = with_rows(full, 40, generator)
        return gather_noise(f, num_draws=4_000).all_values().tolist(), bound(f, CONFIGURED, FEW, generator=generator)

    assert figures() == figures()


@pytest.mark.slow
def test_a_whole_audit_finds_every_planted_fault() -> None:
    found = audit(experiment(), Options(canaries=60, guesses=0.3), seed=1, say=lambda line: None)
    assert found.holds and not found.missed and len(found.planted) == 5


def test_what_is_not_as_accounted_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(audit_module, "prepare", lambda e, seed: noise_reused(prepare(e, seed=seed)))
    assert command([*WORDS, "audit.planted=false", f"tracking.output_dir={tmp_path}"]) == 2
    assert re.search(r"not as accounted: .*noise_fresh", capsys.readouterr().err)


def test_a_planted_fault_that_nothing_finds_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(audit_module, "PLANTED", {"nothing": lambda f: f})
    assert command([*WORDS, f"tracking.output_dir={tmp_path}"]) == 2
    assert "planted and not found: nothing" in capsys.readouterr().err


REFUSED = {
    ("privacy=none",): "Expected an epsilon to audit, got privacy=none",
    ("privacy=client",): "Expected privacy.unit=example for an audit, whose canaries are single rows, got client",
    ("data.public=false",): "Expected data.public=true for an audit, got false",
    ("runtime=flower",): "Expected runtime=local for an audit",
    ("audit.canaries=5",): "Expected audit.canaries to be",
    ("audit.cannaries=500",): "audit.canaries",
    ("audit.draws=many",): "Expected audit.draws to be",
    ("audit.draws",): "Expected audit.KEY=VALUE, got 'audit.draws'",
    ("audit.draws={",): "Expected audit.draws to be a number",
    ("no-such-folder",): "Expected a run directory",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_be_audited_is_one_clear_error(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*(SMALL if "=" in words[0] and not words[0].startswith("audit.draws=many") else []), *words]) == 2
    assert REFUSED[words] in capsys.readouterr().err


def test_options_are_taken_out_of_the_words() -> None:
    options, words = split_options(["experiment=tiny", "audit.rounds=3", "seed=1", "audit.planted=false"])
    assert words == ["experiment=tiny", "seed=1"] and options == Options(rounds=3, planted=False)


def test_a_conclusion_names_what_fails() -> None:
    f = federation()
    run = OneRun(100, 100, 100, 1, 0.5, 1e-5)
    found = Audit(f, FEW, [], [audit_module.Bound(CONFIGURED, "what", run, 5)])
    assert conclusion(found) == "not as accounted: one_run" and not found.holds
    assert "FAILS" in table(found)[1]
    with pytest.raises(InputError):
        split_options(["audit.guesses=0"])


def test_an_audit_does_not_pass_by_a_ledger_of_all_runs() -> None:
    with pytest.raises(InputError, match="Expected privacy.ledger=null for an audit, got 'all.jsonl'"):
        audit_module.OF_AN_AUDIT.check(experiment("privacy.ledger=all.jsonl", "privacy.ledger_epsilon=9"))
