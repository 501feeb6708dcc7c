"""Clients that train together: the ledger leads, each client's noise is its own, and one by one gives the same numbers.

A check takes the pool's module, the shipped one or a mutant of its source. Mutants killed: no reservation; one after
the training; an update that leaves before its settlement; a settlement of less, or of another group; refused clients
that train; a weight, a tensor or a group that depends on the number of rows; an engine that forgets the scale or
credits the next client.
"""

import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import fedlr.rounds.pools.fused as pool_module
import fedlr.training.cohort as cohort_module
import fedlr.training.fused as fused
import fedlr.training.parity as parity_module
from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.privacy.charges import read_ledger
from fedlr.rounds.pools.fused import FusedPool, group_size
from fedlr.rounds.pools.local import LocalPool
from fedlr.rounds.round import Dropout, run_round
from fedlr.simulations.federation import Federation
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool
from fedlr.streams import OsRandomness
from tests.simulations.small_runs import federation, first_task, open_ledger, rounds
from tests.training.cohort_runs import engine_over
from tests.training.small_models import mutant

RESERVES = "admitted, refused = self._accounts.reserve(task, cohort, self.kept)"
SETTLES = "self._accounts.settle(task.round_index, dict.fromkeys(group, steps))"
YIELDS = "            yield ClientUpdate(client, sent, self._weights[client], task.round_index)\n"
CHARGES_NOW = "self._accounts._ledger.reserve(task.round_index, self._mechanism, steps, list(group)); "


class Watching:
    """Stands where a federation's randomness does, and calls `watch` before each client's rows of a step are drawn."""

    def __init__(self, f: Federation, watch: object) -> None:
        self._randomness, self._watch = f.randomness, watch

    def sampling(self, **key: int) -> np.random.Generator:
        self._watch(**key)
        return self._randomness.sampling(**key)

    def noise(self, **key: int) -> np.random.Generator:
        return self._randomness.noise(**key)


def pool_of(module: ModuleType, f: Federation, ledger: object, **changes: object) -> FusedPool:
    return module.FusedPool(
        f.working,
        f.clients,
        enrolled=f.start.adapter,
        training=f.training,
        mechanism=f.mechanism,
        ledger=ledger,
        randomness=f.randomness,
        weights=f.weights,
        **{"num_workers": 1, "memory_gb": None, "check_parity": False, **changes},
    )


def groups_of(f: Federation, number: int) -> float:
    """Return the memory in which that many clients train at once."""
    values = sum(tensor.numel() for tensor in f.start.adapter.select(f.request().block).values())
    memory_gb = 4 * pool_module.ROWS_A_CLIENT * values * (number + 0.5) / 1e9
    assert group_size(f.start.adapter.select(f.request().block), memory_gb) == number
    return memory_gb


def ledger_leads(module: ModuleType, folder: Path, *, group: int) -> None:
    """Each client's steps are on disk before its first row is drawn, and settled before its update leaves."""
    path = folder / "ledger.jsonl"
    drawn: list[tuple[int, int]] = []

    def charged(*, client: int, round_index: int, step: int) -> None:
        charge = read_ledger(path)[1].of(client)[round_index]
        assert (charge.reserved_steps, charge.settled_steps) == (2, None)
        drawn.append((client, step))

    f = federation()
    f = replace(f, randomness=Watching(f, charged))
    ledger = create_ledger(f, path)
    with closing(pool_of(module, f, ledger, memory_gb=groups_of(f, group))) as pool:
        for update in pool.train(first_task(f, round_index=5), [0, 2, 3]):
            trained = {client for client, step in drawn if step == 1}
            settled = {client for client in range(4) if client in (0, 2, 3) and steps_of(path, client) == 2}
            assert update.client_id in settled
            assert settled <= trained, "settled before it trained"
    assert [ledger.participations(client) for client in range(4)] == [1, 0, 1, 1]
    assert sorted(drawn) == [(client, step) for client in (0, 2, 3) for step in range(2)]


def steps_of(path: Path, client: int) -> int | None:
    return read_ledger(path)[1].of(client)[5].settled_steps


