"""The YAML files of fedprox, scaffold, la_lora and fedsa_lora: what they build, and what goes down and up.

Mutants this file kills: a stale lora_B in FedSA-LoRA's broadcast or update, a learning rate, a number of steps or of
clients that is not the trainer's, an optimizer that SCAFFOLD's formulas do not hold for.
"""

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, num_values
from fedlr.errors import InputError
from fedlr.methods.client_rules.alternation import LocalAlternation
from fedlr.methods.client_rules.personal import SharedBlock
from fedlr.methods.client_rules.proximal import FedProx
from fedlr.methods.client_rules.scaffold import ScaffoldClient, ScaffoldServer
from fedlr.rounds.round import ServerState, request_of
from tests.client_rules.points import ROLES, SHAPES, draw, same
from tests.methods_of_files import method_of as load


def initial() -> AdapterState:
    tensors = draw(*ROLES, num_clients=None)
    return AdapterState({s: torch.zeros_like(t) if s.role == LORA_B else t for s, t in tensors.items()}, scale=1.0)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "la_lora", "fedsa_lora"])
def test_the_name_is_that_of_the_file_and_both_factors_train(name):
    method = load(name)
    assert method.name == name
    assert method.block_schedule(0, initial()) == {LORA_A, LORA_B}


def test_each_method_has_its_rule():
    assert load("fedprox").client == FedProx(mu=0.01)
    assert load("fedprox", "method.client.mu=0.5").client == FedProx(mu=0.5)
    assert load("la_lora").client == LocalAlternation(smooth=True)
    assert not load("fedsa_lora").client.changes


def test_scaffold_has_the_numbers_of_the_trainer():
    method = load("scaffold", "trainer.optimizer.lr=0.25", "trainer.num_steps=7", "num_clients=11")
    assert method.aggregate == ScaffoldServer(lr=0.25, num_steps=7, num_clients=11)
    assert method.client == ScaffoldClient(lr=0.25, optimizer="torch.optim.SGD")


@pytest.mark.parametrize(
    "override", ["trainer=adamw", "+trainer.optimizer.momentum=0.9", "+trainer.optimizer.weight_decay=0.1"]
)
def test_scaffold_refuses_what_is_not_plain_sgd(override):
    with pytest.raises(InputError, match="Expected trainer.optimizer.* for SCAFFOLD"):
        load("scaffold", override, *([] if override == "trainer=adamw" else ["trainer.optimizer.lr=0.5"]))


def test_fedsa_sends_and_receives_lora_A_alone():
    adapter = initial()
    task = request_of(ServerState(adapter), load("fedsa_lora"))
    down, up = task.broadcast, adapter.select(task.shared)
    assert same(down, adapter.select(frozenset({LORA_A})))
    assert down.keys() == up.keys()
    r_n = sum(shape[0] * shape[1] for slot, shape in SHAPES.items() if slot.role == LORA_A)
    assert num_values(down.values()) == num_values(up.values()) == r_n


def test_fedsa_shares_a_head_unless_it_is_personal():
    state = ServerState(initial())
    task = request_of(state, load("fedsa_lora"), train_head=True)
    assert {slot.role for slot in task.broadcast} == task.shared == {LORA_A, HEAD}
    own_head = load("fedsa_lora", "method.block_schedule.roles=[lora_A,lora_B,head]", "method.personal=[lora_B,head]")
    task = request_of(state, own_head)
    assert task.block == frozenset(ROLES)
    assert {slot.role for slot in task.broadcast} == task.shared == {LORA_A}


def test_fedsa_leaves_what_the_server_holds_of_lora_B_at_its_initial_value():
    method, adapter = load("fedsa_lora"), initial()
    shared = request_of(ServerState(adapter), method).shared
    updates = [ClientUpdate(k, {slot: t + k for slot, t in adapter.select(shared).items()}, 1.0, 0) for k in range(3)]
    after = method.finalise(method.aggregate(adapter, iter(updates)))
    for slot, tensor in adapter.tensors.items():
        assert (after.tensors[slot] is tensor) == (slot.role != LORA_A)
        if slot.role == LORA_A:
            assert torch.allclose(after.tensors[slot], tensor + 1)


@pytest.mark.parametrize("personal", ["lora_B", ["lora_C"]])
def test_personal_roles_that_do_not_exist_are_refused(personal):
    with pytest.raises(InputError, match="Expected personal to be a list of"):
        SharedBlock(personal=personal)
