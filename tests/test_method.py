"""Every method of configs/method, as its YAML file builds it: blocks, messages, heads, round after round.

The files are found, not listed: a new method is tested by being there. What methods are meant to differ in (exact or
biased, bytes, what is noised) is measured, and held against docs/methods.md, in
`tests/simulations/test_methods_command.py`.

Mutants this file kills: a file whose name is not its method's; a rule that depends on the order of clients, on the sum
of their weights, on a generator of its own or on what it was given before; one that changes its input, the scale, a
shape, a frozen head or a tensor that nobody trained; one that folds, or keeps a factor personal, without saying so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Block, ClientUpdate, Slot, roles_of
from fedlr.errors import InputError
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import Always, Method, SvdRefactor, full_adapter, trained_block
from fedlr.rounds.round import ServerState, request_of
from tests.methods_of_files import method_of as load

CONFIGS = Path(__file__).parents[1] / "configs" / "method"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LORA_NAMES = [name for name in NAMES if name != "head"]  # which trains the head whatever adapter.train_head says
D, K, R = 12, 20, 3
PATHS = ("layer.0", "layer.1")

HEAD_SLOT = Slot("head.weight", HEAD)
B_ONLY = ("fedsvd", "ffa_lora", "ffa_lora_orthonormal")
A_AND_B = ("fedit", "lora_fair", "lora_fair_ridge")


@cache
def initial_adapter(*, head: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {Slot(path, LORA_A): torch.randn(R, K, generator=generator) / K**0.5 for path in PATHS}
    tensors |= {Slot(path, LORA_B): torch.zeros(D, R) for path in PATHS}
    if head:
        tensors[Slot("head.weight", HEAD)] = torch.randn(2, D, generator=generator)
    return AdapterState(tensors, scale=1.0)


def shared(method: Method, adapter: AdapterState, round_index: int = 0, *, head: bool = False) -> Block:
    """What leaves a client of what it trained."""
    return request_of(ServerState(adapter, round_index), method, train_head=head).shared


def trained(
    adapter: AdapterState, block: Block, *, round_index: int = 0, spread: float = 0.1, weights: Sequence[float] = ()
) -> list[ClientUpdate]:
    """Three clients, or as many as there are weights, that return the block with something of their own added."""
    generator = torch.Generator().manual_seed(round_index + 1)
    updates = []
    for client_id in range(len(weights) or 3):
        values = adapter.select(block).items()
        sizes = {PATHS[1]: 3 * spread}  # layers differ
        new = {s: t + sizes.get(s.path, spread) * torch.randn(t.shape, generator=generator) for s, t in values}
        weight = weights[client_id] if weights else 1.0 + client_id
        updates.append(ClientUpdate(client_id, new, weight, round_index))
    return updates


@cache
def weights_of(name: str) -> tuple[float, ...]:
    """Unlike weights, or like ones for a rule that refuses unlike ones by name."""
    method = load(name)
    adapter = method.finalise(initial_adapter())
    try:
        method.aggregate(adapter, trained(adapter, shared(method, adapter)))
    except InputError as error:
        assert "weighting=uniform" in str(error)
        return (1.0,) * max(3, method.least_updates)
    return (1.0, 2.0, 3.0)


@cache
def play(name: str, *, num_rounds: int = 3, head: bool = False) -> tuple[list[AdapterState], list[float]]:
    """Return the adapters (the start first) and the largest aggregation error of every round; no head trains."""
    method = load(name)
    adapters, errors = [method.finalise(initial_adapter(head=head))], []
    for round_index in range(num_rounds):
        block = shared(method, adapters[-1], round_index)
        updates = trained(adapters[-1], block, round_index=round_index, weights=weights_of(name))
        adapters.append(method.finalise(method.aggregate(adapters[-1], updates)))
        errors.append(max(aggregation_error(Ideal.of(adapters[-2], updates), adapters[-1]).values()))
    return adapters, errors


def method_start(name: str, *, head: bool = False) -> AdapterState:
    return load(name).finalise(initial_adapter(head=head))


def mean_of(updates: Iterable[ClientUpdate], slot: Slot) -> Tensor:
    """The weighted mean of one tensor, in float64 until the end."""
    updates = list(updates)
    total = sum(update.weight for update in updates)
    return sum(update.weight / total * update.tensors[slot].double() for update in updates).float()


def functions(adapter: AdapterState) -> dict[str, Tensor]:
    """What each layer computes beyond its frozen weight, before the scale."""
    products = {path: layer.lora_B @ layer.lora_A for path, layer in adapter.factors().items()}
    for path, layer in adapter.side.items():
        products[path] = products[path] + layer.lora_B @ layer.lora_A
    return products


def everything(adapter: AdapterState) -> dict[str, Tensor]:
    """Functions, head and memory: all that a next round can depend on, but for how a product is split into factors."""
    heads = {str(slot): tensor for slot, tensor in adapter.tensors.items() if slot.role == HEAD}
    memory = {f"{name} {slot}": t for name, tensors in adapter.memory.items() for slot, t in tensors.items()}
    return {**functions(adapter), **heads, **memory}


def close(one: AdapterState, other: AdapterState, tolerance: float = 1e-5) -> bool:
    first, second = everything(one), everything(other)
    return first.keys() == second.keys() and all(
        torch.allclose(first[key].double(), second[key].double(), rtol=1e-4, atol=tolerance) for key in first
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_built_from_its_file_alone_and_carries_its_name(name):
    assert load(name).name == name
    sentence, source, run = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:3]
    assert sentence.startswith("# ") and sentence.endswith(".")
    assert source.startswith("# Source: ") and "https://" in source
    assert run == f"# Run: fedlr simulate method={name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trains_only_what_the_schedule_may_and_sends_only_what_exists(name):
    method = load(name)
    for round_index, adapter in enumerate(play(name)[0]):
        block = method.block_schedule(round_index, adapter)
        assert block and roles_of(block) <= set(method.block_schedule.roles)
        task = request_of(ServerState(adapter, round_index), method)
        assert all(torch.equal(adapter.tensors[slot], tensor) for slot, tensor in task.broadcast.items())
        assert not roles_of(task.shared) & set(method.personal)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_folds_or_sends_a_control_says_so(name):
    """What it folds is declared; of its memory nothing goes down but the control, which only a client rule reads."""
    method, adapters = load(name), play(name, num_rounds=6)[0]
    assert any(adapter.side for adapter in adapters) == method.folds
    if any("control" in adapter.memory for adapter in adapters):
        assert method.client.changes


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_missed_every_round_but_one_starts_from_the_servers_adapter(name):
    check_starts(load(name), play(name, num_rounds=6, head=True)[0])


def check_starts(method: Method, adapters: Sequence[AdapterState]) -> None:
    """What a client got when it enrolled, under what goes down, is the server's bit for bit, but for its own roles."""
    for round_index, adapter in enumerate(adapters):
        task = request_of(ServerState(adapter, round_index), method)
        mine = adapters[0].overlaid(task.broadcast)
        for slot, tensor in adapter.tensors.items():
            assert slot.role in method.personal or torch.equal(mine.tensors[slot], tensor), f"{round_index}: {slot}"
        assert task.side is adapter.side


