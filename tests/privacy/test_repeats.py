"""A repeat charges nothing because it releases nothing: the same computation, under the same noise (R-L1, R-F2).

Mutants this file kills (`MUTANTS`): a repeat under noise of the operating system, of another task, of another
mechanism, of other steps, of a task that nobody named, of steps that were not settled; a settlement that lowers what
was repeated.
"""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlr.errors import InputError
from fedlr.privacy import chain
from fedlr.privacy.charges import Charge, read_ledger
from fedlr.privacy.ledger import PrivacyLedger, Refusal
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.statement import privacy_statement
from tests.privacy.ledger_rows import MECHANISM, cost, new_ledger, open_ledger, steps_within_budget

TASK, OTHER = "a" * 64, "b" * 64
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def reason(ledger: PrivacyLedger, task: str | None = TASK, *, steps: int = 5, mechanism: Mechanism = MECHANISM) -> str:
    """What comes of another reservation of round 0 by client 0."""
    (answer,) = ledger.reserve(0, mechanism, steps, [0], task).values()
    return "" if answer is None else answer.reason


def test_a_repeat_of_the_same_task_is_accepted_and_charges_nothing(path: Path) -> None:
    last = steps_within_budget()
    assert new_ledger(path).reserve(0, MECHANISM, last, [0, 1], TASK) == {0: None, 1: None}
    for _ in range(2):  # another process, nothing settled; then all settled, and the budget at its end
        ledger = open_ledger(path)
        assert ledger.reserve(0, MECHANISM, last, [0, 1, 2], TASK) == {0: None, 1: None, 2: None}
        ledger.settle_all(0, {0: last, 1: last})
        ledger.settle_all(0, {0: last, 1: last})
        assert ledger.spent(0) == ledger.spent(1) == cost(last) and ledger.participations(0) == 1
    assert isinstance(ledger.reserve(1, MECHANISM, 1, [0], TASK)[0], Refusal), "another round is no repeat"
    assert privacy_statement(path, range(3))["num_clients_by_status"]["all_settled"] == 2


def only_repeats_pass(path: Path) -> None:
    """The check that mutants fail: nothing but the very same computation is repeated, and it stays charged in full."""
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    louder = replace(MECHANISM, noise_multiplier=25.0)
    for again in (ledger, open_ledger(path)):
        for answer in (
            reason(again, OTHER),
            reason(again, None),
            reason(again, steps=4),
            reason(again, steps=6),
            reason(again, mechanism=louder),
        ):
            assert answer == "already_reserved"
    assert reason(ledger) == ""
    ledger.settle(0, 0, 2)  # by whoever stopped early; the other took five steps
    assert ledger.spent(0) == open_ledger(path).spent(0) == cost(5)

    ledger = new_ledger(path.with_name("unnamed"))
    ledger.reserve(0, MECHANISM, 5, [0])
    assert reason(ledger, None) == reason(ledger, TASK) == "already_reserved"

    ledger = new_ledger(path.with_name("os"), randomness="os")
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    assert reason(ledger) == "already_reserved" and ledger.spent(0) == cost(5)

    ledger = new_ledger(path.with_name("short"))
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    ledger.settle(0, 0, 2)  # the three others were never charged: to take them now would be free
    assert reason(ledger) == "already_reserved" and ledger.spent(0) == cost(2)


def test_nothing_but_the_same_computation_is_a_repeat(path: Path) -> None:
    only_repeats_pass(path)


def repeated_if(rule: Callable[..., bool]) -> tuple[type, str, Any]:
    """A mutant of what counts as a repeat."""
    return Charge, "is_repeated_by", rule


MUTANTS = {
    "under noise of the operating system": (PrivacyLedger, "is_seeded", True),
    "another task": repeated_if(lambda c, m, n, t: t is not None and (c.mechanism, c.steps) == (m, n)),
    "another mechanism": repeated_if(lambda c, m, n, t: t is not None and (c.task, c.steps) == (t, n)),
    "fewer steps": repeated_if(lambda c, m, n, t: t is not None and (c.mechanism, c.task) == (m, t) and n <= c.steps),
    "no task": repeated_if(lambda c, m, n, t: (c.mechanism, c.task, c.steps) == (m, t, n)),
    "settled short": repeated_if(
        lambda c, m, n, t: t is not None and (c.mechanism, c.task, c.reserved_steps) == (m, t, n)
    ),
    "a settlement that lowers": (
        Charge,
        "steps",
        property(lambda c: c.reserved_steps if c.settled_steps is None else c.settled_steps),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_ledger_that_repeats_more_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises((AssertionError, InputError)):  # a repeat that the rows do not bear out is refused as a row
        only_repeats_pass(path)


def test_the_round_of_a_task_is_found(path: Path) -> None:
    ledger = new_ledger(path)
    ledger.reserve(3, MECHANISM, 1, [0], TASK)
    ledger.reserve(4, MECHANISM, 1, [0, 1], OTHER)
    ledger.reserve(5, MECHANISM, 1, [0])
    ledger.settle(3, 0, 1)
    for found in (ledger, open_ledger(path)):
        assert (found.round_of(0, TASK), found.round_of(0, OTHER), found.round_of(1, TASK)) == (3, 4, None)


def test_a_task_that_is_no_sha256_is_refused(path: Path) -> None:
    ledger = new_ledger(path)
    for task in ("", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        with pytest.raises(ValueError, match="SHA-256"):
            ledger.reserve(0, MECHANISM, 1, [0], task)
    assert ledger.spent(0) == 0.0


def test_a_ledger_from_before_tasks_were_written_is_read_to_the_byte(path: Path) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0])
    assert b"task" not in path.read_bytes() and b"repeat" not in path.read_bytes()
    assert read_ledger(path)[1].of(0)[0] == Charge(MECHANISM, 5)


def test_a_torn_reservation_keeps_its_task_and_a_torn_repeat_still_counts(path: Path) -> None:
    """Wherever a write is cut, what is charged is at least what was granted, and a repeat is no way around it."""
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0], TASK)
    before = path.stat().st_size
    assert reason(ledger) == ""
    whole = path.read_bytes()
    repeated = 0
    for size in range(before + 1, len(whole)):
        path.write_bytes(whole[:size])
        again = open_ledger(path)
        again.settle(0, 0, 2)
        assert again.spent(0) in (cost(2), cost(5))  # a repeat that was never granted may be lost
        repeated += again.spent(0) == cost(5)
    assert repeated > 60  # all that still say what they are
    for size in range(before - 200, before):
        path.write_bytes(whole[:size])
        assert reason(open_ledger(path)) == ""
        assert open_ledger(path).spent(0) == cost(5) and open_ledger(path).participations(0) == 1


def test_of_two_processes_that_repeat_at_once_both_pass_and_one_charge_stands(path: Path) -> None:
    new_ledger(path).reserve(0, MECHANISM, 5, [0], TASK)

    def repeat(taken: int) -> None:
        ledger = open_ledger(path)
        for _ in range(20):
            assert reason(ledger) == ""
            ledger.settle(0, 0, taken)
        os._exit(0)

    processes = [FORK.Process(target=repeat, args=(taken,)) for taken in (2, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert open_ledger(path).spent(0) == cost(5) and open_ledger(path).participations(0) == 1
    rows, _, fragment = chain.parse(path.read_bytes(), chain.Tail(), name=path.name)
    assert sum(row["kind"] == "repeat" for row in rows) == 40 and not fragment
