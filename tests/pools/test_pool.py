"""Virtual clients: the ledger leads, nothing of the data leaves beside the noised values, and no failure hangs.

A check takes the pool's module, the shipped one or a mutant of its source. Mutants killed: no reservation; a
reservation after the training; an update that leaves before its settlement; a weight or a tensor that depends on the
number of rows.
"""

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import fedlr.rounds.pools.local as pool_module
import fedlr.training.local as local
from fedlr.adapters.state import ClientUpdate
from fedlr.models.peft_state import adapter_parameters
from fedlr.privacy.charges import read_ledger
from fedlr.rounds.round import Dropout, run_round
from fedlr.simulations.federation import Federation
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.simulate import make_pool
from fedlr.training.gradients import HookGradients
from tests.simulations.small_runs import federation, first_task, open_ledger
from tests.training.small_models import mutant

RESERVES = "if self._ledger is None or self._mechanism is None:"
SETTLES = "self._accounts.settle(task.round_index, {client: steps})"
RESERVES_LATE = f"self._accounts._ledger.reserve(task.round_index, self._mechanism, steps, [client]); {SETTLES}"


class Watching:
    """Stands where a federation's randomness does, and calls `watch` before each step reads its rows."""

    def __init__(self, f: Federation, watch: object) -> None:
        self._randomness, self._watch = f.randomness, watch

    def sampling(self, **key: int) -> np.random.Generator:
        self._watch(**key)
        return self._randomness.sampling(**key)

    def noise(self, **key: int) -> np.random.Generator:
        return self._randomness.noise(**key)


def pool_of(module: ModuleType, f: Federation, ledger: object, *, num_workers: int = 1, mode: str = "hooks") -> object:
    return module.LocalPool(
        f.working,
        f.clients,
        enrolled=f.start.adapter,
        training=f.training,
        mechanism=f.mechanism,
        ledger=ledger,
        randomness=f.randomness,
        weights=f.weights,
        grad_sample_mode=mode,
        num_workers=num_workers,
    )


def ledger_leads(module: ModuleType, folder: Path) -> None:
    """A client's steps are on disk before its first row is drawn, and settled before its update leaves."""
    path = folder / "ledger.jsonl"

    def charged(*, client: int, round_index: int, step: int) -> None:
        charge = read_ledger(path)[1].of(client)[round_index]
        assert (charge.reserved_steps, charge.settled_steps) == (2, None)

    f = federation()
    f = replace(f, randomness=Watching(f, charged))
    ledger = create_ledger(f, path)
    with closing(pool_of(module, f, ledger)) as pool:
        for update in pool.train(first_task(f, round_index=5), [0, 2, 3]):
            assert read_ledger(path)[1].of(update.client_id)[5].settled_steps == 2
    assert [ledger.participations(client) for client in range(4)] == [1, 0, 1, 1]


def test_ledger_is_written_before_rows_are_read_and_before_an_update_leaves(tmp_path: Path) -> None:
    ledger_leads(pool_module, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        [(RESERVES, "if True:")],
        [(RESERVES, "if True:"), (SETTLES, RESERVES_LATE)],
        [(SETTLES, "pass")],
        [(SETTLES, "self._accounts.settle(task.round_index, {client: 0})")],
    ],
    ids=["never reserves", "reserves late", "never settles", "settles too little"],
)
def test_pools_that_write_late_or_less_are_seen(tmp_path: Path, changes: list[tuple[str, str]]) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError)):
        ledger_leads(mutant(pool_module, *changes), tmp_path)


