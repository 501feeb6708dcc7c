"""What methods may ask of clients beyond a block: rules after the noise, tensors that stay, a side, ranks of their own.

Both pools are compared, because they share no training code. Mutants killed: a personal tensor that is sent; a rule
that never runs; a memory that is forgotten, or another client's; a side that a pool leaves out.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import fedlr.rounds.pools.client_state as kept_module
import fedlr.rounds.pools.fused as fused_pool
import fedlr.rounds.pools.local as local_pool
import fedlr.simulations.runtime as runtime
from fedlr.adapters.client_ranks import CLIENT_RANKS, within
from fedlr.adapters.state import LORA_A, LORA_B, ClientUpdate, LoraFactors, Slot
from fedlr.config.build import build_method
from fedlr.config.runtime_rules import check_method
from fedlr.errors import InputError
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import LocalPool
from fedlr.rounds.round import ClientPool, Dropout, RoundRequest, ServerState, run_round
from fedlr.runs.checkpoint import latest_checkpoint, save_checkpoint
from fedlr.simulations.alone import train_alone
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, leave_state_behind
from tests.training.small_models import mutant

OPACUS = "trainer.engine=opacus"
AFTER = "trainer.after_noise._target_="
MERGES = "self._side.merge(adapter)"
MIXED = ("method=flexlora", "adapter.client_ranks=[1,2,4]", "adapter.rank=4", "num_rounds=3")
SGD = (
    "trainer=sgd",
    "trainer.num_steps=3",
    "trainer.sample_rate=0.3",
    "trainer.divisor=4",
    "trainer.optimizer.lr=0.1",
    "num_rounds=3",
)


def play(f: Federation, folder: Path, *, num_rounds: int = 3) -> list[ServerState]:
    """Train a few rounds and return the states, the first one first."""
    folder.mkdir(exist_ok=True)
    states = [f.start]
    with closing(make_pool(f, create_ledger(f, folder / "ledger.jsonl"))) as pool:
        for index in range(num_rounds):
            cohort = [0, 1, 2] if index % 2 else [1, 2, 3]
            state, diagnostics = run_round(states[-1], cohort, pool=pool, method=f.method, ranks=f.ranks)
            assert list(diagnostics.trained) == cohort, diagnostics.dropouts
            states.append(state)
    return states


def assert_close(one: ServerState, other: ServerState, *, atol: float = 2e-6) -> None:
    for slot, tensor in one.adapter.tensors.items():
        torch.testing.assert_close(other.adapter.tensors[slot], tensor, rtol=0, atol=atol)
    assert one.adapter.side.keys() == other.adapter.side.keys()
    for path, side in one.adapter.side.items():  # an SVD may turn factors, never their product
        mine, others = side.lora_B @ side.lora_A, other.adapter.side[path].lora_B @ other.adapter.side[path].lora_A
        torch.testing.assert_close(others, mine, rtol=0, atol=atol)


def far(one: ServerState, other: ServerState) -> bool:
    return any((t - other.adapter.tensors[slot]).abs().max() > 1e-4 for slot, t in one.adapter.tensors.items())


@pytest.mark.parametrize(
    ("name", "privacy"),
    [(name, "dp") for name in ("fedprox", "scaffold", "fedsa_lora", "fedex_lora")]
    + [("scaffold", "none")]
    + [pytest.param(name, "none", marks=pytest.mark.slow) for name in ("fedprox", "fedsa_lora", "fedex_lora")],
)
def test_together_and_one_by_one_give_the_same_numbers(tmp_path: Path, name: str, privacy: str) -> None:
    strong = ("method.client.mu=2.0",) if name == "fedprox" else ()
    overrides = (f"method={name}", f"privacy={privacy}", *SGD, *strong)
    together = play(federation(*overrides), tmp_path / "together")
    alone = play(federation(*overrides, OPACUS), tmp_path / "alone")
    assert_close(alone[-1], together[-1])
    plain = play(federation("method=fedit", f"privacy={privacy}", *SGD), tmp_path / "plain")
    assert far(plain[-1], together[-1])


def test_a_rule_of_the_trainer_acts_before_the_optimizer(tmp_path: Path) -> None:
    # orthonormal rows of A: g_B (A A^T + reg I)^-1 is g_B / (1 + reg)
    rule = (
        "trainer.after_noise._target_=scaled_gradient",
        "trainer.after_noise.reg=1.0",
    )
    method = "method=ffa_lora_orthonormal"
    halved = play(federation(method, *SGD, *rule), tmp_path / "rule", num_rounds=1)
    slower = play(federation(method, *SGD, "trainer.optimizer.lr=0.05"), tmp_path / "slower", num_rounds=1)
    assert_close(slower[-1], halved[-1])


# Personal tensors.


def sent_by_a_pool(kept: ModuleType, f: Federation, folder: Path) -> tuple[list[dict[Slot, Tensor]], object]:
    folder.mkdir(exist_ok=True)
    module = mutant(fused_pool)
    module.Kept = kept.Kept
    with closing(make_pool(f, create_ledger(f, folder / "ledger.jsonl"))) as pool:
        pool.kept = kept.Kept()
        updates = sorted(pool.train(f.request(), [0, 1, 2]), key=lambda update: update.client_id)
        return [update.tensors for update in updates], pool.kept


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_a_personal_tensor_never_leaves_and_is_there_in_the_next_round(tmp_path: Path, engine: str) -> None:
    f = federation("method=fedsa_lora", f"trainer.engine={engine}")
    sent, kept = sent_by_a_pool(kept_module, f, tmp_path)
    assert all({slot.role for slot in tensors} == {LORA_A} for tensors in sent)
    assert all({slot.role for slot in kept.personal[client]} == {LORA_B} for client in (0, 1, 2))
    assert 3 not in kept.personal
    start = kept.start(1, f.request(), f.start.adapter)
    assert all(torch.equal(start[slot], tensor) for slot, tensor in kept.personal[1].items())
    assert all(tensor.abs().max() > 0 for tensor in kept.personal[1].values())


def test_a_personal_tensor_that_is_sent_is_seen(tmp_path: Path) -> None:
    leaky = mutant(kept_module, ("if slot not in mine}", "}"))
    sent, _ = sent_by_a_pool(leaky, federation("method=fedsa_lora"), tmp_path)
    assert any(slot.role == LORA_B for tensors in sent for slot in tensors)
    f = federation("method=fedsa_lora")
    with closing(make_pool(f, create_ledger(f, tmp_path / "again.jsonl"))) as pool:
        pool.kept = leaky.Kept()
        _, diagnostics = run_round(f.start, [0], pool=pool, method=f.method)
    assert [drop.reason for drop in diagnostics.dropouts] == ["wrong_keys"]  # and the server takes none


def test_personal_roles_are_some_of_the_trained_ones() -> None:
    for wrong in ("[head]", "[lora_A,lora_B]", "[nothing]"):
        with pytest.raises(InputError, match="method.personal"):
            build_method(experiment("method=fedit", f"+method.personal={wrong}"))


# Memory of a rule.


def test_what_a_rule_remembers_is_each_clients_own(tmp_path: Path) -> None:
    f = federation("method=scaffold", *SGD)
    forgetting = mutant(kept_module, ("self._memory.get(client, {})", "{}"))
    mixing = mutant(kept_module, ("self._memory.get(client, {})", "self._memory.get(3 - client, {})"))
    right = play(f, tmp_path / "right")
    for number, module in enumerate((forgetting, mixing)):
        state = f.start
        with closing(make_pool(f, create_ledger(f, tmp_path / f"{number}.jsonl"))) as pool:
            pool.kept = module.Kept()
            for cohort in ([1, 2, 3], [0, 1, 2], [1, 2, 3]):
                state, _ = run_round(state, cohort, pool=pool, method=f.method)
        assert far(right[-1], state)


# A side.


def trained_beside(pools: ModuleType, engine: str) -> bool:
    """Return whether a client trains elsewhere with a side than without."""
    e = experiment("method=ffa_lora", "privacy=none", f"trainer.engine={engine}", *SGD)
    with torch_threads(1):
        f = assemble(e, seed=0)  # a base of its own: it stays merged
    generator = torch.Generator().manual_seed(0)
    side = {
        path: LoraFactors(torch.randn(2, layer.lora_A.shape[1], generator=generator), torch.ones(len(layer.lora_B), 2))
        for path, layer in f.start.adapter.factors().items()
    }
    found = []
    pool_here = mutant(runtime)
    pool_here.FusedPool, pool_here.LocalPool = pools.FusedPool, pools.LocalPool
    with closing(pool_here.make_pool(f, None)) as pool:
        for task in (f.request(), replace(f.request(), side=side)):
            (update,) = pool.train(task, [1])
            found.append(ServerState(f.start.adapter.with_tensors(update.tensors)))
    return far(*found)


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_clients_train_on_top_of_the_side(engine: str) -> None:
    assert trained_beside(SimpleNamespace(FusedPool=FusedPool, LocalPool=LocalPool), engine)
    late = [(MERGES, "pass")]
    pools = SimpleNamespace(
        FusedPool=mutant(fused_pool, *late).FusedPool, LocalPool=mutant(local_pool, *late).LocalPool
    )
    assert not trained_beside(pools, engine)


def test_a_rule_that_folds_without_saying_so_is_refused(tmp_path: Path) -> None:
    f = federation("method=flora")
    f = replace(f, method=replace(f.method, folds=False))
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        with pytest.raises(InputError, match="method.folds=true for method=flora"):
            run_round(f.start, [0, 1], pool=pool, method=f.method)


# Ranks.


def test_clients_of_smaller_rank_send_smaller_tensors_and_train_them_alone(tmp_path: Path) -> None:
    f = federation(*MIXED)
    assert f.ranks == (1, 2, 4, 1)
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        asked = replace(f.request(), ranks=dict(enumerate(f.ranks)))
        updates = {update.client_id: update for update in pool.train(asked, [0, 1, 2])}
        for client, update in updates.items():
            for slot, tensor in update.tensors.items():
                assert tensor.shape == within(f.start.adapter.tensors[slot], slot, f.ranks[client]).shape
    states = play(f, tmp_path / "run")
    assert far(states[0], states[-1])


def test_bytes_are_those_of_each_clients_rank(tmp_path: Path) -> None:
    f = federation(*MIXED)
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        _, one = run_round(f.start, [0], pool=pool, method=f.method, ranks=f.ranks)
        _, four = run_round(ServerState(f.start.adapter, 1), [2], pool=pool, method=f.method, ranks=f.ranks)
    assert four.bytes_up == 4 * one.bytes_up and four.bytes_down == 4 * one.bytes_down


def test_memory_of_a_client_gives_its_rank() -> None:
    f = federation("method=hetlora", "adapter.rank=4", "adapter.client_memory_mb=[0.0093,1,0.02]")
    sides = sum(sum(layer.lora_B.shape[:1] + layer.lora_A.shape[1:]) for layer in f.start.adapter.factors().values())
    assert sides == 256 and f.ranks == (1, 4, 2, 1)  # 36 bytes each: 0.0092 megabytes a rank


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=hetlora", "adapter.client_memory_mb=[1,0.009]"), "at least 0.00922, what one rank takes.*got 0.009"),
        (("method=fedsvd", "adapter.client_memory_mb=[1]"), "a method that aggregates mixed ranks"),
        (("method=hetlora", "adapter.client_memory_mb=[]"), "adapter.client_memory_mb to be null"),
        (("method=hetlora", "adapter.client_ranks=[1]", "adapter.client_memory_mb=[1]"), "client_ranks=null"),
    ],
)
def test_memory_that_gives_no_ranks_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        federation(*overrides)


def test_ranks_that_the_server_lowered_are_trained_and_kept_in_a_checkpoint(tmp_path: Path) -> None:
    pulled = ("method.client.weight=5", "method.client.keep=0.6", "method.aggregate.keep=0.6")
    f = federation("method=hetlora", "privacy=none", *pulled, *SGD)
    last = play(f, tmp_path / "run")[-1]
    lowered = {slot.path: int(rank) for slot, rank in last.adapter.memory[CLIENT_RANKS].items()}
    assert lowered and max(lowered.values()) < f.experiment.adapter.rank
    with closing(make_pool(f, None)) as pool:
        _, diagnostics = run_round(last, [0, 1, 2, 3], pool=pool, method=f.method)
    assert diagnostics.trained == (0, 1, 2, 3)
    assert all(diagnostics.ranks[int(client)] == rank for client, rank in lowered.items())
    save_checkpoint(tmp_path / "checkpoints", last, {})
    kept = latest_checkpoint(tmp_path / "checkpoints", say=print)
    assert kept is not None and same_memory(kept.state, last)


def same_memory(one: ServerState, other: ServerState) -> bool:
    mine, others = one.adapter.memory[CLIENT_RANKS], other.adapter.memory[CLIENT_RANKS]
    return mine.keys() == others.keys() and all(torch.equal(mine[slot], others[slot]) for slot in mine)


@dataclass
class OfRankOne:
    """Clients that train with rank 1 whatever they are asked."""

    pool: ClientPool

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        return self.pool.train(replace(task, ranks=dict.fromkeys(cohort, 1)), cohort)


def test_an_update_of_another_rank_is_rejected(tmp_path: Path) -> None:
    f = federation(*MIXED)
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        stubborn = OfRankOne(pool)
        _, diagnostics = run_round(f.start, [0, 1], pool=stubborn, method=f.method, ranks=(4, 1, 4, 1))
    assert [(drop.client_id, drop.reason) for drop in diagnostics.dropouts] == [(0, "wrong_shape")]


# What does not go together is refused before any work.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=flora", "runtime.base_dtype=bfloat16"), "runtime.base_dtype=float32 for method=flora"),
        (("method=fedsa_lora", "runtime.num_processes=2"), "runtime.num_processes=1 for method=fedsa_lora"),
        (("method=scaffold", "trainer=sgd", "runtime.num_processes=2"), "runtime.num_processes=1 for method=scaffold"),
        (("method=la_lora", OPACUS), "trainer.engine=fused for method=la_lora"),
        (("method=fedsvd", "adapter.client_ranks=[1,2]"), "a method that aggregates mixed ranks"),
        (("method=flora", "adapter.client_ranks=[1,2]", OPACUS), "trainer.engine=fused for clients of different ranks"),
        (("method=rolora", "+method.personal=[lora_B]"), "always with method.personal"),
        (
            ("method=hetlora", "+method.personal=[lora_B]", "adapter.client_ranks=[1,2]"),
            "client_ranks=null with",
        ),
        (("method=la_lora", "method.block_schedule.roles=[lora_B]"), "lora_A and lora_B for LA-LoRA"),
    ],
)
def test_a_runtime_that_does_not_serve_a_method_is_refused(overrides: tuple[str, ...], message: str) -> None:
    e = experiment(*overrides)
    with pytest.raises(InputError, match=message):
        check_method(e, build_method(e))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=fedgsa", "method.block_schedule.roles=[lora_A,lora_B]"), "lora_B and not lora_A for FedGSA"),
        (("method=scaffold", "weighting=examples", "partition=dirichlet_by_label"), "weighting=uniform for SCAFFOLD"),
        (("method=ffa_lora", f"{AFTER}local_alternation"), "lora_A and lora_B for LA-LoRA"),
        (("method=fedit", f"{AFTER}local_alternation", OPACUS), "trainer.engine=fused"),
        (("method=fedit", f"{AFTER}local_alternation", "trainer.num_steps=1"), "trainer.num_steps >= 2"),
    ],
)
def test_what_a_rule_cannot_use_is_refused_before_anybody_is_charged(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble(experiment(*overrides), seed=0)


def test_alone_there_is_nobody_to_share_with(tmp_path: Path) -> None:
    found = {}
    for name in ("fedit", "fedsa_lora", "scaffold"):
        f = federation(f"method={name}", "privacy=none", *SGD)
        with closing(make_pool(f, None)) as pool:
            found[name] = [arm.state for arm in train_alone(f, pool, client_done=lambda: None)]
    for client, state in enumerate(found["fedit"]):
        assert far(state, federation("method=fedit", "privacy=none", *SGD).start)
        for name in ("fedsa_lora", "scaffold"):
            for slot, tensor in state.adapter.tensors.items():
                torch.testing.assert_close(found[name][client].adapter.tensors[slot], tensor, rtol=0, atol=2e-6)


def test_the_card_of_a_personal_method_says_what_is_missing(tmp_path: Path) -> None:
    for name, says in (("fedsa_lora", True), ("fedit", False)):
        f = federation(f"method={name}")
        (tmp_path / name).mkdir()
        create_ledger(f, tmp_path / name / "ledger.jsonl")
        leave_state_behind(f, tmp_path / name, f.start)
        card = (tmp_path / name / "adapter" / "README.md").read_text()
        assert ("Every client kept lora_B to itself" in card) is says