@pytest.mark.parametrize("name", ["as_lora", "fedsvd", "renewal", "rolora"])
def test_a_method_that_sends_the_trained_block_alone_is_found_where_more_changes(name):
    mutant = replace(load(name), broadcast=trained_block)
    with pytest.raises(AssertionError):
        check_starts(mutant, play(name, num_rounds=6, head=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_round_keeps_shapes_dtypes_and_the_scale_and_stays_finite(name):
    """Ranks alone may change, within that of the adapter, and only where the method says so."""
    start, *later = play(name, num_rounds=6)[0]
    for adapter in later:
        assert adapter.scale == start.scale
        assert {s: t.dtype for s, t in adapter.tensors.items()} == {s: t.dtype for s, t in start.tensors.items()}
        for path, layer in adapter.factors().items():
            assert 1 <= len(layer.lora_A) == layer.lora_B.shape[1] <= R
            assert layer.lora_A.shape[1] == K and len(layer.lora_B) == D
            assert load(name).dynamic_ranks or len(layer.lora_A) == len(start.factors()[path].lora_A)
        assert all(torch.isfinite(tensor).all() for tensor in everything(adapter).values())


@pytest.mark.parametrize("name", NAMES)
def test_only_the_proportions_of_the_weights_matter(name):
    method = load(name)
    adapter = method.finalise(initial_adapter())
    updates = trained(adapter, shared(method, adapter), weights=weights_of(name))
    heavier = [replace(update, weight=8 * update.weight) for update in updates]
    assert close(method.aggregate(adapter, updates), method.aggregate(adapter, heavier))


@pytest.mark.parametrize("name", [n for n in NAMES if "personal" in OmegaConf.load(CONFIGS / f"{n}.yaml")])
def test_what_is_shared_of_a_personal_method_is_the_plain_mean(name):
    """No product is averaged, so there is no aggregation error as such: what is sent is averaged, the rest stays."""
    method = load(name)
    start = method.finalise(initial_adapter())
    updates = trained(start, shared(method, start))
    after = method.aggregate(start, updates)
    assert updates[0].tensors
    for slot, tensor in after.tensors.items():
        if slot in updates[0].tensors:
            assert torch.allclose(tensor, mean_of(updates, slot), atol=1e-6)
        else:
            assert torch.equal(tensor, start.tensors[slot])


@pytest.mark.parametrize("name", B_ONLY)
def test_methods_that_train_B_only_are_exact_in_every_round(name):  # (16), also after the finaliser
    assert max(play(name)[1]) < 1e-6


@pytest.mark.parametrize("name", A_AND_B)
def test_methods_that_train_both_factors_are_biased(name):
    assert min(play(name)[1][1:]) > 0.01


@pytest.mark.parametrize("name", ["ffa_lora", "ffa_lora_orthonormal"])
def test_a_frozen_A_keeps_its_bits_forever(name):
    """Only lora_B goes down, so a client's lora_A is the one it started with."""
    adapters, _ = play(name, num_rounds=20)
    for adapter in adapters:
        for path in PATHS:
            assert torch.equal(adapter.factors()[path].lora_A, adapters[0].factors()[path].lora_A)


@pytest.mark.parametrize("name", ["fedsvd", "ffa_lora_orthonormal"])
def test_the_rows_of_A_are_orthonormal_after_every_round(name):  # (2)
    for adapter in play(name)[0][1:]:
        for layer in adapter.factors().values():
            assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(R), atol=1e-5)


def test_ffa_lora_orthonormal_starts_orthonormal_and_fedsvd_starts_untouched():
    start = initial_adapter()
    assert load("fedsvd").finalise(start).fingerprint() == start.fingerprint()
    for layer in load("ffa_lora_orthonormal").finalise(start).factors().values():
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(R), atol=1e-5)
        assert not layer.lora_B.any()