def failure_is_an_error(module: ModuleType, folder: Path) -> None:
    """A client that fails in its second step surfaces as that error, stays charged, and blocks nobody later."""

    def fail(*, client: int, round_index: int, step: int) -> None:
        if (client, round_index, step) == (1, 0, 1):
            raise OSError("the client's disk is gone")

    f = federation()
    f = replace(f, randomness=Watching(f, fail))
    ledger = create_ledger(f, folder / "ledger.jsonl")
    with closing(pool_of(module, f, ledger)) as pool:
        with pytest.raises(OSError, match="disk is gone"):
            list(pool.train(first_task(f), [0, 1, 2]))
        again = threading.Thread(target=lambda: list(pool.train(first_task(f, round_index=1), [1, 3])), daemon=True)
        again.start()
        again.join(timeout=20)
        assert not again.is_alive()
    reopened = open_ledger(folder / "ledger.jsonl", f)
    assert reopened.spent(1) == ledger.spent(1) > reopened.spent(3) > 0
    assert read_ledger(folder / "ledger.jsonl")[1].of(1)[0].settled_steps is None
    # The open reservation counts as much as the settled one of a client that finished the same rounds.
    open_ledger(folder / "ledger.jsonl", f).reserve(2, f.mechanism, 2, [3])
    assert reopened.spent(3) == reopened.spent(1)


def test_a_client_that_fails_is_an_error_that_stays_charged_and_hangs_nothing(tmp_path: Path) -> None:
    failure_is_an_error(pool_module, tmp_path)


def test_an_interrupt_leaves_a_readable_ledger_and_no_thread(tmp_path: Path) -> None:
    f, before = federation(), set(threading.enumerate())
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    with pytest.raises(KeyboardInterrupt), closing(pool_of(pool_module, f, ledger, num_workers=2)) as pool:
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
    assert isinstance(outcomes[0], ClientUpdate)
    assert outcomes[1] == Dropout(1, "refused", "already_reserved")
    assert set(drawn) == {0}


def test_refused_clients_read_no_row(tmp_path: Path) -> None:
    refused_clients_do_not_train(pool_module, tmp_path)


def test_a_pool_that_trains_refused_clients_is_seen(tmp_path: Path) -> None:
    admits_all = ("for client in cohort if answers[client] is None]", "for client in cohort]")
    defiant = mutant(pool_module, admits_all, (SETTLES, "pass"))
    with pytest.raises(AssertionError):
        refused_clients_do_not_train(defiant, tmp_path)


def nothing_else_leaves(module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With the mechanism's outputs held fixed, neighbouring data sets give the same updates, bit for bit."""
    f = federation()
    fewer = tuple(replace(client, rows=client.rows[1:]) for client in f.clients)
    none = tuple(replace(client, rows=client.rows[:0]) for client in f.clients)
    released: list[object] = []
    real = local.privatise

    def record(total: object, **arguments: object) -> object:
        released.append(real(total, **arguments))
        return released[-1]

    seen = []
    for number, clients in enumerate((f.clients, fewer, none)):
        replay = iter(released)
        fake = record if number == 0 else (lambda total, replay=replay, **arguments: next(replay))
        monkeypatch.setattr(local, "privatise", fake)
        ledger = create_ledger(f, folder / f"{number}.jsonl")
        with closing(pool_of(module, replace(f, clients=clients), ledger)) as pool:
            seen.append(list(pool.train(first_task(f), [0, 1, 2])))
    assert len(released) == 3 * f.training.num_steps
    for updates in seen[1:]:
        for update, same in zip(updates, seen[0], strict=True):
            assert (update.client_id, update.weight, update.base_round) == (same.client_id, same.weight, 0)
            assert update.tensors.keys() == same.tensors.keys()
            assert all(torch.equal(update.tensors[slot], same.tensors[slot]) for slot in same.tensors)


def test_what_leaves_depends_on_the_data_through_the_mechanism_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_else_leaves(pool_module, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("self._weights[client]", "float(len(self._clients[client]))"),
        ('parameter.detach().to("cpu", copy=True)', "parameter.detach() + 1e-3 * len(self._clients[client])"),
        ("for slot, parameter in trained.items()}", "for slot, parameter in trained.items() if self._clients[client]}"),
    ],
    ids=["weight by rows", "tensor by rows", "no tensor without rows"],
)
def test_pools_that_let_the_number_of_rows_out_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: tuple[str, str]
) -> None:
    with pytest.raises(AssertionError):
        nothing_else_leaves(mutant(pool_module, change), monkeypatch, tmp_path)