@pytest.mark.parametrize("group", [1, 2, 64])
def test_ledger_is_written_before_rows_are_read_and_before_an_update_leaves(tmp_path: Path, group: int) -> None:
    ledger_leads(pool_module, tmp_path, group=group)


LEDGER_MUTANTS = {
    "never reserves": [(RESERVES, "admitted, refused = list(cohort), []")],
    "reserves late": [(RESERVES, "admitted, refused = list(cohort), []"), (SETTLES, CHARGES_NOW + SETTLES)],
    "never settles": [(SETTLES, "pass")],
    "settles too little": [(SETTLES, SETTLES.replace("steps)", "0)"))],
    "settles one of a group": [(SETTLES, SETTLES.replace("(group,", "(group[:1],"))],
    "settles twice": [(SETTLES, f"{SETTLES}; {SETTLES}")],
    "settles after the update": [(SETTLES, "pass"), (YIELDS, f"{YIELDS}        {SETTLES}\n")],
    "settles all at once": [(SETTLES, SETTLES.replace("(group,", "([0, 2, 3],"))],
}


@pytest.mark.parametrize("name", LEDGER_MUTANTS)
def test_pools_that_write_late_or_less_are_seen(tmp_path: Path, name: str) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError)):
        ledger_leads(mutant(pool_module, *LEDGER_MUTANTS[name]), tmp_path, group=2)


def test_a_client_that_fails_is_an_error_that_stays_charged_and_releases_nobody_of_its_group(tmp_path: Path) -> None:
    def fail(*, client: int, round_index: int, step: int) -> None:
        if (client, round_index, step) == (2, 0, 1):
            raise OSError("the client's disk is gone")

    f = federation()
    f = replace(f, randomness=Watching(f, fail))
    ledger, left = create_ledger(f, tmp_path / "ledger.jsonl"), []
    with closing(pool_of(pool_module, f, ledger, memory_gb=groups_of(f, 2))) as pool:
        with pytest.raises(OSError, match="disk is gone"):
            left.extend(pool.train(first_task(f), [0, 1, 2, 3]))
        assert not left or [update.client_id for update in left] == [0, 1]
        after = list(pool.train(first_task(f, round_index=1), [2, 3]))
    charges = read_ledger(tmp_path / "ledger.jsonl")[1]
    assert [charges.of(client)[0].settled_steps for client in range(4)] == [2, 2, None, None]
    assert [charges.of(client)[1].settled_steps for client in (2, 3)] == [2, 2]
    assert ledger.spent(2) == ledger.spent(3) > ledger.spent(0) > 0
    # Nothing of the cut round is left in the pool: the next is that of a fresh one.
    f = federation()
    with closing(pool_of(pool_module, f, create_ledger(f, tmp_path / "fresh.jsonl"))) as fresh:
        assert_equal(after, list(fresh.train(first_task(f, round_index=1), [2, 3])))


def test_a_failing_micro_batch_is_an_error_that_hangs_nothing(tmp_path: Path) -> None:
    f = federation("trainer.token_budget=40")
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    module = mutant(pool_module)
    failing, active = {"now": True}, set()

    class Failing(fused.FusedGradients):
        def clipped_sums(self, *arguments: object, **named: object) -> fused.ClippedSums:
            if not failing["now"]:
                return super().clipped_sums(*arguments, **named)
            active.add(id(self))
            if len(active) == 1:
                time.sleep(0.05)  # the other thread is at work by then
                active.discard(id(self))
                raise MemoryError("no room")
            time.sleep(0.2)
            active.discard(id(self))
            raise MemoryError("no room either")

    module.FusedGradients = Failing
    with closing(pool_of(module, f, ledger, num_workers=2)) as pool:
        with pytest.raises(MemoryError, match="no room"):
            list(pool.train(first_task(f), [0, 1, 2]))
        assert not active, "a micro-batch was left at work"
        failing["now"] = False
        again = threading.Thread(target=lambda: list(pool.train(first_task(f, round_index=1), [1, 3])), daemon=True)
        again.start()
        again.join(timeout=20)
        assert not again.is_alive()
    charges = read_ledger(tmp_path / "ledger.jsonl")[1]
    assert [charges.of(client)[0].settled_steps for client in range(3)] == [None] * 3
    assert [charges.of(client)[1].settled_steps for client in (1, 3)] == [2, 2]


