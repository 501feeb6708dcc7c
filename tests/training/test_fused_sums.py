"""One pass over rows of many clients gives each client the sum it would have alone.

Mutants this file kills: a row credited to another client, by number or by place; tensors of another client, or of the
first one for all; a rank that is not masked, forwards or backwards; gradients beyond a rank; a NaN that passes from one
client to another; a weight that is applied to the wrong row.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, Block, Slot
from fedlr.models.peft_state import adapter_parameters, train_only, write_adapter
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import LossOfLogits, class_losses, cross_entropy, token_losses
from fedlr.training.cohort import Stack
from fedlr.training.fused import ClippedSums, FusedGradients
from fedlr.training.gradients import LoopGradients
from tests.training.cohort_runs import engine_over, flat
from tests.training.small_models import (
    A_AND_B,
    B_AND_HEAD,
    B_ONLY,
    BUILDERS,
    EVERYTHING,
    batch,
    examples_of,
    random_rows,
    small_model,
)

OWNER = torch.tensor([2, 0, 4, 0, 2, 2, 4, 0, 2])  # clients 1 and 3 have no row, and the rows come in any order
NUM_CLIENTS = 5


def starts_of(model: torch.nn.Module, block: Block, *, num_clients: int = NUM_CLIENTS) -> list[dict[Slot, Tensor]]:
    """Return other tensors for each client."""
    generator = torch.Generator().manual_seed(3)
    own = {slot: p.detach() for slot, p in sorted(adapter_parameters(model).items()) if slot.role in block}
    return [
        {slot: value + 0.2 * torch.randn(value.shape, generator=generator) for slot, value in own.items()}
        for _ in range(num_clients)
    ]


def one_by_one(
    model: torch.nn.Module, block: Block, starts: list, inputs: dict, labels: Tensor, owner: Tensor, **call: object
) -> dict[int, Tensor]:
    """Return the sum of each client that has rows, as a model of its own computes it row by row."""
    trained = train_only(model, block)
    oracle, sums = LoopGradients(model, trained, loss=call.pop("loss")), {}
    for client in owner.unique().tolist():
        write_adapter(model, starts[client])
        mine = {name: tensor[owner == client] for name, tensor in inputs.items()}
        sums[client] = flat(oracle.clipped_sum(Batch(mine, labels[owner == client]), **call))
    return sums


def together(
    engine: FusedGradients, starts: list, inputs: dict, labels: Tensor, owner: Tensor, *, max_grad_norm: float
) -> ClippedSums:
    return engine.clipped_sums(
        Batch(inputs, labels), owner=owner, stacks=Stack.of(starts).by_slot(), max_grad_norm=max_grad_norm
    )


def check_each_client_gets_its_own_sum(
    make_engine: Callable, architecture: str, block: Block, *, targets: str = "query_value"
) -> None:
    loss = token_losses if architecture == "llama_lm" else class_losses
    model = small_model(architecture, targets=targets)
    starts = starts_of(model, block)
    inputs, labels = examples_of(architecture, len(OWNER))
    engine = make_engine(model, train_only(model, block), loss=loss)
    for bound in (0.5, math.inf):
        got = together(engine, starts, inputs, labels, OWNER, max_grad_norm=bound)
        wanted = one_by_one(model, block, starts, inputs, labels, OWNER, max_grad_norm=bound, loss=loss)
        assert got.clients.tolist() == list(wanted) == [0, 2, 4]
        for client, values in zip(got.clients.tolist(), got.values, strict=True):
            # Measured: at most 2e-5, where row by row in float32 is 3e-5 from float64.
            assert float((values - wanted[client]).norm()) <= 5e-5 * float(wanted[client].norm()) > 0


CASES = [(name, block) for name in BUILDERS for block in (B_ONLY, EVERYTHING)] + [
    ("bert", A_AND_B),
    ("bert", B_AND_HEAD),
    ("bert", frozenset({LORA_A})),
    ("bert", frozenset({HEAD})),
    ("gpt2", B_AND_HEAD),
]


@pytest.mark.parametrize(
    ("architecture", "block"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(sorted(x))
)
def test_each_client_gets_the_sum_it_would_have_alone(architecture: str, block: Block) -> None:
    if architecture == "llama_lm":  # its head is its frozen, tied embedding
        block = block - {HEAD}
    check_each_client_gets_its_own_sum(FusedGradients, architecture, block, targets="all-linear")


BROKEN = {
    "the first client's tensors": [("stack.index_select(0, self.owner)", "stack[0]")],
    "the next client's tensors": [
        ("stack.index_select(0, self.owner)", "stack.roll(1, 0).index_select(0, self.owner)")
    ],
    "the next client's head": [('stacks["weight"][client], bias)', 'stacks["weight"][client - 1], bias)')],
    "the first client's head, backwards": [('layer.slots["weight"]][client]', 'layer.slots["weight"]][0]')],
    "sums of the next client": [
        ("torch.mm(weights, self.values, out=out)", "torch.mm(weights.roll(1, 0), self.values, out=out)")
    ],
    "weights of the next row": [
        ("torch.mm(weights, self.values, out=out)", "torch.mm(weights, self.values.roll(1, 0), out=out)")
    ],
    "head sums of all": [
        ("own = share[mine, None]", "mine = slice(None)\n            own = weights.sum(0)[mine, None]")
    ],
    "no scale": [(".mul_(layer.scale)  # s x A^T", "  # s x A^T")],
    "no gradient through the adapter": [("_add_product(dx, u, ctx.lora_A)", "pass")],
    "no head bias": [("Rows(sums.clone())", "Rows(sums.clone().zero_())")],
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_engine_that_mixes_clients_or_is_wrong_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_each_client_gets_its_own_sum(engine_over(*BROKEN[name]), "bert", EVERYTHING)


def test_where_the_rows_lie_and_what_the_clients_are_called_changes_nothing() -> None:
    model = small_model()
    starts = starts_of(model, EVERYTHING)
    engine = FusedGradients(model, train_only(model, EVERYTHING), loss=class_losses)
    inputs, labels = examples_of("bert", len(OWNER))
    straight = together(engine, starts, inputs, labels, OWNER, max_grad_norm=0.5)
    order = torch.randperm(len(OWNER), generator=torch.Generator().manual_seed(1))
    shuffled = together(
        engine, starts, {n: t[order] for n, t in inputs.items()}, labels[order], OWNER[order], max_grad_norm=0.5
    )
    renamed = together(engine, starts[::-1], inputs, labels, NUM_CLIENTS - 1 - OWNER, max_grad_norm=0.5)
    torch.testing.assert_close(shuffled.values, straight.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(renamed.values.flip(0), straight.values, rtol=1e-4, atol=1e-6)
    total = torch.ones(NUM_CLIENTS, straight.values.shape[1])
    straight.add_to(total)
    assert torch.equal(total[[1, 3]], torch.ones_like(total[:2]))
    torch.testing.assert_close(total[[0, 2, 4]] - 1, straight.values, rtol=1e-4, atol=1e-5)


def test_a_cohort_of_one_is_a_client_by_itself() -> None:
    model = small_model()
    trained = train_only(model, EVERYTHING)
    engine = FusedGradients(model, trained, loss=class_losses)
    inputs, labels = examples_of("bert", 6)
    alone = engine.clipped_sum(Batch(inputs, labels), max_grad_norm=0.5)
    start = {slot: p.detach() for slot, p in trained.items()}
    (only,) = together(engine, [start], inputs, labels, torch.zeros(6, dtype=torch.long), max_grad_norm=0.5).values
    third = together(engine, [start] * 4, inputs, labels, torch.full((6,), 3), max_grad_norm=0.5)
    assert torch.equal(only, flat(alone))
    assert torch.equal(third.values[0], only)
    assert third.clients.tolist() == [3]


@pytest.mark.parametrize("block", [B_ONLY, EVERYTHING], ids=lambda b: "+".join(sorted(b)))
def test_another_clients_rows_change_no_bit_where_the_lengths_stay(block: Block) -> None:
    model = small_model()
    starts = starts_of(model, block)
    engine = FusedGradients(model, train_only(model, block), loss=class_losses)
    rows = random_rows(len(OWNER), seed=1)
    labels = torch.arange(len(OWNER)) % 3
    other_rows, other_labels = [list(row) for row in rows], labels.clone()
    for index in (OWNER == 2).nonzero().squeeze(1).tolist():
        other_rows[index] = [(token + 11) % 36 + 4 for token in rows[index]]
        other_labels[index] = (labels[index] + 1) % 3
    one, other = (
        together(engine, starts, batch(r), of, OWNER, max_grad_norm=0.5)
        for r, of in ((rows, labels), (other_rows, other_labels))
    )
    assert torch.equal(one.values[[0, 2]], other.values[[0, 2]])
    assert not torch.isclose(one.values[1], other.values[1]).all()


POISON_LABEL = 2


def poisoned(value: float) -> Callable:
    return LossOfLogits(
        lambda logits, labels: cross_entropy(logits, labels) * torch.where(labels == POISON_LABEL, value, 1.0)
    )


def check_bad_rows_stay_with_their_client(make_engine: Callable, value: float, block: Block) -> None:
    """Rows of client 2 go bad: the others' sums stay bit for bit, and its own is what its good rows give."""
    model = small_model()
    starts = starts_of(model, block)
    inputs, _ = examples_of("bert", len(OWNER))
    good = torch.arange(len(OWNER)) % 2
    bad = good.clone()
    bad[[0, 4]] = POISON_LABEL
    kept = torch.ones(len(OWNER), dtype=torch.bool)
    kept[[0, 4]] = False
    engine = make_engine(model, train_only(model, block), loss=poisoned(value))
    clean, dirty = (together(engine, starts, inputs, labels, OWNER, max_grad_norm=0.3) for labels in (good, bad))
    without = together(
        engine, starts, {n: t[kept] for n, t in inputs.items()}, bad[kept], OWNER[kept], max_grad_norm=0.3
    )
    assert torch.equal(dirty.values[[0, 2]], clean.values[[0, 2]])
    moved = float((dirty.values[1] - without.values[1]).norm())
    assert moved <= 2 * 0.3 * (1 + 1e-5)
    if not math.isfinite(value):
        assert moved <= 1e-6 * float(without.values[1].norm())


