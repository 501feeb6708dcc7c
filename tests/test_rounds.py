"""Rounds: pure, independent of order, resumable.

The pools here are plain functions of what they are sent, so that every number can be checked by hand.

Mutants killed: sums in the order of arrival; silence that is no event.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedlr.rounds.round
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Block, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Always, Method, SvdRefactor, full_adapter, keep, trained_block
from fedlr.models.peft_state import adapter_parameters
from fedlr.rounds.round import Dropout, RoundRequest, ServerState, federated_rounds, initial_state, run_round
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.simulate import make_pool
from fedlr.streams import Purpose, stream
from tests.simulations.small_runs import federation
from tests.training.small_models import mutant

B_ONLY, BOTH = frozenset({LORA_B}), frozenset({LORA_A, LORA_B})
FEDSVD = Method("fedsvd", Always(B_ONLY), weighted_mean, SvdRefactor(), full_adapter)
FFA = Method("ffa", Always(B_ONLY), weighted_mean, keep, trained_block)
FEDIT = Method("fedit", Always(BOTH), weighted_mean, keep, full_adapter)


def first_of_all(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    """An aggregate that shows the order it is given."""
    return adapter.with_tensors(next(iter(updates)).tensors)


FIRST = Method("first", Always(B_ONLY), first_of_all, keep, full_adapter)


def start() -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        Slot(path, role): torch.randn(shape, generator=generator)
        for path in ("one", "two")
        for role, shape in ((LORA_A, (2, 5)), (LORA_B, (4, 2)))
    }
    return AdapterState({**tensors, Slot("head", HEAD): torch.zeros(3)}, scale=0.5)


class Devices:
    """A pool of clients with adapters of their own, each of which moves what it trains by its own random step."""

    def __init__(self, enrolled: AdapterState, *, num_clients: int = 6, order: int = 0) -> None:
        self.held = {client: dict(enrolled.tensors) for client in range(num_clients)}
        self.order = order
        self.tasks: list[RoundRequest] = []

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        self.tasks.append(task)
        for client in np.random.default_rng(self.order).permutation(cohort).tolist():
            self.held[client].update({slot: tensor.clone() for slot, tensor in task.broadcast.items()})
            yield ClientUpdate(client, self.step(task.block, client, task.round_index), 1.0, task.round_index)

    def step(self, block: Block, client: int, round_index: int) -> dict[Slot, Tensor]:
        noise = stream(1, Purpose.NOISE, client=client, round_index=round_index)
        chosen = [slot for slot in sorted(self.held[client]) if slot.role in block]
        return {
            s: self.held[client][s] + torch.from_numpy(noise.standard_normal(self.held[client][s].shape)).float()
            for s in chosen
        }


class Answers:
    """A pool that answers from a list."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = outcomes

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[object]:
        yield from self.outcomes


def run(state: ServerState, *, method: Method = FEDSVD, pool: object = None, **changes: int) -> list:
    sizes = {"num_rounds": 6, "num_clients": 6, "cohort_size": 3, "max_participations": 4, "seed": 5}
    pool = pool or Devices(initial_state(start(), method).adapter)
    return list(federated_rounds(state, pool=pool, method=method, **{**sizes, **changes}))


@pytest.mark.parametrize("method", [FEDSVD, FFA, FEDIT], ids=lambda m: m.name)
def test_a_round_leaves_its_state_as_it_was(method: Method) -> None:
    state = initial_state(start(), method)
    before = state.adapter.fingerprint()
    after, diagnostics = run_round(state, [0, 2, 5], pool=Devices(state.adapter), method=method)
    assert (state.adapter.fingerprint(), state.round_index) == (before, 0)
    assert (after.round_index, diagnostics.trained, diagnostics.dropouts) == (1, (0, 2, 5), ())
    assert after.adapter.fingerprint() != before


