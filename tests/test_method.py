"""The six methods as their YAML files build them: blocks, bytes, exact or biased, round after round."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedlr.adapter import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot, num_values
from fedlr.aggregate.diagnostics import aggregation_error
from fedlr.aggregate.ideal import Ideal
from fedlr.errors import InputError
from fedlr.method import Always, Method, SvdRefactor, full_adapter, trained_block

CONFIGS = Path(__file__).parents[1] / "configs" / "method"
D, K, R = 12, 20, 3
PATHS = ("layer.0", "layer.1")

B_ONLY = ("fedsvd", "ffa_lora", "ffa_lora_orthonormal")
A_AND_B = ("fedit", "lora_fair", "lora_fair_ridge")
# Numbers a layer and client: up, down. docs/methods.md has the same table.
BYTES = {
    "fedsvd": (R * D, R * (D + K)),
    "ffa_lora": (R * D, R * D),
    "ffa_lora_orthonormal": (R * D, R * D),
    "fedit": (R * (D + K), R * (D + K)),
    "lora_fair": (R * (D + K), R * (D + K)),
    "lora_fair_ridge": (R * (D + K), R * (D + K)),
}


def load(name: str) -> Method:
    method = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert isinstance(method, Method)
    return method


def initial_adapter(*, head: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {Slot(path, LORA_A): torch.randn(R, K, generator=generator) / K**0.5 for path in PATHS}
    tensors |= {Slot(path, LORA_B): torch.zeros(D, R) for path in PATHS}
    if head:
        tensors[Slot("head.weight", HEAD)] = torch.randn(2, D, generator=generator)
    return AdapterState(tensors, scale=1.0)


def trained(adapter: AdapterState, block, *, round_index: int = 0, spread: float = 0.1) -> list[ClientUpdate]:
    """Three clients that return the block with something of their own added."""
    generator = torch.Generator().manual_seed(round_index + 1)
    updates = []
    for client_id in range(3):
        values = adapter.select(block).items()
        new = {slot: t + spread * torch.randn(t.shape, generator=generator) for slot, t in values}
        updates.append(ClientUpdate(client_id, new, 1.0 + client_id, round_index))
    return updates


def play(method: Method, *, num_rounds: int = 3, head: bool = False) -> tuple[list[AdapterState], list[float]]:
    """Return the adapters (the start first) and the largest aggregation error of every round."""
    adapters, errors = [method.finalise(initial_adapter(head=head))], []
    for round_index in range(num_rounds):
        block = method.block_schedule(round_index)
        updates = trained(adapters[-1], block, round_index=round_index)
        adapters.append(method.finalise(method.aggregate(adapters[-1], updates)))
        errors.append(max(aggregation_error(Ideal.of(adapters[-2], updates), adapters[-1]).values()))
    return adapters, errors


@pytest.mark.parametrize("name", BYTES)
def test_a_method_is_built_from_its_file_alone_and_carries_its_name(name):
    assert load(name).name == name
    header = (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]
    assert header[1].startswith("# Source: ") and "arxiv.org/abs/" in header[1]
    assert header[2] == f"# Run: fedlr simulate method={name}"


@pytest.mark.parametrize("name", BYTES)
def test_a_method_trains_and_sends_the_bytes_of_the_table(name):
    method, adapter = load(name), initial_adapter()
    block = method.block_schedule(7)
    up = num_values(adapter.select(block).values())
    down = num_values(method.broadcast(adapter, block).values())
    assert (up, down) == tuple(len(PATHS) * count for count in BYTES[name])


@pytest.mark.parametrize("name", B_ONLY)
def test_methods_that_train_B_only_are_exact_in_every_round(name):  # (16), also after the finaliser
    assert max(play(load(name))[1]) < 1e-6


@pytest.mark.parametrize("name", A_AND_B)
def test_methods_that_train_both_factors_are_biased(name):
    assert min(play(load(name))[1][1:]) > 0.01


@pytest.mark.parametrize("name", ["ffa_lora", "ffa_lora_orthonormal"])
def test_a_frozen_A_keeps_its_bits_forever(name):
    """Only lora_B goes down, so a client's lora_A is the one it started with."""
    adapters, _ = play(load(name), num_rounds=20)
    for adapter in adapters:
        for path in PATHS:
            assert torch.equal(adapter.factors()[path].lora_A, adapters[0].factors()[path].lora_A)


@pytest.mark.parametrize("name", ["fedsvd", "ffa_lora_orthonormal"])
def test_the_rows_of_A_are_orthonormal_after_every_round(name):  # (2)
    for adapter in play(load(name))[0][1:]:
        for layer in adapter.factors().values():
            assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(R), atol=1e-5)