@pytest.mark.parametrize("block", [B_ONLY, EVERYTHING], ids=lambda b: "+".join(sorted(b)))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e36, -3e38])
def test_bad_rows_of_one_client_do_not_reach_the_others(value: float, block: Block) -> None:
    check_bad_rows_stay_with_their_client(FusedGradients, value, block)


@pytest.mark.parametrize(
    ("change", "block"),
    [
        (("        self.values.masked_fill_(silent[:, None], 0.0)  # 0 * nan is nan\n", ""), B_ONLY),
        (("is_loud = own != 0  # 0 * nan is nan", "is_loud = own == own"), EVERYTHING),
    ],
    ids=["lora", "head"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_a_guard_they_would(change: tuple[str, str], block: Block, value: float) -> None:
    with pytest.raises(AssertionError):
        check_bad_rows_stay_with_their_client(engine_over(change), value, block)


RANKS = (4, 1, 2, 3, 1)


def check_a_rank_is_a_model_of_that_rank(make_engine: Callable, block: Block) -> None:
    """Each client's sum is that of a model of its rank, over the first rows of A, and zero beyond."""
    wide = small_model(targets="all-linear")
    starts = starts_of(wide, block)
    stack = Stack.of(starts, ranks=RANKS)
    inputs, labels = examples_of("bert", len(OWNER))
    engine = make_engine(wide, train_only(wide, block), loss=class_losses)
    got = engine.clipped_sums(
        Batch(inputs, labels), owner=OWNER, stacks=stack.by_slot(), max_grad_norm=0.5, ranks=torch.tensor(RANKS)
    )
    for client, values in zip(got.clients.tolist(), got.values, strict=True):
        rank = RANKS[client]
        narrow = small_model(targets="all-linear", rank=rank)
        everything = {slot: p.detach() for slot, p in adapter_parameters(wide).items()} | starts[client]
        write_adapter(narrow, {slot: inside(value, slot, rank) for slot, value in everything.items()})
        oracle = LoopGradients(narrow, train_only(narrow, block), loss=class_losses)
        mine = {name: tensor[OWNER == client] for name, tensor in inputs.items()}
        wanted = oracle.clipped_sum(Batch(mine, labels[OWNER == client]), max_grad_norm=0.5)
        parts = Stack(values[None], stack.shapes).by_slot()
        for slot, part in parts.items():
            own = inside(part[0], slot, rank)
            torch.testing.assert_close(own, wanted[slot], rtol=1e-4, atol=2e-6)
            assert float(part[0].norm()) == pytest.approx(float(own.norm()), rel=1e-6), "a gradient beyond the rank"


def inside(tensor: Tensor, slot: Slot, rank: int) -> Tensor:
    if slot.role == HEAD:
        return tensor
    return tensor[:rank] if slot.role == LORA_A else tensor[:, :rank]


@pytest.mark.parametrize("block", [B_ONLY, frozenset({LORA_A}), EVERYTHING], ids=lambda b: "+".join(sorted(b)))
def test_a_client_of_lower_rank_has_the_sum_of_a_model_of_that_rank(block: Block) -> None:
    check_a_rank_is_a_model_of_that_rank(FusedGradients, block)


@pytest.mark.parametrize(
    ("change", "block"),
    [
        (("            h.mul_(ctx.mask)\n", "            pass\n"), B_ONLY),
        (("            u.mul_(ctx.mask)\n", "            pass\n"), frozenset({LORA_A})),
        (("< ranks[:, None]", "<= ranks[:, None]"), B_ONLY),
        (
            (
                "self.ranks if self.owner is None else self.ranks[self.owner]",
                "self.ranks.amax().repeat(len(self.owner))",
            ),
            B_ONLY,
        ),
    ],
    ids=["forward", "backward", "one too many", "the largest for all"],
)
def test_a_rank_that_is_not_kept_is_caught(change: tuple[str, str], block: Block) -> None:
    with pytest.raises(AssertionError):
        check_a_rank_is_a_model_of_that_rank(engine_over(change), block)


def test_tensors_of_a_client_are_copies_that_fill_its_row_of_the_stack() -> None:
    starts = starts_of(small_model(), EVERYTHING, num_clients=3)
    stack = Stack.of(starts)
    for client, start in enumerate(starts):
        tensors = stack.tensors(client)
        assert list(tensors) == sorted(start)
        assert all(torch.equal(tensors[slot], start[slot]) for slot in start)
        assert torch.equal(flat(tensors), stack.theta[client])
        for tensor in tensors.values():
            tensor.zero_()
        assert torch.equal(flat(start), stack.theta[client])
    stack.by_slot()[min(starts[0])][1].fill_(7.0)
    assert (stack.tensors(1)[min(starts[0])] == 7.0).all()
    assert torch.equal(flat(starts[1]), flat(starts_of(small_model(), EVERYTHING, num_clients=3)[1]))


@pytest.mark.parametrize("ranks", [(0, 1), (1,), (1, 2, 3)])
def test_ranks_that_do_not_fit_are_refused(ranks: tuple[int, ...]) -> None:
    starts = starts_of(small_model(), A_AND_B, num_clients=2)
    with pytest.raises(ValueError, match="rank"):
        Stack.of(starts, ranks=ranks)