@pytest.mark.parametrize("method", [FEDSVD, FFA, FEDIT], ids=lambda m: m.name)
@pytest.mark.parametrize(
    "outcomes",
    [(), (Dropout(0, "refused", "budget_exhausted"),), (ClientUpdate(0, {}, 1.0, 0), Dropout(2, "refused", "x"))],
    ids=["silence", "refused", "bad update"],
)
def test_a_round_without_a_usable_update_keeps_the_adapter_and_counts(method: Method, outcomes: tuple) -> None:
    state = ServerState(start(), round_index=3)
    after, diagnostics = run_round(state, [0, 2], pool=Answers(*outcomes), method=method)
    assert after.adapter.fingerprint() == state.adapter.fingerprint()
    assert after.round_index == 4
    assert (diagnostics.trained, diagnostics.bytes_up, diagnostics.aggregation_error) == ((), 0, {})
    assert [dropout.client_id for dropout in diagnostics.dropouts] == [0, 2]


def test_every_client_asked_is_trained_or_a_named_event() -> None:
    devices = Devices(start())
    good = list(devices.train(RoundRequest(0, {}, B_ONLY), [1]))
    pool = Answers(Dropout(4, "refused", "budget_exhausted"), ClientUpdate(3, {}, 1.0, 0), *good)
    _, diagnostics = run_round(ServerState(start()), [1, 3, 4, 5], pool=pool, method=FFA)
    assert diagnostics.trained == (1,)
    assert diagnostics.dropouts == (
        Dropout(3, "rejected", "wrong_keys"),
        Dropout(4, "refused", "budget_exhausted"),
        Dropout(5, "rejected", "no_answer"),
    )


@pytest.mark.parametrize("method", [FEDSVD, FEDIT], ids=lambda m: m.name)
def test_order_of_the_answers_changes_no_bit(method: Method) -> None:
    adapters = {
        run_round(ServerState(start()), [0, 1, 2, 3], pool=Devices(start(), order=order), method=method)[
            0
        ].adapter.fingerprint()
        for order in range(5)
    }
    assert len(adapters) == 1


def test_mean_of_the_updates_is_the_next_adapter() -> None:
    state = ServerState(start())
    after, _ = run_round(state, [1, 4], pool=Devices(start()), method=FFA)
    devices = Devices(start())
    for slot in after.adapter.select(B_ONLY):
        expected = (devices.step(B_ONLY, 1, 0)[slot] + devices.step(B_ONLY, 4, 0)[slot]) / 2
        torch.testing.assert_close(after.adapter.tensors[slot], expected)
    assert torch.equal(after.adapter.tensors[Slot("head", HEAD)], torch.zeros(3))


def test_bytes_are_those_of_the_tensors_that_travel() -> None:
    b, a = 2 * 4 * 2 * 4, 2 * 2 * 5 * 4  # two layers, float32
    for method, up, down in ((FEDSVD, b, a + b), (FFA, b, b), (FEDIT, a + b, a + b)):
        _, diagnostics = run_round(ServerState(start()), [0, 1, 2], pool=Devices(start()), method=method)
        assert (diagnostics.bytes_up, diagnostics.bytes_down) == (3 * up, 3 * down)
    halves = AdapterState({slot: tensor.bfloat16() for slot, tensor in start().tensors.items()}, scale=1.0)
    pool = Answers(ClientUpdate(0, halves.select(B_ONLY), 1.0, 0))
    _, diagnostics = run_round(ServerState(halves), [0], pool=pool, method=FFA)
    assert (diagnostics.bytes_up, diagnostics.bytes_down) == (b / 2, b / 2)


def test_head_trains_when_asked_to() -> None:
    after, _ = run_round(ServerState(start()), [0, 1], pool=Devices(start()), method=FFA, train_head=True)
    assert after.adapter.tensors[Slot("head", HEAD)].norm() > 0


def test_ffa_sends_b_only_and_every_client_keeps_the_same_a_for_ever() -> None:
    adapter = start()
    devices = Devices(adapter)
    run(ServerState(adapter), method=FFA, pool=devices)
    assert all({slot.role for slot in task.broadcast} == {LORA_B} for task in devices.tasks)
    for held in devices.held.values():
        assert all(torch.equal(held[slot], adapter.tensors[slot]) for slot in adapter.tensors if slot.role == LORA_A)


