"""What a device said of its ledger stands: epsilon that falls, and an older last row, are refused by name.

Mutants killed: a server that believes the last word; one that forgets what it heard when it is restarted; a head that
is compared with the newest alone; a reply sent again that is taken for an old ledger.
"""

import json

import pytest

import fedlr.server.reports
from fedlr.flower.messages import ReplyFacts
from fedlr.flower.records import RecordDict
from fedlr.rounds.round import ServerState, run_round
from fedlr.server.pool import GridPool
from fedlr.server.reports import Reports
from fedlr.server.run import Progress
from tests.server.direct_grid import DirectGrid
from tests.server.malformed import Honest
from tests.server.small_federation import FEDIT, TERMS, adapter, reasons
from tests.training.small_models import mutant

HEADS = ["a" * 64, "b" * 64, "c" * 64]


def said(epsilon: float, head: str, *, refused: str | None = None) -> ReplyFacts:
    return ReplyFacts(
        experiment_id=TERMS.experiment_id,
        client_id=2,
        round_index=0,
        task_sha256="0" * 64,
        refused=refused,
        epsilon=epsilon,
        delta=1e-5,
        ledger_head=head,
    )


def hear(reports: Reports, *words: tuple[float, str, str]) -> list[str | None]:
    return [reports.hear(2, said(epsilon, head), task) for epsilon, head, task in words]


def a_word_stands(module: object = fedlr.server.reports) -> None:
    reports = module.Reports()
    assert hear(reports, (5.0, HEADS[0], "t0"), (1.0, HEADS[1], "t1"), (0.0, HEADS[2], "t2")) == [
        None,
        "epsilon_fell",
        "epsilon_fell",
    ]
    assert reports.epsilon == {2: 5.0}
    reports = module.Reports.of(json.loads(json.dumps(reports.facts())))  # killed, and started again
    assert hear(reports, (4.0, HEADS[1], "t3")) == ["epsilon_fell"]
    assert (reports.epsilon, reports.last_heads()) == ({2: 5.0}, {2: HEADS[0]})


def a_ledger_moves_on(module: object = fedlr.server.reports) -> None:
    reports = module.Reports()
    words = (1.0, HEADS[0], "t0"), (1.0, HEADS[0], "t0"), (2.0, HEADS[1], "t1"), (2.5, HEADS[0], "t2")
    assert hear(reports, *words, (2.5, HEADS[1], "t2")) == [None, None, None, "old_ledger", "old_ledger"]
    reports = module.Reports.of(reports.facts())
    assert hear(reports, (2.5, HEADS[1], "t3"), (2.5, HEADS[2], "t3")) == ["old_ledger", None]


def test_epsilon_that_falls_is_refused_and_the_highest_stands() -> None:
    a_word_stands()


def test_a_ledger_that_did_not_move_on_is_refused_and_a_reply_sent_again_is_not() -> None:
    a_ledger_moves_on()


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (a_word_stands, ("max(before, facts.epsilon)", "facts.epsilon")),
        (a_word_stands, ("if facts.epsilon < before * (1 - ROUNDING):", "if False:")),
        (a_word_stands, ("{int(client): float(value) for", "{int(client): 0.0 * float(value) for")),
        (a_ledger_moves_on, ("if facts.ledger_head in heads:", "if heads[-1:] == [facts.ledger_head]:")),
        (a_ledger_moves_on, ("return None if is_again else OLD", "return OLD")),
        (a_ledger_moves_on, ("return None if is_again else OLD", "return None")),
    ],
    ids=["the last word", "no check", "forgets at a restart", "the newest head alone", "nothing twice", "any head"],
)
def test_a_server_that_lets_a_word_be_taken_back_is_seen(check: object, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(mutant(fedlr.server.reports, change))  # type: ignore[operator]


def test_a_round_goes_on_without_the_device_that_takes_its_word_back() -> None:
    told = {1: [(5.0, HEADS[0]), (1.0, HEADS[1])], 2: [(5.0, HEADS[0]), (5.5, HEADS[1])]}

    def answer(record: RecordDict) -> RecordDict:
        honest = Honest.to(record)
        epsilon, head = told[honest.facts["client_id"]].pop(0)
        return honest.record(epsilon=epsilon, ledger_head=head)

    grid, reports = DirectGrid({1: answer, 2: answer}), Reports()
    state = ServerState(adapter())
    for refused in ({}, {1: "epsilon_fell"}):
        pool = GridPool(
            grid, grid, terms=TERMS, enrolled=adapter(), deadline_s=60, quorum=1, poll_s=0.001, reports=reports
        )
        state, diagnostics = run_round(state, [1, 2], pool=pool, method=FEDIT)
        assert reasons(diagnostics) == refused
    assert reports.epsilon == {1: 5.0, 2: 5.5}


def test_a_refusal_may_come_with_the_head_of_before() -> None:
    reports = Reports()
    assert hear(reports, (1.0, HEADS[0], "t0")) == [None]
    assert reports.hear(2, said(1.0, HEADS[0], refused="budget_exhausted"), "t1") is None
    assert reports.last_heads() == {2: HEADS[0]}


def test_rounding_of_an_accountant_is_no_fall() -> None:
    assert hear(Reports(), (5.0, HEADS[0], "t0"), (4.9999, HEADS[1], "t1")) == [None, None]


def test_a_checkpoint_of_before_kept_one_head_a_client() -> None:
    facts = {"epsilon": {"2": 1.5}, "ledger_heads": {"2": HEADS[0]}, "participations": {}, "seconds": 0.0}
    progress = Progress.of(None, facts)  # type: ignore[arg-type]
    assert progress.reports == Reports({2: 1.5}, {2: [HEADS[0]]})
