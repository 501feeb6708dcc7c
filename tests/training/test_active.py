"""A step that trains part of a block is DP-SGD on that part: clipped alone, noised alone, and nothing else moves.

The reference is an engine, or an optimizer, that never heard of the rest. Mutants killed: a norm over the whole block;
a resting tensor that is summed, noised or stepped.
"""

from types import ModuleType

import numpy as np
import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, Block, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.alternation import LocalAlternation
from fedlr.models.peft_state import train_only, write_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.batch import Batch
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import class_losses
from fedlr.training import cohort as shipped_cohort
from fedlr.training import fused as shipped_fused
from fedlr.training.cohort import Stack
from fedlr.training.local import LocalTraining
from tests.training.cohort_runs import CohortBench, worker_threads
from tests.training.small_models import A_AND_B, client_data, mutant, random_rows, small_model
from tests.training.test_fused_sums import NUM_CLIENTS, OWNER, examples_of, starts_of

SIGMA, BOUND, DIVISOR = 2.0, 0.5, 4.0


def check_only_the_active_part_is_clipped(fused: ModuleType, active_role: str) -> None:
    model = small_model("bert")
    starts = starts_of(model, A_AND_B, num_clients=1) * NUM_CLIENTS  # of one client: the other factor can be frozen
    write_adapter(model, starts[0])
    inputs, labels = examples_of("bert", len(OWNER))
    stack = Stack.of(starts)
    active = frozenset(slot for slot in stack.shapes if slot.role == active_role)
    call = {"owner": OWNER, "max_grad_norm": BOUND}
    both = fused.FusedGradients(model, train_only(model, A_AND_B), loss=class_losses)
    got = both.clipped_sums(Batch(inputs, labels), stacks=stack.by_slot(), active=active, **call)
    alone_stack = Stack.of([{slot: start[slot] for slot in active} for start in starts])
    alone = fused.FusedGradients(model, train_only(model, frozenset({active_role})), loss=class_losses)
    wanted = alone.clipped_sums(Batch(inputs, labels), stacks=alone_stack.by_slot(), **call)
    found, expected = stack.by_slot(spread(got, stack)), alone_stack.by_slot(spread(wanted, alone_stack))
    for slot, rows in found.items():
        if slot in active:
            torch.testing.assert_close(rows, expected[slot], rtol=1e-4, atol=1e-6)
        else:
            assert not rows.any()


def spread(sums: shipped_fused.ClippedSums, stack: Stack) -> torch.Tensor:
    total = torch.zeros_like(stack.theta)
    sums.add_to(total)
    return total


@pytest.mark.parametrize("role", [LORA_A, LORA_B])
def test_only_the_active_part_is_clipped_and_summed(role: str) -> None:
    check_only_the_active_part_is_clipped(shipped_fused, role)


@pytest.mark.parametrize(
    "change",
    [
        (
            "self._found(slot) for slot in self._trained if active is None or slot in active}",
            "self._found(slot) for slot in self._trained}",
        ),
        ("        found = list(summed.values())\n", "        found = [self._found(slot) for slot in self._trained]\n"),
        ("part.zero_()", "pass"),
    ],
    ids=["the rest is summed too", "the norm is of all", "the rest holds anything"],
)
def test_a_rest_that_has_a_say_is_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        for _ in range(5):  # memory that is left as it was may hold zeros
            junk = torch.full((NUM_CLIENTS, 4096), 7.0)
            del junk
            check_only_the_active_part_is_clipped(mutant(shipped_fused, change), LORA_B)


def trained(cohort: ModuleType, *, num_steps: int, optimizer: object = None) -> tuple[dict[Slot, torch.Tensor], ...]:
    """Train two clients by turns; return where each tensor started and ended, (C, ...)."""
    bench = CohortBench(block=A_AND_B)
    stack = Stack.of([bench.start] * 2)
    before = {slot: rows.clone() for slot, rows in stack.by_slot().items()}
    data = client_data(random_rows(12, seed=4))
    training = LocalTraining(
        num_steps=num_steps,
        optimizer=optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1.0)),
        token_budget=64,
        divisor=DIVISOR,
        sampler=PoissonSampler(0.5),
        rule=LocalAlternation(smooth=False),
    )
    with worker_threads(1) as threads:
        cohort.train_cohort(
            bench.sums,
            threads,
            stack,
            [Share(data, np.arange(6)), Share(data, np.arange(6, 12))],
            training=training,
            mechanism=Mechanism(SIGMA, BOUND, 0.5, DIVISOR),
            randomness=SeededRandomness(3),
            client_ids=[0, 1],
            round_index=0,
        )
    return before, stack.by_slot()


def check_turns(cohort: ModuleType) -> None:
    """lora_B moves in step 0, by noise in every entry, lora_A in step 1, and neither in the other's step."""
    before, after_one = trained(cohort, num_steps=1)
    _, after_two = trained(cohort, num_steps=2)
    for slot, start in before.items():
        moves = (start != after_one[slot], after_one[slot] != after_two[slot])
        own, others = moves if slot.role == LORA_B else moves[::-1]
        assert float(own.double().mean()) > 0.99
        assert not others.any()


def test_factors_move_in_their_own_steps_alone() -> None:
    check_turns(shipped_cohort)


@pytest.mark.parametrize(
    "change",
    [
        ("threads=threads, active=active)", "threads=threads)"),
        ("            active=active,\n        )\n        if mechanism", "        )\n        if mechanism"),
        (
            "if active is None or slot in active:\n                own",
            "if active is None or slot not in active:\n                own",
        ),
    ],
    ids=["noise on the rest", "the rest is summed", "noise on the rest alone"],
)
def test_a_rest_that_moves_is_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_turns(mutant(shipped_cohort, change))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1),
        lambda parameters: torch.optim.Adam(parameters),
    ],
    ids=["momentum", "weight decay", "Adam"],
)
def test_an_optimizer_that_would_move_a_resting_tensor_is_refused(optimizer: object) -> None:
    with pytest.raises(InputError, match="SGD without momentum and weight decay"):
        trained(shipped_cohort, num_steps=2, optimizer=optimizer)


def test_a_block_of_single_slots_trains_them_alone() -> None:
    model = small_model("bert")
    slots = sorted(train_only(model, A_AND_B))
    block: Block = frozenset({slots[0], slots[-1]})
    assert sorted(train_only(model, block)) == sorted(block)
    assert [slot for slot in slots if in_block(slot, block)] == [slots[0], slots[-1]]
