"""The statement says no more than the ledger shows, for whom, and what it leaves out (R-L8).

Mutants this file kills: a mean in place of the maximum, clients without a row left out of the minimum, open
reservations at their settled value, an infinite epsilon that JSON cannot hold, a seeded run stated as releasable.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.privacy import chain
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.statement import (
    EARLIER_RANDOMNESS,
    ONE_MECHANISM,
    RANDOMNESS,
    no_privacy_statement,
    privacy_statement,
    recompute,
)
from tests.privacy.ledger_rows import BUDGET, MECHANISM, cost, new_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Clients 0 to 4: 8 steps, 4 steps, 4 of which 1 was taken, 4 never settled, and none at all."""
    path = tmp_path / "ledger.jsonl"
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 4, [0, 1, 2, 3])
    ledger.reserve(1, MECHANISM, 4, [0])
    for round_index, client, steps in [(0, 0, 4), (1, 0, 4), (0, 1, 4), (0, 2, 1)]:
        ledger.settle(round_index, client, steps)
    return path


def test_statement_is_recomputed_from_the_file_alone(path: Path) -> None:
    before = path.read_bytes()
    statement = privacy_statement(path, range(5))
    assert statement["epsilon"] == {"maximum": cost(8), "median": cost(4), "minimum": 0.0}
    assert statement["delta"] == BUDGET.delta and statement["budget"]["epsilon"] == BUDGET.epsilon
    assert statement["ledger_head"] == json.loads(before.splitlines()[-1])["hash"]
    assert path.read_bytes() == before


def test_clients_that_never_trained_count_as_zero(path: Path) -> None:
    assert privacy_statement(path, range(4))["epsilon"]["minimum"] == cost(1)
    many = privacy_statement(path, range(100))
    assert many["epsilon"] == {"maximum": cost(8), "median": 0.0, "minimum": 0.0}
    assert many["num_clients"] == 100


def test_clients_are_counted_by_status(path: Path) -> None:
    assert privacy_statement(path, range(5))["num_clients_by_status"] == {
        "never_reserved": 1,
        "all_settled": 3,
        "open_reservation_counted_in_full": 1,
    }


def test_the_sentence_is_about_the_client_that_spent_most(path: Path) -> None:
    sentence = privacy_statement(path, range(5))["statement"]
    stated = float(sentence.split("epsilon <= ")[1].split()[0])
    assert cost(8) <= stated < cost(8) + 1e-3, "rounded up"
    assert "max over clients" in sentence and "one training example of one client" in sentence
    assert "average" not in sentence and "the model is" not in sentence


def test_statement_describes_the_mechanism_and_its_accountant(path: Path) -> None:
    statement = privacy_statement(path, range(5))
    (mechanism,) = statement["mechanisms"]
    assert "Poisson" in mechanism["sampling"]
    constants = [mechanism[key] for key in ("noise_multiplier", "max_grad_norm", "sample_rate", "divisor")]
    assert constants == [20.0, 0.5, 1.0, 8.0] and mechanism["steps_per_round"] == [4]
    assert statement["accountant"] == {
        "name": "rdp",
        "library": "dp-accounting",
        "version": version("dp-accounting"),
        "composition": ONE_MECHANISM,
    }
    assert statement["neighbouring_relation"] == "add or remove one example"


def test_statement_names_adversaries_conditions_and_gaps(path: Path) -> None:
    statement = privacy_statement(path, range(5))
    assert [text[:2] for text in statement["protects_against"]] == ["A2", "A3", "A4", "A5"]
    assert any(text.startswith("A6") for text in statement["not_protected_against"])
    assert "none is claimed from the sampling of clients" in statement["amplification"]
    assert "floating point" in statement["floating_point"]
    gaps = " ".join(statement["not_covered"])
    for gap in ("tuning", "metrics", "label", "timing", "participation", "other runs", "several rows"):
        assert gap in gaps
    conditions = " ".join(statement["conditions"])
    assert "two clients" in conditions and "protocol" in conditions


def test_a_seeded_run_is_a_simulation_of_privacy(path: Path, tmp_path: Path) -> None:
    seeded = privacy_statement(path, range(5))
    warning = "a simulation of privacy: whoever knows the seed can subtract the noise"
    assert seeded["statement"].startswith(f"Not for release, {warning}.")
    assert seeded["randomness"]["meaning"] == f"{warning}; not for release of private data"
    new_ledger(tmp_path / "os.jsonl", randomness="os").reserve(0, MECHANISM, 1, [0])
    released = privacy_statement(tmp_path / "os.jsonl", [0])
    assert "simulat" not in released["statement"].lower() and released["randomness"]["kind"] == "os"