@pytest.mark.parametrize("mode", ["ghost", "loop"])
@pytest.mark.parametrize("method", ["fedsvd", "fedit"])
def test_gradient_engines_agree_over_a_round(tmp_path: Path, mode: str, method: str) -> None:
    f = federation(f"method={method}", "adapter.train_head=true", *SGD)
    states = []
    for name in ("hooks", mode):
        with closing(pool_of(pool_module, f, create_ledger(f, tmp_path / name), mode=name)) as pool:
            states.append(run_round(f.start, [0, 1, 2], pool=pool, method=f.method, train_head=True)[0].adapter)
    for path, layer in states[0].factors().items():
        other = states[1].factors()[path]
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, other.lora_B @ other.lora_A, rtol=1e-4, atol=1e-5)
    assert any(float(layer.lora_B.norm()) > 0.01 for layer in states[0].factors().values())


def test_workers_share_the_frozen_tensors_and_nothing_else() -> None:
    f = federation()
    with closing(pool_of(pool_module, f.without_privacy(), None, num_workers=3, mode="sum")) as pool:
        models = [f.working, *(worker.model for worker in workers(pool))]
        own = [{id(p) for p in adapter_parameters(model).values()} for model in models]
        frozen = [
            [t.data_ptr() for t in m.state_dict(keep_vars=True).values() if id(t) not in o]
            for m, o in zip(models, own, strict=True)
        ]
        assert len(models) == 4
        assert all(pointers == frozen[0] for pointers in frozen)
        adapters = [p.data_ptr() for model in models for p in adapter_parameters(model).values()]
        assert len(set(adapters)) == len(adapters)


def test_training_leaves_the_federation_and_its_model_as_they_were(tmp_path: Path) -> None:
    f = federation()
    before = {name: tensor.clone() for name, tensor in f.working.state_dict().items()}
    start, grads = f.start.adapter.fingerprint(), [p.requires_grad for p in f.working.parameters()]
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        list(pool.train(first_task(f), [0, 1, 2, 3]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.working.state_dict().items())
    assert (f.start.adapter.fingerprint(), [p.requires_grad for p in f.working.parameters()]) == (start, grads)
    assert num_hooks(f.working) == 0


def test_hooks_live_as_long_as_the_pool(tmp_path: Path) -> None:
    f = federation()
    pool = pool_of(pool_module, f, create_ledger(f, tmp_path / "ledger.jsonl"))
    (worker,) = workers(pool)
    list(pool.train(first_task(f), [0]))
    once = num_hooks(worker.model)
    list(pool.train(first_task(f, round_index=1), [0, 1]))
    assert num_hooks(worker.model) == once > 0
    pool.close()
    assert num_hooks(worker.model) == 0


def test_a_worker_follows_the_block_of_the_round() -> None:
    f = federation()
    worker = pool_module.Worker(pool_module.sharing_base(f.working), "hooks")
    for roles in ({"lora_A"}, {"lora_B"}, {"lora_A", "lora_B", "head"}, {"lora_B"}):
        trained, gradients = worker.start_from(f.start.adapter, frozenset(roles))
        assert {slot.role for slot in trained} == roles
        assert {id(p) for p in worker.model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
        assert isinstance(gradients, HookGradients)
    worker.close()
    assert num_hooks(worker.model) == 0


def test_a_mechanism_without_a_ledger_is_refused() -> None:
    with pytest.raises(ValueError, match="ledger exactly when"):
        make_pool(federation(), None)


SGD = ("trainer.num_steps=3", "trainer.sample_rate=0.3", "trainer.divisor=4", "trainer=sgd", "trainer.optimizer.lr=0.1")


def workers(pool: object) -> list[object]:
    taken = [pool._workers.get() for _ in range(pool._workers.qsize())]
    for worker in taken:
        pool._workers.put(worker)
    return taken


def num_hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
