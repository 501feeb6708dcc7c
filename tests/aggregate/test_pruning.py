"""HetLoRA's pruning of ranks, by definition and through rounds.

Mutants killed: a tail that grew is pruned; a tail of the adapter's rank for a client of a smaller one; ranks that are
forgotten; a least rank that is not kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import fedlr.methods.aggregate.pruning as shipped
from fedlr.adapters.client_ranks import CLIENT_RANKS, narrowed, widened, within
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.pruning import SelfPruning
from fedlr.methods.aggregate.rank import norm_weighted_mean
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.method import Always, Method, full_adapter, keep
from fedlr.rounds.round import RoundRequest, ServerState, run_round
from tests.training.small_models import mutant

BOTH = (LORA_A, LORA_B)
KEEP = 0.7  # of rank 3 the first two, of rank 2 the first
MUTANTS = (
    ("tail_size(returned, first, rank) <", "tail_size(returned, first, rank) >"),
    ("if update.rank is None else update.rank", "if True else update.rank"),
    ("dict(adapter.memory.get(CLIENT_RANKS, {}))", "{}"),
    ("max(first, min(rank, self.min_rank))", "first"),
)


def scaled(update: ClientUpdate, adapter: AdapterState, factor: float, *, rank: int | None = None) -> ClientUpdate:
    """An update that is the adapter itself with its last rank times a factor."""
    own = 3 if rank is None else rank
    tensors = {slot: adapter.tensors[slot].clone() for slot in update.tensors}
    for slot, tensor in tensors.items():
        (tensor[own - 1] if slot.role == LORA_A else tensor[:, own - 1]).mul_(factor)
    changed = replace(update, tensors=tensors, rank=rank)
    return changed if rank is None else replace(widened(replace(changed, tensors=narrowed(tensors, rank)), tensors))


def ranks_of(adapter: AdapterState) -> dict[int, int]:
    return {int(slot.path): int(rank) for slot, rank in adapter.memory.get(CLIENT_RANKS, {}).items()}


def prunes_whose_tail_shrank(module, federation) -> bool:
    adapter, updates = federation(*BOTH)
    known = {Slot("7", CLIENT_RANKS): torch.tensor([1])}  # of an earlier round
    adapter = adapter.remembering(CLIENT_RANKS, known)
    changes = ((0.5, None), (2.0, None), (0.5, 2), (0.5, 1))
    sent = [scaled(u, adapter, factor, rank=rank) for u, (factor, rank) in zip(updates, changes, strict=True)]
    after = module.SelfPruning(keep=KEEP)(adapter, iter(sent))
    same = after.fingerprint() == norm_weighted_mean(adapter, sent).fingerprint()
    return same and ranks_of(after) == {0: 2, 2: 1, 3: 1, 7: 1}


def test_a_client_whose_tail_shrank_loses_it(federation):
    assert prunes_whose_tail_shrank(shipped, federation)


@pytest.mark.parametrize(("old", "new"), MUTANTS, ids=[old for old, _ in MUTANTS])
def test_another_judgement_is_noticed(federation, old, new):
    assert not prunes_whose_tail_shrank(mutant(shipped, (old, new)), federation)


def test_without_a_tail_it_is_the_mean_and_says_so(federation):
    adapter, updates = federation(*BOTH)
    rule = SelfPruning(keep=1.0)
    assert rule(adapter, updates).fingerprint() == norm_weighted_mean(adapter, updates).fingerprint()
    assert not rule(adapter, [scaled(update, adapter, 0.5) for update in updates]).memory
    assert not rule.prunes and SelfPruning(keep=KEEP).prunes


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.1}, {"min_rank": 0}], ids=str)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SelfPruning(**{"keep": 0.5, **wrong})


@dataclass
class Shrinking:
    """Clients that return what they were sent, a little smaller; `asked` has the ranks of each round."""

    adapter: AdapterState
    asked: list[dict[int, int]]

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        self.asked.append(dict(task.ranks))
        sent = self.adapter.with_tensors(task.broadcast).select(task.shared)
        for client in cohort:
            own = narrowed(sent, task.ranks.get(client))
            yield ClientUpdate(client, {slot: 0.9 * tensor for slot, tensor in own.items()}, 1.0, task.round_index)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (None, [{}, {0: 2, 1: 2}, {0: 1, 1: 1}, {0: 1, 1: 1}]),
        ((3, 2), [{0: 3, 1: 2}, {0: 2, 1: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}]),
    ],
    ids=["alike", "mixed"],
)
def test_a_pruned_client_is_asked_for_fewer_ranks_from_its_next_round_on(federation, given, asked):
    adapter, _ = federation(*BOTH)
    method = Method(
        "pruning", Always(BOTH), SelfPruning(keep=KEEP), keep, full_adapter, mixed_ranks=True, client=ClientRule()
    )
    pool, state, bytes_up = Shrinking(adapter, []), ServerState(adapter), []
    for _ in range(4):
        state, diagnostics = run_round(state, [0, 1], pool=pool, method=method, ranks=given)
        assert diagnostics.trained == (0, 1) and diagnostics.ranks == pool.asked[-1]
        bytes_up.append(diagnostics.bytes_up)
    assert pool.asked == asked
    one = sum(within(t, s, 1).numel() * 8 for s, t in adapter.tensors.items() if s.role in BOTH)
    assert bytes_up == [sum(ranks.get(c, 3) for c in (0, 1)) * one for ranks in asked]
