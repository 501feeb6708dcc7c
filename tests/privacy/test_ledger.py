"""The ledger charges before data are read, refuses in time, and forgets nothing (R-L1 to R-L4, R-L7).

Mutants this file kills: reserving after the answer, settling that frees an open reservation, a refusal that writes, a
budget compared before instead of after the reservation, a second reservation of a round that is free or counts twice,
memory that other processes do not see, a restart that starts at zero, an average instead of a client's own spending,
a lock shared by threads or forked children, reservation by reservation with one fsync each, settlements written before
a wrong one is found.
"""

import fcntl
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedlr.errors import InputError
from fedlr.files import NotWritten
from fedlr.privacy import accountant, chain, filter
from fedlr.privacy.charges import Charges
from fedlr.privacy.ledger import PrivacyLedger, Refusal
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from tests.privacy.ledger_rows import BUDGET, MECHANISM, cost, new_ledger, open_ledger, steps_within_budget

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_a_reservation_is_on_disk_before_the_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a cohort in one row, one write and one fsync, under one lock."""
    ledger, calls = new_ledger(path), []
    monkeypatch.setattr(os, "fsync", lambda file, real=os.fsync: (calls.append(path.read_bytes()), real(file)))
    assert ledger.reserve(0, MECHANISM, 5, [4, 1, 3]) == {4: None, 1: None, 3: None}
    assert len(calls) == 1 and calls[0].count(b'"reserve_cohort"') == 1 and b'"client_ids":[4,1,3]' in calls[0]
    assert open_ledger(path).spent(3) == cost(5)


def test_a_reservation_that_is_never_settled_counts_in_full(path: Path) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0, 1])
    ledger.settle(0, 0, 2)
    assert ledger.spent(0) == cost(2) and ledger.spent(1) == cost(5) and ledger.spent(2) == 0.0
    assert open_ledger(path).spent(1) == cost(5)


def test_epsilon_composes_over_rounds_and_mechanisms(path: Path) -> None:
    ledger = new_ledger(path)
    for round_index in range(4):
        ledger.reserve(round_index, MECHANISM, 3, [7])
        ledger.settle(round_index, 7, 3)
    assert ledger.spent(7) == cost(12) < 4 * cost(3)
    other = Mechanism(noise_multiplier=25.0, max_grad_norm=0.5, sample_rate=1.0, divisor=8.0)
    ledger.reserve(4, other, 3, [7])
    assert cost(12) < ledger.spent(7) <= BUDGET.epsilon, "by the one order of the filter"
    assert ledger.participations(7) == 5 and ledger.participations(8) == 0


def test_a_client_is_refused_exactly_at_the_step_that_would_exceed(path: Path) -> None:
    last = steps_within_budget()
    ledger = new_ledger(path)
    assert ledger.reserve(0, MECHANISM, last - 1, [0, 1])[0] is None
    before = path.read_bytes()
    expected = Refusal("budget_exhausted", cost(last - 1), cost(last + 1))
    assert ledger.reserve(1, MECHANISM, 2, [0]) == {0: expected}
    assert path.read_bytes() == before, "a refusal writes nothing"
    assert ledger.reserve(1, MECHANISM, 1, [0]) == {0: None}
    assert ledger.spent(0) <= BUDGET.epsilon < cost(last + 1)
    assert isinstance(ledger.reserve(2, MECHANISM, 1, [0])[0], Refusal)


def refused_just_above(path: Path) -> None:
    """The check that mutants fail: a budget one float below the cost refuses it, the cost itself allows it."""
    for budget, refused in ((math.nextafter(cost(5), 0), True), (cost(5), False)):
        path.unlink(missing_ok=True)
        answer = new_ledger(path, budget=PrivacyBudget(budget, BUDGET.delta)).reserve(0, MECHANISM, 5, [0])[0]
        assert (answer is not None) == refused


def test_not_a_float_more_than_the_budget_is_allowed(path: Path) -> None:
    refused_just_above(path)


def test_a_tolerance_above_the_budget_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`afterwards <= 1.001 * budget`, and a part in 10^12."""
    real = Charges.epsilon_with
    for tolerance in (1.001, 1 + 1e-12):
        monkeypatch.setattr(Charges, "epsilon_with", lambda *given, t=tolerance: real(*given) / t)
        with pytest.raises(AssertionError):
            refused_just_above(path)


