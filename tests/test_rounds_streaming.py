"""A round holds a handful of updates however large its cohort, and its result depends on no schedule of the pool.

Mutants killed: a round that lists its updates; updates used in the order they arrive; a client whose only answer
is bad, for whom all others wait; an aggregator that is called with nothing; rounds that draw every cohort anew.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import ModuleType

import numpy as np
import pytest
import torch

import fedlr.methods.aggregate.mean
import fedlr.rounds.cohorts
import fedlr.rounds.round
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.methods.aggregate.fair import LoraFair, LoraFairRidge
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Always, Method, full_adapter, keep
from fedlr.rounds.cohorts import cohorts, sample_cohort
from fedlr.rounds.outlying import NUM_REFERENCES
from fedlr.rounds.round import Dropout, RoundRequest, ServerState, run_round
from fedlr.streams import Purpose, stream
from tests.training.small_models import mutant

A, B = Slot("layer", LORA_A), Slot("layer", LORA_B)
ADAPTER = AdapterState({A: torch.ones(2, 6) + torch.eye(2, 6), B: torch.zeros(4, 2)}, scale=1.0)
B_ONLY, BOTH = Always([LORA_B]), Always([LORA_A, LORA_B])
MEAN = Method("mean", B_ONLY, weighted_mean, keep, full_adapter)
FEDIT = Method("fedit", BOTH, weighted_mean, keep, full_adapter)
FAIR = Method("fair", BOTH, LoraFair(num_steps=3), keep, full_adapter)
RIDGE = Method("ridge", BOTH, LoraFairRidge(), keep, full_adapter)


def update(client: int, *, base_round: int = 0, roles: Iterable[str] = (LORA_B,)) -> ClientUpdate:
    noise = stream(1, Purpose.NOISE, client=client)
    chosen = {slot: t for slot, t in ADAPTER.tensors.items() if slot.role in set(roles)}
    new = {s: t + torch.from_numpy(noise.standard_normal(t.shape)).float() for s, t in chosen.items()}
    return ClientUpdate(client, new, 1.0 + client % 3, base_round)


@dataclass
class Counting:
    """A pool that answers in a given order and counts how many of its updates are alive at once."""

    order: Sequence[int]
    bad: frozenset[int] = frozenset()
    most_alive: int = 0
    alive: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        for client in self.order:
            answer = update(client, base_round=-1 if client in self.bad else 0, roles=task.block)
            self.alive.update(answer.tensors.values())
            self.most_alive = max(self.most_alive, len({id(t) for t in self.alive}))
            yield answer
            del answer


def most_alive(module: ModuleType, method: Method, order: Sequence[int], *, bad: Iterable[int] = ()) -> int:
    """Run a round of 1,000 clients and return how many of their updates were alive at the worst moment."""
    pool = Counting(order, bad=frozenset(bad))
    gc.disable()  # what only a collection of cycles would free counts as alive
    try:
        _, diagnostics = module.run_round(ServerState(ADAPTER), range(1000), pool=pool, method=method)
    finally:
        gc.enable()
    assert len(diagnostics.trained) == 1000 - len(pool.bad)
    assert set(diagnostics.aggregation_error) == {"layer"}
    return -(-pool.most_alive // len(ADAPTER.select(method.block_schedule(0, ADAPTER))))


@pytest.mark.parametrize("method", [MEAN, FEDIT, FAIR, RIDGE], ids=lambda m: m.name)
def test_a_round_of_a_thousand_clients_holds_a_handful_of_updates(method: Method) -> None:
    assert most_alive(fedlr.rounds.round, method, range(1000)) <= NUM_REFERENCES + 5


def test_updates_out_of_order_are_held_only_until_their_turn() -> None:
    swapped = [client ^ 1 for client in range(1000)]
    assert most_alive(fedlr.rounds.round, MEAN, swapped) <= NUM_REFERENCES + 6
    blocks = [10 * (k // 10) + 9 - k % 10 for k in range(1000)]  # each ten clients backwards
    assert most_alive(fedlr.rounds.round, MEAN, blocks) <= NUM_REFERENCES + 15


def test_a_client_that_only_sends_what_cannot_be_used_does_not_make_the_server_hold_all_others() -> None:
    assert (
        most_alive(fedlr.rounds.round, MEAN, range(1000), bad=[0, 500])
        <= fedlr.rounds.round.MOST_HELD + NUM_REFERENCES + 5
    )


def listing(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    return weighted_mean(adapter, list(updates))


@pytest.mark.parametrize("name", ["aggregator", "round", "patience"])
def test_rounds_that_hold_every_update_are_seen(name: str) -> None:
    module, method, bad = fedlr.rounds.round, MEAN, []
    if name == "aggregator":
        method = Method("list", B_ONLY, listing, keep, full_adapter)
    elif name == "round":
        module = mutant(module, ("iter(answers), Ideal", "iter(list(answers)), Ideal"))
    else:
        module, bad = mutant(module, ("MOST_HELD = 64", "MOST_HELD = 10**9")), [0]
    assert most_alive(module, method, range(1000), bad=bad) >= 990


def outcomes(module: ModuleType, seed: int) -> list[ClientUpdate | Dropout]:
    """Twelve clients' answers: good, refused, bad, bad then good, good twice, and two that are silent."""
    good = {client: update(client) for client in range(12)}
    answers: dict[int, list] = {client: [good[client]] for client in range(12)}
    answers[2] = [module.Dropout(2, "refused", "budget_exhausted")]
    answers[3] = [update(3, base_round=7)]
    answers[4] = [update(4, base_round=7), good[4]]
    answers[5] = [good[5], update(5)]
    answers[8], answers[11] = [], []
    order = np.random.default_rng(seed).permutation([c for c, sent in answers.items() for _ in sent])
    return [answers[client].pop(0) for client in order.tolist()]