def test_ffa_lora_orthonormal_starts_orthonormal_and_fedsvd_starts_untouched():
    start = initial_adapter()
    assert load("fedsvd").finalise(start).fingerprint() == start.fingerprint()
    for layer in load("ffa_lora_orthonormal").finalise(start).factors().values():
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(R), atol=1e-5)
        assert not layer.lora_B.any()


def test_the_server_keeps_A_of_fedsvd_in_the_row_space_of_the_first_A():
    adapters, _ = play(load("fedsvd"), num_rounds=20)
    for path in PATHS:
        first, last = (adapter.factors()[path].lora_A.double() for adapter in (adapters[0], adapters[-1]))
        projector = first.T @ torch.linalg.solve(first @ first.T, first)
        assert torch.dist(last @ projector, last) < 1e-5


@pytest.mark.parametrize("name", BYTES)
def test_a_frozen_head_is_neither_sent_nor_changed(name):
    method, adapter = load(name), initial_adapter(head=True)
    sent = method.broadcast(adapter, method.block_schedule(0))
    assert all(slot.role != HEAD for slot in sent)
    head = Slot("head.weight", HEAD)
    assert all(torch.equal(state.tensors[head], adapter.tensors[head]) for state in play(method, head=True)[0])


@pytest.mark.parametrize("name", BYTES)
def test_a_trained_head_goes_down_is_averaged_and_survives_the_finaliser(name):
    method, adapter, slot = load(name), initial_adapter(head=True), Slot("head.weight", HEAD)
    block = method.block_schedule(0) | {HEAD}
    updates = trained(adapter, block)
    after = method.finalise(method.aggregate(adapter, updates))
    expected = sum(update.weight / 6 * update.tensors[slot].double() for update in updates).float()
    assert torch.allclose(after.tensors[slot], expected, atol=1e-6)
    assert torch.equal(method.broadcast(after, block)[slot], after.tensors[slot])


@pytest.mark.parametrize("name", BYTES)
def test_a_round_is_reproducible_and_changes_neither_its_input_nor_the_scale(name):
    method, adapter = load(name), initial_adapter()
    updates, before = trained(adapter, method.block_schedule(0)), adapter.fingerprint()
    first, second = (method.finalise(method.aggregate(adapter, updates)) for _ in range(2))
    assert first.fingerprint() == second.fingerprint() != before
    assert adapter.fingerprint() == before and first.scale == adapter.scale


@pytest.mark.parametrize("name", BYTES)
def test_a_round_does_not_depend_on_the_order_of_the_clients(name):  # (18)
    method, adapter = load(name), initial_adapter()
    updates = trained(adapter, method.block_schedule(0))
    first, second = (method.aggregate(adapter, order) for order in (updates, updates[::-1]))
    for path in PATHS:
        one, other = first.factors()[path], second.factors()[path]
        assert torch.allclose(one.lora_B @ one.lora_A, other.lora_B @ other.lora_A, atol=1e-5)


def test_a_penalty_can_be_overridden_where_the_file_has_one():
    config = OmegaConf.load(CONFIGS / "lora_fair.yaml")
    config.aggregate.penalty = 0.5
    assert instantiate(config).aggregate.penalty == 0.5


def test_always_trains_the_same_block_in_every_round():
    schedule = Always([LORA_B, HEAD])
    assert {schedule(round_index) for round_index in range(5)} == {frozenset({LORA_B, HEAD})}
    assert schedule == Always((HEAD, LORA_B)) and hash(schedule) == hash(Always({HEAD, LORA_B}))


@pytest.mark.parametrize("roles", [[], "lora_B", ["lora_C"], [LORA_B, "lora_a"]])
def test_always_refuses_roles_that_do_not_exist(roles):
    with pytest.raises(InputError, match="Expected roles to be a list of lora_A, lora_B, head"):
        Always(roles)


def test_the_full_adapter_holds_both_factors_and_the_trained_block_only_itself():
    adapter, block = initial_adapter(head=True), frozenset({LORA_B, HEAD})
    assert {slot.role for slot in full_adapter(adapter, block)} == {LORA_A, LORA_B, HEAD}
    assert {slot.role for slot in trained_block(adapter, block)} == {LORA_B, HEAD}
    assert {slot.role for slot in full_adapter(adapter, frozenset({LORA_B}))} == {LORA_A, LORA_B}


def test_a_method_is_a_value_of_four_choices():
    """A new method is one replaced choice, not a flag."""
    method = load("ffa_lora")
    assert replace(method, name="fedsvd", finalise=SvdRefactor(), broadcast=full_adapter) == load("fedsvd")