def name_reaches_the_disk(path: Path) -> None:
    """The check that mutants fail: after the rows the folder is synced, or a crash would lose the whole file."""
    synced: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda file, real=os.fsync: (synced.append(os.readlink(f"/proc/self/fd/{file}")), real(file))
        )
        new_ledger(path)
    assert synced == [str(path.resolve()), str(path.parent.resolve())]


def test_the_name_of_a_new_ledger_reaches_the_disk(path: Path) -> None:
    name_reaches_the_disk(path)


def test_a_folder_that_is_not_synced_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(path: Path, first: chain.Row) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        chain.append(file, chain.Tail(), [first])
        os.close(file)

    monkeypatch.setattr(chain, "create", create)
    with pytest.raises(AssertionError):
        name_reaches_the_disk(path)


def test_one_exhausted_client_does_not_stop_the_others(path: Path) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, steps_within_budget(), [2])
    answers = ledger.reserve(1, MECHANISM, 5, [1, 2, 3])
    assert answers[1] is None and answers[3] is None
    assert answers[2] is not None and answers[2].reason == "budget_exhausted"
    assert ledger.participations(2) == 1 and ledger.participations(3) == 1


def test_steps_without_noise_are_always_refused(path: Path) -> None:
    silent = Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, divisor=1.0)
    answer = new_ledger(path).reserve(0, silent, 1, [0])[0]
    assert answer is not None and answer.epsilon_if_trained == float("inf")


def test_a_round_is_reserved_once_for_each_client(path: Path) -> None:
    """Again would be charged twice if it were counted, and free if it were not."""
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0])
    for again in (ledger, open_ledger(path)):
        assert again.reserve(0, MECHANISM, 1, [0]) == {0: Refusal("already_reserved", cost(5), cost(5))}
    ledger.settle(0, 0, 0)
    assert ledger.reserve(0, MECHANISM, 1, [0])[0] is not None, "settled or not"
    assert ledger.participations(0) == 1


@pytest.mark.parametrize(("round_index", "client", "steps"), [(0, 0, 6), (0, 0, -1), (1, 0, 1), (0, 1, 1)])
def test_only_what_was_reserved_can_be_settled(path: Path, round_index: int, client: int, steps: int) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0])
    with pytest.raises(ValueError, match="Expected"):
        ledger.settle(round_index, client, steps)
    assert ledger.spent(0) == cost(5)


def test_a_settled_round_cannot_be_settled_down(path: Path) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0])
    ledger.settle(0, 0, 4)
    with pytest.raises(ValueError, match="open reservation"):
        ledger.settle(0, 0, 1)


def test_a_cohort_is_settled_by_one_write_under_one_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, synced, locked = new_ledger(path), [], []
    ledger.reserve(0, MECHANISM, 5, range(100))
    monkeypatch.setattr(os, "fsync", lambda file, real=os.fsync: (synced.append(path.read_bytes()), real(file)))
    monkeypatch.setattr(fcntl, "flock", lambda file, kind, real=fcntl.flock: (locked.append(kind), real(file, kind)))
    ledger.settle_all(0, {client: client % 6 for client in range(99)})
    assert (len(synced), len(locked)) == (1, 1) and synced[0].count(
        b'"settle_cohort"'
    ) == 6  # one for each number of steps
    spent = ledger.spent_all(range(101))
    assert len(locked) == 2
    assert [spent[client] for client in (0, 1, 4, 5, 99, 100)] == [0.0, cost(1), cost(4), cost(5), cost(5), 0.0]
    assert spent == {client: open_ledger(path).spent(client) for client in range(101)}


@pytest.mark.parametrize("wrong", [{2: 6}, {2: -1}, {7: 1}, {0: 1}], ids=["more", "negative", "a stranger", "settled"])
def test_a_cohort_with_one_wrong_settlement_settles_nobody(path: Path, wrong: dict[int, int]) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 5, [0, 1, 2])
    ledger.settle(0, 0, 5)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Expected"):
        ledger.settle_all(0, {1: 3, **wrong})
    assert path.read_bytes() == before and ledger.spent(1) == cost(5)