def test_an_interrupt_leaves_a_readable_ledger_and_no_thread(tmp_path: Path) -> None:
    f, before = federation(), set(threading.enumerate())
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    pool = pool_of(pool_module, f, ledger, num_workers=2, memory_gb=groups_of(f, 2))
    with pytest.raises(KeyboardInterrupt), closing(pool):
        for _ in pool.train(first_task(f), [0, 1, 2, 3]):
            raise KeyboardInterrupt
    assert not set(threading.enumerate()) - before
    reopened = open_ledger(tmp_path / "ledger.jsonl", f)
    assert len({reopened.spent(client) for client in range(4)}) == 1  # trained or not, charged in full
    with pytest.raises(RuntimeError, match="shutdown"):
        list(pool.train(first_task(f, round_index=1), [0]))


def refused_clients_do_not_train(module: ModuleType, folder: Path) -> None:
    f = federation()
    drawn = []
    f = replace(f, randomness=Watching(f, lambda **key: drawn.append(key["client"])))
    ledger = create_ledger(f, folder / "ledger.jsonl")
    ledger.reserve(0, f.mechanism, 2, [1])
    with closing(pool_of(module, f, ledger)) as pool:
        outcomes = {outcome.client_id: outcome for outcome in pool.train(first_task(f), [0, 1])}
        assert list(pool.train(replace(first_task(f), broadcast={}), [0, 1])) == [
            Dropout(0, "refused", "already_reserved"),
            Dropout(1, "refused", "already_reserved"),
        ]
    assert isinstance(outcomes[0], ClientUpdate)
    assert outcomes[1] == Dropout(1, "refused", "already_reserved")
    assert set(drawn) == {0}


def test_refused_clients_read_no_row(tmp_path: Path) -> None:
    refused_clients_do_not_train(pool_module, tmp_path)


def test_a_round_that_is_asked_again_gives_the_same_updates_and_charges_nothing(tmp_path: Path) -> None:
    f = federation()
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    answers = []
    for _ in range(2):  # two processes, one after the other
        with closing(pool_of(pool_module, f, ledger)) as pool:
            answers.append(list(pool.train(first_task(f), [0, 1])))
    spent = ledger.spent_all([0, 1])
    assert [outcome.client_id for outcome in answers[1]] == [0, 1]
    for one, other in zip(*answers, strict=True):
        assert all(one.tensors[slot].equal(tensor) for slot, tensor in other.tensors.items())
    asked_more = replace(first_task(f), personal=frozenset({"head"}))
    # Another cohort adds up its micro-batches another way.
    for task, cohort in ((first_task(f), [0]), (asked_more, [0, 1])):
        with closing(pool_of(pool_module, f, ledger)) as pool:
            assert {o.reason for o in pool.train(task, cohort)} == {"already_reserved"}
    other_noise = replace(f, randomness=replace(f.randomness, seed=9))
    with closing(pool_of(pool_module, other_noise, ledger)) as pool:
        assert {o.reason for o in pool.train(first_task(f), [0, 1])} == {"already_reserved"}
    assert ledger.spent_all([0, 1]) == spent


def test_a_pool_that_trains_refused_clients_is_seen(tmp_path: Path) -> None:
    defiant = mutant(pool_module, (RESERVES, f"{RESERVES}; admitted = list(cohort)"), (SETTLES, "pass"))
    with pytest.raises(AssertionError):
        refused_clients_do_not_train(defiant, tmp_path)


