"""What a statement says of an earlier run: sums, data, units, and what it may not claim.

Mutant this file kills: a statement that forgets the earlier run where both read the same data (`lambda s, e: s`).
"""

from collections.abc import Callable
from typing import Any

import pytest

from fedlr.privacy.earlier import earlier_run, start_note, with_earlier
from fedlr.privacy.statement import no_privacy_statement
from fedlr.privacy.units import EXAMPLE

Statement = dict[str, Any]


def statement(
    epsilon: float, name: str = "mine.csv", *, for_release: bool = True, unit: str = EXAMPLE.text
) -> Statement:
    return {
        "statement": f"epsilon <= {epsilon}.",
        "differential_privacy": True,
        "for_release": for_release,
        "unit": unit,
        "neighbouring_relation": EXAMPLE.relation,
        "delta": 1e-5,
        "epsilon": {"maximum": epsilon},
        "dataset_id": name,
    }


def claims_too_much(join: Callable[[Statement, Statement], Statement]) -> bool:
    """Whether a run on the rows of one without privacy, or of one not for release, is told to protect them."""
    joined = [join(statement(1.0), earlier_run(no_privacy_statement(3) | {"dataset_id": "mine.csv"}))]
    simulated = join(statement(1.0), earlier_run(statement(2.0, for_release=False)))
    return any(one["differential_privacy"] for one in joined) or any(one["for_release"] for one in (*joined, simulated))


def test_of_one_data_set_epsilons_add_up_and_nothing_is_claimed_that_the_earlier_run_does_not_have() -> None:
    found = with_earlier(statement(1.5), earlier_run(statement(2.0)))
    assert found["started_from"]["epsilon_sum"] == 3.5 and found["started_from"]["delta_sum"] == pytest.approx(2e-5)
    assert "add up to epsilon <= 3.5 at delta = 2e-05" in found["statement"] and found["for_release"]
    assert found["epsilon"] == {"maximum": 1.5}  # the ledger's
    assert not claims_too_much(with_earlier)
    assert claims_too_much(lambda own, earlier: own)


@pytest.mark.parametrize("name", ["theirs.csv", "/home/u/mine.csv", None])
def test_whatever_the_data_of_a_start_are_called_no_more_is_claimed_than_it_has(name: str | None) -> None:
    found = with_earlier(statement(1.5), earlier_run(no_privacy_statement(3) | {"dataset_id": name}))
    assert not found["differential_privacy"] and not found["for_release"]
    assert "without differential privacy: a row that was read there is not protected" in str(found)
    simulated = with_earlier(statement(1.5), earlier_run(statement(2.0, str(name), for_release=False)))
    assert simulated["differential_privacy"] and not simulated["for_release"]


def test_a_run_without_privacy_is_not_forgotten_behind_one_with_it() -> None:
    second = with_earlier(statement(1.5, "theirs.csv"), earlier_run(no_privacy_statement(3)))
    third = with_earlier(statement(0.5), earlier_run(second))
    assert not third["differential_privacy"] and not third["for_release"]


def test_a_note_says_whom_the_epsilon_of_a_start_protects() -> None:
    assert start_note(earlier_run(statement(1.5))) == (
        "the start was trained with epsilon 1.5 for one training example of one client; privacy.json counts it in at "
        "the end"
    )
    assert "is not private as a whole" in start_note(earlier_run(no_privacy_statement(3)))


def test_a_start_of_a_start_is_counted_in() -> None:
    second = with_earlier(statement(1.5), earlier_run(statement(2.0)))
    third = with_earlier(statement(0.5), earlier_run(second))
    assert third["started_from"]["epsilon_sum"] == 4.0 and third["started_from"]["delta_sum"] == pytest.approx(3e-5)


def test_what_is_said_again_of_its_own_record_is_the_same() -> None:
    found = with_earlier(statement(1.5), earlier_run(statement(2.0)))
    assert with_earlier(statement(1.5), found["started_from"]) == found


def test_epsilons_of_different_units_are_not_added() -> None:
    found = with_earlier(statement(1.5), earlier_run(statement(2.0, unit="one client")))
    assert found["started_from"]["epsilon_sum"] == "inf" and "no sum of the two" in found["statement"]
    assert not found["differential_privacy"]


def test_what_clients_report_counts_by_the_largest() -> None:
    told = {key: value for key, value in statement(0.0).items() if key not in ("epsilon", "dataset_id")}
    clients = [{"epsilon": 1.0}, {"epsilon": 2.5}]
    assert earlier_run(told | {"clients": clients})["epsilon"] == 2.5
    assert earlier_run(told | {"clients": [*clients, {"epsilon": "inf"}]})["epsilon"] == "inf"


@pytest.mark.parametrize("change", [{"epsilon": {"maximum": "much"}}, {"delta": 2.0}, {"unit": None, "epsilon": None}])
def test_another_form_is_no_statement(change: Statement) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        earlier_run(statement(1.0) | change)
