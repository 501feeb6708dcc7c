"""One ledger for all runs on the same rows: they add up, the one too many is refused before it trains (R-L2).

Mutants killed: a run that is charged one round in place of all, to an account of its own, or never; one that goes on
after a refusal; a charge before what can still fail; a run that goes on without the charge it was given.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedlr.simulations.all_runs
from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon, longest_lasting_order, renyi_epsilon
from fedlr.privacy.all_runs import ANY_ROW, all_runs, checked_all_runs, with_all_runs
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.simulations.notebook import train
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import SMALL, experiment, federation
from tests.simulations.test_resume import cut_off, quietly
from tests.training.small_models import mutant

TOTAL = 5.0


def two_runs_add_up(path: Path, module: object = fedlr.simulations.all_runs) -> None:
    """Raise AssertionError unless two runs, of other clients and noise, are one Renyi sum, and a third is refused."""
    shared = ("privacy.epsilon=3", f"privacy.ledger={path}", f"privacy.ledger_epsilon={TOTAL}")
    first = federation(*shared)
    second = federation(*shared, "num_clients=3", "cohort_size=3", "num_rounds=3", "privacy.epsilon=4")
    told = [module.charge_run(one) for one in (first, second)]  # type: ignore[attr-defined]
    assert [None if one is None else one["num_runs"] for one in told] == [1, 2]
    events = []
    for one in (first, second):
        assert one.mechanism is not None
        event = PoissonSampler(one.mechanism.sample_rate).dp_event(one.mechanism.noise_multiplier)
        events.append((event, one.experiment.num_rounds * one.experiment.trainer.num_steps))
    delta = first.experiment.privacy.delta
    order = longest_lasting_order(events[0][0], PrivacyBudget(TOTAL, delta))
    spent = all_runs(path)["epsilon"]
    assert spent == pytest.approx(renyi_epsilon(events, delta, order=order), rel=1e-12)
    assert spent >= epsilon(events, delta) > 3.5, "the sum by loss distributions, which a filter may not use"
    before = path.read_bytes()
    try:
        module.charge_run(second)  # type: ignore[attr-defined]
    except InputError as error:
        assert "ledger_epsilon=5 of all runs" in str(error) and "nothing was charged" in str(error)
    else:
        raise AssertionError("a third run went on")
    assert path.read_bytes() == before


def test_two_runs_on_the_same_rows_add_up_and_one_too_many_is_refused(tmp_path: Path) -> None:
    two_runs_add_up(tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        ("federation.experiment.max_participations * federation.experiment.trainer.num_steps", "1"),
        ("mechanism, num_steps, [ANY_ROW])[ANY_ROW]", "mechanism, num_steps, [number])[number]"),
        ("if refusal is not None:", "if False:"),
        ('"accountant": "rdp"', '"accountant": "pld"'),
    ],
    ids=["one step", "an account each", "goes on", "loss distributions"],
)
def test_a_charge_that_is_less_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, InputError)):
        two_runs_add_up(tmp_path / "all.jsonl", mutant(fedlr.simulations.all_runs, change))


def test_a_run_says_what_all_of_them_spent_and_the_next_is_refused_before_it_has_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    shared = (
        f"privacy.ledger={path}",
        "privacy.ledger_epsilon=3.5",
        "privacy.epsilon=3",
        f"tracking.output_dir={tmp_path / 'out'}",
    )
    e, said = experiment(*shared), list[str]()
    run_dir = simulate(e, say=said.append)
    assert any("all 1 runs on these data" in line for line in said)
    stated = json.loads((run_dir / "privacy.json").read_text())
    assert (
        stated["all_runs"] == all_runs(path) and "other runs on these data (1 run with this one)" in stated["statement"]
    )
    assert stated["epsilon"]["maximum"] <= stated["all_runs"]["epsilon"], "of one client; of any, by the looser filter"
    with pytest.raises(InputError, match="nothing was charged or trained"):
        simulate(e, say=said.append)
    assert len(list((tmp_path / "out").rglob("*.yaml"))) == 2, "asked.yaml and config.yaml of the first"
    assert recompute(run_dir) == stated and all_runs(path)["num_runs"] == 1
    assert all_runs(path)["epsilon"] > 0 and ANY_ROW == 0
    what_all_runs_spent_is_computed_again(run_dir, stated, path)


def what_all_runs_spent_is_computed_again(run_dir: Path, stated: dict[str, Any], path: Path) -> None:
    """Raise AssertionError unless what a statement says of all runs is what the ledger said when the run ended."""
    header, charges, head = read_ledger(path)
    (charge,) = charges.of(ANY_ROW).values()
    ledger = PrivacyLedger.open(
        path, header.budget, dataset_id=header.dataset_id, randomness=header.randomness, accountant="rdp"
    )
    little = replace(charge.mechanism, noise_multiplier=50.0)
    assert ledger.reserve(1, little, 1, [ANY_ROW]) == {ANY_ROW: None}, "another run, after this one"
    unchecked = list[str]()
    assert all_runs(path)["num_runs"] == 2 and all_runs(path, until=head) == stated["all_runs"]
    assert recompute(run_dir, say=unchecked.append) == stated and not unchecked
    file, told = run_dir / "privacy.json", stated["all_runs"]
    wrong = [{**told, "epsilon": 1.0}, {**told, "num_runs": 2}, {**told, "ledger_head": "0" * 64}, {}, "none", [], None]
    wrong += [{**told, "epsilon": "inf"}, {**told, "epsilon": math.inf}, {**told, "num_runs": True}]
    plain = stated["statement"].partition(" Together with")[0]
    for other in wrong:
        changed = {**stated, "all_runs": other, "statement": plain}
        if isinstance(other, dict) and other.get("epsilon") == 1.0:
            changed = with_all_runs(changed, other)
        file.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"all_runs|a row with the hash"):
            recompute(run_dir)
    file.write_text(json.dumps(stated))
    path.rename(path.with_name("elsewhere.jsonl"))
    assert recompute(run_dir, say=unchecked.append) == stated
    assert len(unchecked) == 1 and "not checked" in unchecked[0]


def test_a_charge_that_another_run_left_torn_changes_no_statement_of_before(tmp_path: Path) -> None:
    """It is charged when the ledger is next opened; what this run said is of its own last row."""
    path = tmp_path / "all.jsonl"
    first = federation(f"privacy.ledger={path}", f"privacy.ledger_epsilon={TOTAL}", "privacy.epsilon=1")
    told = fedlr.simulations.all_runs.charge_run(first)
    (tmp_path / "config.yaml").write_text(f"privacy: {{ledger: {path}}}")
    charge = path.read_bytes().splitlines()[-1].replace(b'"round_index":0', b'"round_index":1')
    with path.open("ab") as file:
        file.write(charge.partition(b'"hash"')[0])
    assert checked_all_runs(told, tmp_path) == (told, None) and all_runs(path) == told
    assert fedlr.simulations.all_runs.open_all_runs(first) is not None
    assert all_runs(path)["num_runs"] == 2 and checked_all_runs(told, tmp_path) == (told, None)


def test_another_budget_is_another_ledger(tmp_path: Path) -> None:
    shared = (f"privacy.ledger={tmp_path / 'all.jsonl'}", f"privacy.ledger_epsilon={TOTAL}", "privacy.epsilon=1")
    fedlr.simulations.all_runs.charge_run(federation(*shared))
    with pytest.raises(InputError, match="another budget, data set or kind of run"):
        fedlr.simulations.all_runs.charge_run(federation(*shared, "privacy.ledger_epsilon=7"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("privacy.ledger=a.jsonl",), "privacy.ledger_epsilon together"),
        (("privacy.ledger_epsilon=3",), "privacy.ledger_epsilon together"),
        (("privacy.ledger=a.jsonl", "privacy.ledger_epsilon=3", "tracking.run_alone=true"), "tracking.run_alone=false"),
        (("privacy.ledger=a.jsonl", "privacy.ledger_epsilon=3", "privacy.epsilon=null"), "privacy.epsilon with"),
    ],
)
def test_what_it_does_not_cover_is_refused_by_name(words: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        experiment(*words)


def test_nothing_is_charged_before_what_can_still_be_refused(tmp_path: Path) -> None:
    path, ledger = tmp_path / "all.jsonl", tmp_path / "clients.jsonl"
    f = federation("privacy.epsilon=3", f"privacy.ledger={path}", "privacy.ledger_epsilon=3.5")
    ledger.touch()
    with pytest.raises(InputError, match="Expected no ledger"):
        next(train(f, ledger=ledger))
    assert not path.exists()
    ledger.unlink()
    fedlr.simulations.all_runs.charge_run(f)
    with pytest.raises(InputError, match="nothing was charged or trained"):
        next(train(f, ledger=ledger))
    assert not ledger.exists(), "or the next call would find it in its way"
    (tmp_path / "file").touch()
    new = tmp_path / "new.jsonl"
    words = ("privacy.epsilon=3", f"privacy.ledger={new}", "privacy.ledger_epsilon=3.5")
    with pytest.raises(InputError):
        simulate(experiment(*words, f"tracking.output_dir={tmp_path / 'file'}"), say=print)
    assert not new.exists()


def test_a_run_goes_on_from_any_folder_and_only_with_its_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("privacy.ledger=all.jsonl", "privacy.ledger_epsilon=9", "privacy.epsilon=3")
    run_dir = cut_off(tmp_path / "runs", *words, words=SMALL)
    path, whole = tmp_path / "all.jsonl", (tmp_path / "all.jsonl").read_bytes()
    assert f"ledger: {path}" in (run_dir / "config.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    path.write_bytes(whole.splitlines(keepends=True)[0])  # put back as it was before the run
    with pytest.raises(InputError, match="older copy of the ledger"):
        quietly(run_dir)
    path.unlink()
    with pytest.raises(InputError, match="Expected a ledger at"):
        quietly(run_dir)
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before
    path.write_bytes(whole)
    quietly(run_dir)
    assert path.read_bytes() == whole and "all_runs" in json.loads((run_dir / "privacy.json").read_text())


def test_runs_that_begin_together_make_one_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.jsonl"
    f = federation("privacy.epsilon=1", f"privacy.ledger={path}", "privacy.ledger_epsilon=9")
    create, others = PrivacyLedger.create, list[Any]()

    def overtaken(*args: Any, **about: Any) -> PrivacyLedger:
        """Create a ledger while another run does so too, and is charged."""
        monkeypatch.setattr(PrivacyLedger, "create", create)
        others.append(fedlr.simulations.all_runs.charge_run(f))
        return create(*args, **about)

    monkeypatch.setattr(PrivacyLedger, "create", overtaken)
    told = fedlr.simulations.all_runs.charge_run(f)
    assert told is not None and (others[0]["num_runs"], told["num_runs"]) == (1, 2)
    assert list(tmp_path.iterdir()) == [path]