def nothing_else_leaves(module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With the mechanism's outputs held fixed, neighbouring data sets give the same updates, bit for bit."""
    f = federation()
    fewer = tuple(replace(client, rows=client.rows[1:]) for client in f.clients)
    none = tuple(replace(client, rows=client.rows[:0]) for client in f.clients)
    released: list[torch.Tensor] = []
    real = cohort_module.privatise_rows

    def record(total: torch.Tensor, *arguments: object, **named: object) -> None:
        real(total, *arguments, **named)
        released.append(total.clone())

    seen, ledgers = [], []
    for number, clients in enumerate((f.clients, fewer, none)):
        replay = iter(released)
        fake = record if number == 0 else (lambda total, *_, replay=replay, **__: total.copy_(next(replay)))
        monkeypatch.setattr(cohort_module, "privatise_rows", fake)
        ledger = create_ledger(f, folder / f"{number}.jsonl")
        with closing(pool_of(module, replace(f, clients=clients), ledger)) as pool:
            seen.append(list(pool.train(first_task(f), [0, 1, 2])))
        ledgers.append([ledger.spent(client) for client in range(4)])
    assert len(released) == f.training.num_steps
    assert ledgers[0] == ledgers[1] == ledgers[2]
    for updates in seen[1:]:
        assert_equal(updates, seen[0])


def assert_equal(updates: list[ClientUpdate], others: list[ClientUpdate]) -> None:
    assert [update.client_id for update in updates] == [same.client_id for same in others]
    for update, same in zip(updates, others, strict=True):
        assert (update.client_id, update.weight, update.base_round) == (same.client_id, same.weight, same.base_round)
        assert update.tensors.keys() == same.tensors.keys()
        assert all(torch.equal(update.tensors[slot], same.tensors[slot]) for slot in same.tensors)


def test_what_leaves_depends_on_the_data_through_the_mechanism_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_else_leaves(pool_module, monkeypatch, tmp_path)


SIZE = "size = group_size(adapter.select(task.block), self._memory_gb, has_rule=self._training.rule.changes)"
DATA_LEAKS = {
    "weight by rows": ("self._weights[client]", "float(len(self._clients[client]))"),
    "tensor by rows": (
        "stack.tensors(place)",
        "{s: t + 1e-3 * len(self._clients[client]) for s, t in stack.tensors(place).items()}",
    ),
    "nothing without rows": (YIELDS, YIELDS.replace("yield", "if len(self._clients[client]): yield")),
    "groups by rows": (SIZE, "size = max(1, min(len(self._clients[c]) for c in cohort))"),
}


@pytest.mark.parametrize("name", DATA_LEAKS)
def test_pools_that_let_the_number_of_rows_out_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    leaking = mutant(pool_module, DATA_LEAKS[name])
    with pytest.raises((AssertionError, RuntimeError)):  # a group of another size does not fit what was recorded
        nothing_else_leaves(leaking, monkeypatch, tmp_path)


SGD = ("trainer.num_steps=3", "trainer.sample_rate=0.3", "trainer.divisor=4", "trainer=sgd", "trainer.optimizer.lr=0.1")


def updates_of(f: Federation, folder: Path, name: str, cohort: list[int] | None = None, **changes: object) -> dict:
    """Return the tensors of each client's update, and check that they come in the order that was asked for."""
    with closing(pool_of(pool_module, f, create_ledger(f, folder / name), **changes)) as pool:
        updates = list(pool.train(first_task(f), cohort or [0, 1, 2, 3]))
        assert set(pool.seconds) == set(cohort or range(4))
    assert [update.client_id for update in updates] == (cohort or [0, 1, 2, 3])
    return {update.client_id: update.tensors for update in updates}


def assert_close(got: dict[int, dict[Slot, torch.Tensor]], wanted: dict, start: dict[Slot, torch.Tensor]) -> None:
    """Every client went where the other went, to 2e-6 of its way."""
    for client, tensors in wanted.items():
        way = torch.cat([(tensors[slot] - start[slot]).flatten() for slot in tensors]).norm()
        apart = torch.cat([(tensors[slot] - got[client][slot]).flatten() for slot in tensors]).norm()
        assert float(apart) <= 2e-6 * float(way) > 0


@pytest.mark.parametrize("method", ["fedsvd", "fedit"])
@pytest.mark.parametrize("privacy", ["dp", "none"])
def test_together_and_one_by_one_end_at_the_same_numbers(tmp_path: Path, method: str, privacy: str) -> None:
    f = federation(f"method={method}", "adapter.train_head=true", *SGD)
    f = f if privacy == "dp" else f.without_privacy()
    states = []
    for engine in ("fused", "opacus"):
        of = replace(f, experiment=with_trainer(f, engine=engine))
        ledger = create_ledger(f, tmp_path / engine)
        with closing(make_pool(of, ledger)) as pool:
            assert type(pool) is (FusedPool if engine == "fused" else LocalPool)
            state = f.start
            for _ in range(2):
                state, _ = run_round(state, [0, 1, 3], pool=pool, method=f.method, train_head=True)
        states.append(state)
        if ledger:
            assert len({ledger.spent(client) for client in (0, 1, 3)}) == 1
    for path, layer in states[0].adapter.factors().items():
        other = states[1].adapter.factors()[path]
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, other.lora_B @ other.lora_A, rtol=1e-4, atol=1e-6)
    assert any(float(layer.lora_B.norm()) > 0.01 for layer in states[0].adapter.factors().values())
    heads = [{slot: t for slot, t in state.adapter.tensors.items() if slot.role == "head"} for state in states]
    for slot, head in heads[0].items():
        torch.testing.assert_close(head, heads[1][slot], rtol=1e-4, atol=1e-6)