def test_a_settlement_of_nobody_writes_nothing(path: Path) -> None:
    ledger = new_ledger(path)
    before = path.read_bytes()
    ledger.settle_all(0, {})
    assert path.read_bytes() == before and ledger.spent_all([]) == {}


def test_ten_thousand_clients_are_one_computation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows with the clients is reading and writing; clients at the same steps share one epsilon."""
    ledger, composed = new_ledger(path), []
    monkeypatch.setattr(accountant, "_renyi", lambda *given, real=accountant._renyi: composed.append(1) or real(*given))
    accountant._epsilon.cache_clear()
    filter.spent.cache_clear()
    ledger.reserve(0, MECHANISM, 5, range(10_000))
    ledger.settle_all(0, dict.fromkeys(range(10_000), 5))
    assert len(set(ledger.spent_all(range(10_000)).values())) == 1 and len(composed) == 1


@pytest.mark.parametrize("cohort", [[1, 1], [-1]])
def test_a_cohort_with_repetition_or_negative_ids_is_refused(path: Path, cohort: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct clients"):
        new_ledger(path).reserve(0, MECHANISM, 1, cohort)


def test_numbers_of_numpy_are_written_like_others(path: Path) -> None:
    ledger = new_ledger(path)
    assert ledger.reserve(np.int64(0), MECHANISM, np.int64(2), np.arange(2)) == {0: None, 1: None}
    ledger.settle(np.int64(0), np.int64(1), np.int64(2))
    assert open_ledger(path).spent(1) == cost(2)


def test_restarts_give_nothing_back(path: Path) -> None:
    new_ledger(path).reserve(0, MECHANISM, steps_within_budget(), [0])
    for attempt in range(50):
        assert open_ledger(path).reserve(1 + attempt, MECHANISM, 1, [0])[0] is not None
    assert open_ledger(path).spent(0) == cost(steps_within_budget())


def test_a_missing_ledger_is_not_an_unspent_budget(path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        open_ledger(path)
    ledger = new_ledger(path)
    path.unlink()
    with pytest.raises(InputError, match="no file"):
        ledger.reserve(0, MECHANISM, 1, [0])
    assert not path.exists()


def test_an_existing_ledger_is_never_overwritten(path: Path) -> None:
    new_ledger(path).reserve(0, MECHANISM, 5, [0])
    with pytest.raises(InputError, match="existing file"):
        new_ledger(path)
    assert open_ledger(path).spent(0) == cost(5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": PrivacyBudget(3.0, 1e-5)}, "epsilon=3.0 in row 0 .* got 2.0"),
        ({"budget": PrivacyBudget(2.0, 1e-6)}, "delta=1e-06 in row 0 .* got 1e-05"),
        ({"dataset_id": "mails"}, "dataset_id='mails' in row 0 .* got 'reviews'"),
        ({"accountant": "pld"}, "accountant='pld' in row 0"),
        ({"randomness": "os"}, "randomness='os' in row 0"),
    ],
)
def test_a_ledger_of_something_else_is_refused_by_value(path: Path, change: dict, text: str) -> None:
    new_ledger(path)
    with pytest.raises(InputError, match=text):
        open_ledger(path, **change)


@pytest.mark.parametrize("change", [{"randomness": "dice"}, {"accountant": "prv"}, {"dataset_id": ""}])
def test_a_ledger_of_nothing_known_is_not_created(path: Path, change: dict) -> None:
    with pytest.raises(InputError, match="Expected"):
        new_ledger(path, **change)
    assert not path.exists()


def test_only_the_owner_reads_the_ledger(path: Path) -> None:
    new_ledger(path)
    assert path.stat().st_mode & 0o077 == 0


def reserve_many(path: Path, first_round: int, clients: list[int], accepted: "multiprocessing.Queue[int]") -> None:
    ledger = open_ledger(path)
    answers = [ledger.reserve(first_round + i, MECHANISM, 1, clients) for i in range(25)]
    accepted.put(sum(answer is None for answer_of in answers for answer in answer_of.values()))


def run_processes(path: Path, clients: list[int]) -> int:
    accepted = FORK.Queue()
    workers = [FORK.Process(target=reserve_many, args=(path, 25 * n, clients, accepted)) for n in range(4)]
    for worker in workers:
        worker.start()
    total = sum(accepted.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    return total


def test_four_processes_lose_and_double_no_reservation(path: Path) -> None:
    new_ledger(path)
    assert steps_within_budget() < 100, "else the budget is not what stops them"
    assert run_processes(path, [0]) == steps_within_budget()
    assert open_ledger(path).participations(0) == steps_within_budget()
    assert open_ledger(path).spent(0) == cost(steps_within_budget())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["round_index"] for row in rows[1:]}) == len(rows) - 1 == steps_within_budget()


def test_four_processes_within_the_budget_are_counted_exactly(path: Path) -> None:
    quiet = Mechanism(noise_multiplier=400.0, max_grad_norm=0.5, sample_rate=1.0, divisor=8.0)
    ledger = new_ledger(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "MECHANISM", quiet)
        assert run_processes(path, [0, 1]) == 200
    assert ledger.participations(0) == ledger.participations(1) == 100
    assert ledger.spent(0) == cost(100, quiet)


def test_threads_of_one_ledger_exclude_each_other(path: Path) -> None:
    ledger = new_ledger(path)
    work = [lambda n=n: [ledger.reserve(10 * n + i, MECHANISM, 1, [n]) for i in range(10)] for n in range(4)]
    threads = [threading.Thread(target=task) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [open_ledger(path).participations(n) for n in range(4)] == [10] * 4


def train_until_killed(path: Path, steps_file: Path) -> None:
    ledger = open_ledger(path)
    with steps_file.open("ab", buffering=0) as taken:
        for round_index in range(len(ledger._charges.of(0)), 10_000):
            if ledger.reserve(round_index, Mechanism(900.0, 1.0, 1.0, 1.0), 3, [0])[0] is None:
                taken.write(b"...")
                ledger.settle(round_index, 0, 3)


def test_a_killed_client_was_charged_for_every_step_it_took(path: Path, tmp_path: Path) -> None:
    """20 kills at any instant: the ledger never says less than the truth, and at most one round more a kill."""
    new_ledger(path)
    steps_file = tmp_path / "steps"
    steps_file.touch()
    pause = np.random.default_rng(3)
    for kill in range(1, 21):
        worker = FORK.Process(target=train_until_killed, args=(path, steps_file))
        worker.start()
        time.sleep(pause.uniform(0.005, 0.05))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        charged = sum(charge.steps for charge in open_ledger(path)._charges.of(0).values())
        assert 0 <= charged - steps_file.stat().st_size <= 3 * kill
    assert steps_file.stat().st_size > 0


def test_a_lock_ends_with_its_holder(path: Path) -> None:
    ledger = new_ledger(path)
    holding = FORK.Event()

    def hold() -> None:
        with ledger._lock():
            holding.set()
            time.sleep(60)

    worker = FORK.Process(target=hold)
    worker.start()
    assert holding.wait(10)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    ledger.reserve(0, MECHANISM, 1, [0])  # would wait for ever


def test_a_full_disk_stops_training_and_loses_no_charge(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = new_ledger(path)
    ledger.reserve(0, MECHANISM, 2, [0])

    def half(file: int, data: bytes, real=os.write) -> int:
        real(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(NotWritten, match="ledger.jsonl, got: No space"):
            ledger.reserve(1, MECHANISM, 2, [0, 1, 2, 3])
    assert ledger.spent(0) >= cost(2)
    assert ledger.reserve(2, MECHANISM, 2, [0])[0] is None
    assert open_ledger(path).spent(0) == ledger.spent(0)


def test_head_changes_with_every_row_and_is_the_same_for_all_readers(path: Path) -> None:
    ledger: PrivacyLedger = new_ledger(path)
    heads = [ledger.head()]
    ledger.reserve(0, MECHANISM, 1, [0])
    heads.append(ledger.head())
    ledger.settle(0, 0, 1)
    heads.append(ledger.head())
    assert len(set(heads)) == 3 and open_ledger(path).head() == heads[-1]
    assert json.loads(path.read_text().splitlines()[-1])["hash"] == heads[-1]