class Answers:
    """A pool that answers from a list."""

    def __init__(self, *sent: ClientUpdate | Dropout) -> None:
        self.sent = sent

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        yield from self.sent


def no_schedule_matters(module: ModuleType) -> None:
    """Every order in which the clients' own sequences can interleave gives the same bits and the same events."""
    found = set()
    for seed in range(40):
        state, d = module.run_round(ServerState(ADAPTER), range(12), pool=Answers(*outcomes(module, seed)), method=MEAN)
        assert d.trained == (0, 1, 4, 5, 6, 7, 9, 10)
        found.add((state.adapter.fingerprint(), str(d.dropouts), d.bytes_up, str(d.aggregation_error)))
    ((_, dropouts, bytes_up, _),) = found
    assert bytes_up == 8 * 4 * 2 * 4
    expected = (
        Dropout(2, "refused", "budget_exhausted"),
        Dropout(3, "rejected", "wrong_round"),
        Dropout(4, "rejected", "wrong_round"),
        Dropout(5, "rejected", "duplicate"),
        Dropout(8, "rejected", "no_answer"),
        Dropout(11, "rejected", "no_answer"),
    )
    assert dropouts == str(expected)


def test_no_schedule_of_the_pool_matters() -> None:
    no_schedule_matters(fedlr.rounds.round)


@pytest.mark.parametrize(
    "change",
    [
        ("while waiting and (waiting[0] in over", "waiting = deque(sorted(held))\n            while waiting and (True"),
        ("(waiting[0] in over or", "(waiting[0] in heard or"),
        ("for client in sorted(held):", "for client in list(held):"),
    ],
    ids=["order of arrival", "a bad update uses up the turn", "the last ones unsorted"],
)
def test_schedules_that_matter_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        no_schedule_matters(mutant(fedlr.rounds.round, change))


def test_a_dropout_is_the_pools_last_word() -> None:
    late = Answers(Dropout(0, "refused", "x"), update(1), update(0))
    _, diagnostics = run_round(ServerState(ADAPTER), [0, 1], pool=late, method=MEAN)
    assert diagnostics.trained == (1,)
    assert diagnostics.dropouts == (Dropout(0, "refused", "x"), Dropout(0, "rejected", "duplicate"))


def test_the_aggregator_is_never_called_without_an_update() -> None:
    def refuses_nothing(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        assert next(iter(updates), None) is not None
        return adapter

    method = Method("some", B_ONLY, refuses_nothing, keep, full_adapter)
    for sent in ((), (update(0, base_round=1),), (Dropout(0, "refused", "x"),)):
        state, diagnostics = run_round(ServerState(ADAPTER), [0, 1], pool=Answers(*sent), method=method)
        assert state.adapter is ADAPTER and diagnostics.trained == ()


def test_a_rule_that_stops_early_leaves_whole_diagnostics() -> None:
    def first(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        return adapter.with_tensors(next(iter(updates)).tensors)

    sent = [update(client) for client in range(5)]
    _, whole = run_round(ServerState(ADAPTER), range(5), pool=Answers(*sent), method=MEAN)
    _, early = run_round(
        ServerState(ADAPTER), range(5), pool=Answers(*sent), method=Method("first", B_ONLY, first, keep, full_adapter)
    )
    assert (early.trained, early.bytes_up) == (whole.trained, whole.bytes_up)
    assert early.aggregation_error["layer"] > 0.1 > whole.aggregation_error["layer"]


def test_waiting_for_the_pool_and_adding_up_are_timed_apart() -> None:
    _, diagnostics = run_round(ServerState(ADAPTER), range(50), pool=Counting(range(50)), method=MEAN)
    assert diagnostics.train_s > 0 and diagnostics.aggregate_s > 0


@pytest.mark.parametrize("most", [1, 3, 99])
def test_cohorts_one_after_the_other_are_those_drawn_alone(most: int) -> None:
    arguments = {"seed": 9, "num_clients": 30, "cohort_size": 7, "max_participations": most}
    drawn = list(islice(cohorts(**arguments), 14))
    assert drawn == [sample_cohort(round_index=index, **arguments) for index in range(14)]


def test_a_run_draws_each_cohort_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting_stream(seed: int, purpose: Purpose, **key: int) -> np.random.Generator:
        asked.append(key["round_index"])
        return stream(seed, purpose, **key)

    monkeypatch.setattr(fedlr.rounds.cohorts, "stream", counting_stream)
    sizes = {"num_rounds": 20, "num_clients": 6, "cohort_size": 3, "max_participations": 20, "seed": 5}
    rounds = fedlr.rounds.round.federated_rounds(ServerState(ADAPTER), pool=Answers(), method=MEAN, **sizes)
    assert len(list(rounds)) == 20 and asked == list(range(20))