def with_trainer(f: Federation, **changes: object) -> object:
    return f.experiment.model_copy(update={"trainer": f.experiment.trainer.model_copy(update=changes)})


def test_each_client_ends_where_the_other_pool_takes_it_whatever_the_groups_and_their_order(tmp_path: Path) -> None:
    f = federation("adapter.train_head=true", *SGD)
    start = f.start.adapter.tensors
    of = replace(f, experiment=with_trainer(f, engine="opacus"))
    with closing(make_pool(of, create_ledger(f, tmp_path / "alone"))) as pool:
        alone = {update.client_id: update.tensors for update in pool.train(first_task(f), [0, 1, 2, 3])}
    for number in (1, 2, 3, 64):
        together = updates_of(f, tmp_path, f"groups-{number}", memory_gb=groups_of(f, number))
        assert_close(together, alone, start)
    assert_close(updates_of(f, tmp_path, "order", [3, 0, 2, 1]), alone, start)
    assert_close(updates_of(f, tmp_path, "two", [3, 1]), {client: alone[client] for client in (1, 3)}, start)


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    f = federation("trainer.token_budget=40", *SGD)
    one, three = (updates_of(f, tmp_path, str(number), num_workers=number) for number in (1, 3))
    for client, tensors in one.items():
        assert all(torch.equal(tensor, three[client][slot]) for slot, tensor in tensors.items())


def test_clients_with_the_same_rows_send_different_updates(tmp_path: Path) -> None:
    """By chance a number is as close as 1e-6 of itself at most 6e-5 of the times, as long as it is below 100 standard
    deviations of the noise: nine of at most 600 are with less than (600 * 6e-5)^9 / 9! < 1e-18."""
    f = federation(*SGD)
    f = replace(f, clients=(f.clients[0],) * 4)
    for randomness in (f.randomness, OsRandomness()):
        updates = updates_of(replace(f, randomness=randomness), tmp_path, type(randomness).__name__)
        for slot in updates[0]:
            values = torch.stack([updates[client][slot].flatten() for client in range(4)])
            assert torch.unique(values, dim=0).shape[0] == 4
            assert torch.isclose(values[0], values[1], rtol=1e-6, atol=0).sum() < 9 < values.shape[1] / 2 <= 300


def test_size_of_a_group_is_what_fits_the_memory_and_never_depends_on_rows() -> None:
    trained = {Slot("layer", "lora_B"): torch.zeros(10, 10)}
    one = 4 * pool_module.ROWS_A_CLIENT * 100 / 1e9
    assert [group_size(trained, memory) for memory in (one / 2, one, 2.9 * one, 1e3)] == [1, 1, 2, 64]
    assert group_size(trained, None) == 64


def test_training_leaves_the_federation_and_its_model_as_they_were(tmp_path: Path) -> None:
    f = federation()
    before = {name: tensor.clone() for name, tensor in f.working.state_dict().items()}
    start, flags = f.start.adapter.fingerprint(), [p.requires_grad for p in f.working.parameters()]
    updates_of(f, tmp_path, "ledger", check_parity=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.working.state_dict().items())
    assert (f.start.adapter.fingerprint(), [p.requires_grad for p in f.working.parameters()]) == (start, flags)
    assert not any(m._forward_hooks or m._backward_hooks for m in f.working.modules())