def test_steps_without_noise_are_stated_as_no_privacy(tmp_path: Path) -> None:
    """No ledger accepts them; a row written by another hand is still told for what it is."""
    path = tmp_path / "ledger.jsonl"
    ledger: PrivacyLedger = new_ledger(path)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "sample_rate": 0.1, "divisor": 1.0}
    row = {"kind": "reserve", "round_index": 0, "num_steps": 1, "client_id": 0, "mechanism": constants}
    with chain.locked(path) as file:
        chain.append(file, ledger._tail, [row])
    statement = privacy_statement(path, [0, 1])
    assert statement["epsilon"] == {"maximum": "inf", "median": "inf", "minimum": 0.0}
    assert statement["differential_privacy"] is False and "No differential privacy" in statement["statement"]
    json.dumps(statement, allow_nan=False)


def test_no_privacy_is_stated_as_such() -> None:
    statement = no_privacy_statement(20)
    assert "No differential privacy" in statement["statement"] and statement["epsilon"]["maximum"] == "inf"
    assert statement["num_clients"] == 20 and statement["differential_privacy"] is False
    assert json.loads(json.dumps(statement, allow_nan=False)) == statement


def test_statement_is_valid_json_and_repeats(path: Path) -> None:
    statement = privacy_statement(path, range(5))
    assert json.loads(json.dumps(statement, allow_nan=False)) == statement == privacy_statement(path, range(5))


def test_a_run_in_which_nobody_trained_spent_nothing(tmp_path: Path) -> None:
    new_ledger(tmp_path / "ledger.jsonl")
    statement = privacy_statement(tmp_path / "ledger.jsonl", [0, 1])
    assert statement["epsilon"]["maximum"] == 0.0 and statement["mechanisms"] == []


def test_clients_that_are_not_enrolled_cannot_be_left_out(path: Path) -> None:
    with pytest.raises(InputError, match=r"\[3\]"):
        privacy_statement(path, [0, 1, 2])
    with pytest.raises(InputError, match="nobody"):
        privacy_statement(path, [])


def test_a_torn_row_is_mentioned(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])
    statement = privacy_statement(path, range(5))
    assert statement["num_torn_rows"] == 1
    assert statement["epsilon"]["median"] == cost(4), "client 2's settlement is gone: all 4 steps count"


def test_a_statement_that_the_ledger_does_not_bear_out_is_found(path: Path) -> None:
    stated = path.with_name("privacy.json")
    with pytest.raises(InputError, match="privacy.json"):
        recompute(path.parent)
    stated.write_text(json.dumps(privacy_statement(path, range(5))))
    assert recompute(path.parent) == privacy_statement(path, range(5))
    lower = privacy_statement(path, range(5))
    lower["epsilon"]["maximum"] /= 2
    stated.write_text(json.dumps(lower))
    with pytest.raises(InputError, match="other values of epsilon"):
        recompute(path.parent)
    stated.write_text(json.dumps(no_privacy_statement(5)))
    with pytest.raises(InputError, match="differential_privacy"):
        recompute(path.parent)


def test_an_earlier_version_is_taken_at_its_word_about_its_generator_and_nothing_else(tmp_path: Path) -> None:
    PrivacyLedger.create(tmp_path / "ledger.jsonl", BUDGET, dataset_id="d", randomness="os", accountant="rdp")
    stated = tmp_path / "privacy.json"
    told = privacy_statement(tmp_path / "ledger.jsonl", range(2))
    for meaning, is_fine in ((EARLIER_RANDOMNESS[0], True), ("hardware", False), (RANDOMNESS["seeded"], False)):
        told["randomness"] = {"kind": "os", "meaning": meaning}
        stated.write_text(json.dumps(told))
        if is_fine:
            assert recompute(tmp_path) == told
        else:
            with pytest.raises(InputError, match="other values of randomness"):
                recompute(tmp_path)


def test_a_run_without_privacy_recomputes_as_such(tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text(json.dumps(no_privacy_statement(5)))
    assert recompute(tmp_path) == no_privacy_statement(5)
    (tmp_path / "privacy.json").write_text(json.dumps({"num_clients": 5, "differential_privacy": True}))
    with pytest.raises(InputError, match="no file"):
        recompute(tmp_path)