def test_the_server_keeps_A_of_fedsvd_in_the_row_space_of_the_first_A():
    adapters, _ = play("fedsvd", num_rounds=20)
    for path in PATHS:
        first, last = (adapter.factors()[path].lora_A.double() for adapter in (adapters[0], adapters[-1]))
        projector = first.T @ torch.linalg.solve(first @ first.T, first)
        assert torch.dist(last @ projector, last) < 1e-5


@pytest.mark.parametrize("name", LORA_NAMES)
def test_a_frozen_head_is_neither_sent_nor_changed(name):
    method, adapter = load(name), initial_adapter(head=True)
    assert HEAD not in method.block_schedule.roles  # heads train where adapter.train_head says so
    for round_index, state in enumerate(play(name, head=True)[0]):
        assert all(slot.role != HEAD for slot in method.broadcast(state, method.block_schedule(round_index, state)))
        assert torch.equal(state.tensors[HEAD_SLOT], adapter.tensors[HEAD_SLOT])


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_head_goes_down_is_averaged_and_survives_the_finaliser(name):
    """A server optimizer, or a rule that is no mean, moves the head as it moves any tensor: one that holds the numbers
    of a lora_B ends as that."""
    method, adapter = load(name), method_start(name, head=True)
    task = request_of(ServerState(adapter), method, train_head=True)
    assert torch.equal(task.broadcast[HEAD_SLOT], adapter.tensors[HEAD_SLOT])
    updates = trained(adapter, task.shared, weights=weights_of(name))
    twin = Slot(PATHS[0], LORA_B)
    if "momentum" in method.aggregate(adapter, updates).memory or getattr(method.aggregate, "resists", False):
        adapter = replace(adapter, tensors={**adapter.tensors, HEAD_SLOT: adapter.tensors[twin]})
        updates = [replace(u, tensors={**u.tensors, HEAD_SLOT: u.tensors[twin]}) for u in updates]
        aggregated = method.aggregate(adapter, updates)
        expected = aggregated.tensors[twin]
        assert not torch.equal(expected, adapter.tensors[twin])
    else:
        aggregated = method.aggregate(adapter, updates)
        expected = mean_of(updates, HEAD_SLOT)
    after = method.finalise(aggregated)
    assert torch.allclose(after.tensors[HEAD_SLOT], expected, atol=1e-6)
    again = request_of(ServerState(after, 1), method, train_head=True)
    assert torch.equal(again.broadcast[HEAD_SLOT], after.tensors[HEAD_SLOT])


@pytest.mark.parametrize("name", LORA_NAMES)
def test_a_round_is_reproducible_and_changes_neither_its_input_nor_the_scale(name):
    method, adapter = load(name), method_start(name)
    updates = trained(adapter, shared(method, adapter), weights=weights_of(name))
    before, sent = adapter.fingerprint(), [AdapterState(update.tensors, 1.0).fingerprint() for update in updates]
    torch.manual_seed(0)
    first = method.finalise(method.aggregate(adapter, updates))
    torch.manual_seed(1)  # a rule that draws has a key of its own, never torch's or numpy's global generator
    second = method.finalise(method.aggregate(adapter, iter(updates)))
    assert first.fingerprint() == second.fingerprint() != before
    assert adapter.fingerprint() == before and first.scale == adapter.scale
    assert [AdapterState(update.tensors, 1.0).fingerprint() for update in updates] == sent


@pytest.mark.parametrize("name", NAMES)
def test_a_round_does_not_depend_on_the_order_of_the_clients(name):  # (18)
    method, adapter = load(name), method_start(name)
    updates = trained(adapter, shared(method, adapter), weights=weights_of(name))
    assert close(method.aggregate(adapter, updates), method.aggregate(adapter, updates[::-1]))


def test_an_argument_can_be_overridden_where_the_file_has_one():
    assert load("lora_fair", "method.aggregate.penalty=0.5").aggregate.penalty == 0.5


def test_always_trains_the_same_block_in_every_round():
    schedule = Always([LORA_B, HEAD])
    assert {schedule(round_index, initial_adapter()) for round_index in range(5)} == {frozenset({LORA_B, HEAD})}
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
