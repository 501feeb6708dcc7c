"""Several processes give the numbers of one: `runtime.num_processes` moves work and changes no bit."""

import importlib.util
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedlr.adapters.state import Slot
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.rounds.round import ClientPool, Dropout, RoundRequest
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool

# Groups of two clients, so that two processes have work at the same time.
TINY = ("experiment=tiny", "cohort_size=6", "runtime.memory_gb=0.00003")


def train(federation: Federation, pool: ClientPool) -> dict[int, dict[Slot, torch.Tensor]]:
    block = federation.request().block
    task = RoundRequest(0, federation.method.broadcast(federation.start.adapter, block), block)
    outcomes = list(pool.train(task, range(6)))
    assert [outcome.client_id for outcome in outcomes] == list(range(6)), "in the order of the clients"
    assert not any(isinstance(outcome, Dropout) for outcome in outcomes)
    return {outcome.client_id: dict(outcome.tensors) for outcome in outcomes}


def test_two_processes_train_and_charge_what_one_does(tmp_path: Path) -> None:
    trained, spent = [], []
    for processes in (1, 2):
        federation = assemble(compose_experiment([*TINY, f"runtime.num_processes={processes}"]), seed=3)
        ledger = create_ledger(federation, tmp_path / f"{processes}.jsonl")
        assert ledger is not None
        with closing(make_pool(federation, ledger)) as pool:
            trained.append(train(federation, pool))
            assert set(pool.seconds) == set(range(6))
        spent.append(ledger.spent_all(range(6)))
    one, two = trained
    assert all(torch.equal(one[client][slot], two[client][slot]) for client in one for slot in one[client])
    assert len({tuple(tensors[slot].flatten().tolist()) for tensors in one.values() for slot in tensors}) > 6
    assert spent[0] == spent[1]
    assert min(spent[0].values()) > 0


def test_without_the_package_several_processes_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    experiment = compose_experiment([*TINY, "runtime.num_processes=2"])
    with pytest.raises(InputError, match=r"package ray for runtime.num_processes=2.*pip install 'fedlr\[ray\]'"):
        assemble(experiment, seed=3)


def test_a_gpu_that_is_not_there_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"runtime.device=cpu.*got cuda:1"):
        assemble(compose_experiment([*TINY, "runtime.device=cuda:1"]), seed=3)