def test_workers_share_the_frozen_tensors() -> None:
    f = federation()
    pool = pool_of(pool_module, f.without_privacy(), None, num_workers=3, check_parity=True)
    with closing(pool):
        list(pool.train(first_task(f), [0, 1]))
        taken = [pool._workers.get() for _ in range(3)]
        models = [worker._model for worker in taken] + [pool._parity._model]
        models += [engine._model for worker in taken for engine in worker._engines.values()]
    frozen = {t.data_ptr() for t in [*f.working.parameters(), *f.working.buffers()]}
    adapter = sum(t.numel() for t in f.start.adapter.tensors.values())
    assert len(models) >= 5
    for model in models:
        held = {t.data_ptr(): t.numel() for t in [*model.parameters(), *model.buffers()]}
        assert sum(numel for pointer, numel in held.items() if pointer not in frozen) <= adapter


FORGETS_SCALE = (".mul_(layer.scale)  # s x A^T", "  # s x A^T")
CREDITS_OTHERS = ("torch.mm(weights, self.values, out=out)", "torch.mm(weights.roll(1, 0), self.values, out=out)")
BUSY = ("trainer.num_steps=2", "trainer.sample_rate=0.5", "trainer.token_budget=1000")


@pytest.mark.parametrize("change", [FORGETS_SCALE, CREDITS_OTHERS], ids=["scale", "client"])
def test_a_broken_engine_stops_the_run_before_anything_leaves(tmp_path: Path, change: tuple[str, str]) -> None:
    f = federation("method=fedit", "adapter.lora_alpha=12", *BUSY)
    f = replace(f, start=replace(f.start, adapter=with_random_factors(f)))
    module = mutant(pool_module)
    module.FusedGradients = engine_over(change)
    left: list[object] = []
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    with closing(pool_of(module, f, ledger, check_parity=True)) as pool:
        with pytest.raises(InputError, match="trainer.engine=opacus"):
            left.extend(pool.train(first_task(f), [0, 1, 2]))
    assert not left
    assert all(read_ledger(tmp_path / "ledger.jsonl")[1].of(client)[0].settled_steps is None for client in range(3))
    with closing(pool_of(module, f, create_ledger(f, tmp_path / "unchecked"), check_parity=False)) as pool:
        assert len(list(pool.train(first_task(f), [0, 1, 2]))) == 3


def with_random_factors(f: Federation) -> object:
    generator = torch.Generator().manual_seed(1)
    tensors = f.start.adapter.tensors
    return f.start.adapter.with_tensors(
        {s: 0.3 * torch.randn(t.shape, generator=generator) for s, t in tensors.items()}
    )


@pytest.mark.parametrize(("checked", "comparisons"), [("true", 2), ("false", 0)])
def test_the_first_batch_of_a_run_and_the_first_with_different_tensors_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: str, comparisons: int
) -> None:
    made = []

    class Counted(parity_module.HookGradients):
        def __init__(self, *arguments: object, **named: object) -> None:
            made.append(self)
            super().__init__(*arguments, **named)

    monkeypatch.setattr(parity_module, "HookGradients", Counted)
    rounds(federation(f"trainer.check_parity={checked}", "trainer.token_budget=40"), tmp_path / "run")
    assert len(made) == comparisons


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor"])
def test_an_optimizer_that_mixes_clients_is_refused_when_the_run_begins(name: str) -> None:
    overrides = (f"trainer.optimizer._target_=torch.optim.{name}", "trainer.optimizer.lr=0.1")
    with pytest.raises(InputError, match=f"{name}; set trainer.engine=opacus"):
        federation("trainer=sgd", *overrides)
    assert federation("trainer=sgd", *overrides, "trainer.engine=opacus").training.num_steps > 0


def test_a_mechanism_without_a_ledger_is_refused() -> None:
    with pytest.raises(ValueError, match="ledger exactly when"):
        pool_of(pool_module, federation(), None)