def test_a_real_ffa_worker_holds_the_enrolled_a_after_every_round(tmp_path: Path) -> None:
    f = federation("method=ffa_lora_orthonormal", "trainer.engine=opacus")
    enrolled = {s: t for s, t in f.start.adapter.tensors.items() if s.role == LORA_A}
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        state = f.start
        for cohort in ([0, 1], [1, 2, 3]):
            state, _ = run_round(state, cohort, pool=pool, method=f.method)
            worker = pool._workers.get()
            trained, _ = worker.start_from(f.start.adapter, f.request().block)
            pool._workers.put(worker)
            held = adapter_parameters(worker.model)
            assert all(torch.equal(held[slot], tensor) for slot, tensor in enrolled.items())
            assert all(torch.equal(state.adapter.tensors[slot], tensor) for slot, tensor in enrolled.items())
            assert {slot.role for slot in trained} == {LORA_B}


def test_fedsvd_clients_hold_the_servers_a_in_every_round() -> None:
    state = initial_state(start(), FEDSVD)
    devices = Devices(state.adapter)
    for round_index in range(3):
        new, _ = run_round(state, list(range(6)), pool=devices, method=FEDSVD)
        for held in devices.held.values():
            assert all(torch.equal(held[s], state.adapter.tensors[s]) for s in held if s.role == LORA_A)
        assert not torch.equal(new.adapter.tensors[Slot("one", LORA_A)], state.adapter.tensors[Slot("one", LORA_A)])
        for layer in new.adapter.factors().values():
            torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(2), rtol=0, atol=1e-5)
        state = new
        assert state.round_index == round_index + 1


@pytest.mark.parametrize("method", [FEDSVD, FEDIT], ids=lambda m: m.name)
def test_a_run_goes_on_from_any_state_to_the_same_end(method: Method) -> None:
    whole = run(initial_state(start(), method), method=method)
    assert [state.round_index for state, _ in whole] == [1, 2, 3, 4, 5, 6]
    for stop in range(5):
        rest = run(whole[stop][0], method=method)
        assert [s.adapter.fingerprint() for s, _ in rest] == [s.adapter.fingerprint() for s, _ in whole[stop + 1 :]]
        assert [d.cohort for _, d in rest] == [d.cohort for _, d in whole[stop + 1 :]]
    assert run(whole[-1][0], method=method) == []


def test_an_abandoned_run_has_trained_no_further_round() -> None:
    devices = Devices(start())
    sizes = {"num_rounds": 9, "num_clients": 6, "cohort_size": 2, "max_participations": 9, "seed": 0}
    rounds = federated_rounds(ServerState(start()), pool=devices, method=FEDSVD, **sizes)
    for _ in itertools.islice(rounds, 2):
        pass
    assert len(devices.tasks) == 2


def test_rounds_go_on_when_every_client_has_had_its_turns() -> None:
    states = run(ServerState(start()), num_clients=2, cohort_size=2, max_participations=2, num_rounds=4)
    assert [diagnostics.cohort for _, diagnostics in states] == [(0, 1), (0, 1), (), ()]
    assert states[-1][0].adapter.fingerprint() == states[1][0].adapter.fingerprint()


@pytest.mark.parametrize("cohort_size", [0, 7, -1])
def test_a_cohort_that_cannot_be_is_refused(cohort_size: int) -> None:
    with pytest.raises(InputError, match=f"num_clients=6.*got {cohort_size}"):
        run(ServerState(start()), cohort_size=cohort_size)


def test_silence_that_is_no_event_is_seen() -> None:
    deaf = mutant(fedlr.rounds.round, ("if client not in heard]", "if False]"))
    _, diagnostics = deaf.run_round(ServerState(start()), [0, 2], pool=Answers(), method=FFA)
    assert diagnostics.dropouts == ()
    _, diagnostics = run_round(ServerState(start()), [0, 2], pool=Answers(), method=FFA)
    assert diagnostics.dropouts == (Dropout(0, "rejected", "no_answer"), Dropout(2, "rejected", "no_answer"))
