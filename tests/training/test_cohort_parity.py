"""Clients that train together end where each of them ends alone, over the same streams.

Mutants this file kills: one generator for all clients, noise of another client or shape, an owner that is not the
row's, a sum over all clients, a batch cut short, no clip, tensors of another client.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, Block
from fedlr.models.peft_state import adapter_parameters, train_only, write_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training import cohort as shipped
from fedlr.training.gradients import HookGradients, SumGradients
from fedlr.training.local import LocalTraining, train_client
from tests.training.cohort_runs import CohortBench, dealt, flat
from tests.training.local_runs import BOUND, DIVISOR, SIGMA
from tests.training.small_models import A_AND_B, B_AND_HEAD, B_ONLY, client_data, mutant, random_rows, small_model

SGD = partial(torch.optim.SGD, lr=0.5)
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
SIZES, CLIENT_IDS = (9, 0, 1, 30), (4, 0, 7, 2)
CLIENTS = [client_data(random_rows(size, seed=size)) for size in SIZES]


def one_by_one(
    block: Block,
    clients: Sequence[TokenisedText],
    *,
    num_steps: int,
    sample_rate: float,
    optimizer: Callable,
    architecture: str = "bert",
    private: bool = True,
    seed: int = 11,
) -> tuple[Tensor, Tensor]:
    """Return where each client starts, and where `train_client` and Opacus' hooks take it, (C, V) each."""
    model = small_model(architecture)
    trained = train_only(model, block)
    gradients = (HookGradients if private else SumGradients)(model, trained, loss=class_losses)
    start = {slot: p.detach().clone() for slot, p in trained.items()}
    ends = []
    for share, client_id in zip(dealt(clients), CLIENT_IDS, strict=True):
        write_adapter(model, start)
        train_client(
            model,
            gradients,
            share,
            training=LocalTraining(num_steps, optimizer, 64, DIVISOR, PoissonSampler(sample_rate)),
            mechanism=Mechanism(SIGMA, BOUND, sample_rate, DIVISOR) if private else None,
            randomness=SeededRandomness(seed),
            client_id=client_id,
            round_index=2,
            trained=trained,
        )
        ends.append(flat(trained))
    gradients.close()
    return flat(start), torch.stack(ends)


def together(
    cohort: ModuleType, bench: CohortBench, clients: Sequence[TokenisedText], *, private: bool = True, **run: object
) -> Tensor:
    """Return where the same clients end together, (C, V)."""
    mechanism = "default" if private else None
    bench.releases(cohort, clients, client_ids=CLIENT_IDS, round_index=2, mechanism=mechanism, **run)
    return bench.stack.theta.clone()


def worst(got: Tensor, wanted: Tensor, start: Tensor) -> float:
    """Return the largest distance of a client, relative to how far it went."""
    return float(((got - wanted).norm(dim=1) / (wanted - start).norm(dim=1)).max())


def check_parity(cohort: ModuleType, bench: CohortBench, *, tolerance: float = 1e-6, **run: object) -> None:
    start, wanted = one_by_one(bench.block, CLIENTS, architecture=bench.architecture, **run)
    got = together(cohort, bench, CLIENTS, **run)
    assert worst(got, wanted, start) <= tolerance
    assert (wanted - start).norm(dim=1).min() > 0.1 * start.norm()  # all of them went somewhere


RUN = {"num_steps": 20, "sample_rate": 0.1, "optimizer": SGD}


@pytest.mark.parametrize("sample_rate", [0.02, 0.3])
@pytest.mark.parametrize("block", [B_ONLY, B_AND_HEAD, A_AND_B | {HEAD}], ids=lambda b: "+".join(sorted(b)))
def test_after_twenty_steps_each_client_is_where_it_would_be_alone(block: Block, sample_rate: float) -> None:
    check_parity(shipped, CohortBench(block=block), **{**RUN, "sample_rate": sample_rate})


@pytest.mark.parametrize("architecture", ["distilbert", "llama", "gpt2", "albert"])
def test_so_it_is_with_other_architectures(architecture: str) -> None:
    check_parity(shipped, CohortBench(block=B_ONLY, architecture=architecture), **RUN)


def test_so_it_is_with_adamw() -> None:
    # An update of AdamW is about lr, whatever the gradient is: it magnifies the rounding of entries near zero. Noise
    # keeps most entries away from it; measured 1.3e-7.
    check_parity(shipped, CohortBench(block=B_AND_HEAD), tolerance=2e-6, **{**RUN, "optimizer": ADAMW})


def test_so_it_is_without_privacy() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    run = {"num_steps": 20, "sample_rate": 0.5, "optimizer": sgd, "private": False}
    start, wanted = one_by_one(B_AND_HEAD, CLIENTS, **run)
    got = together(shipped, CohortBench(block=B_AND_HEAD), CLIENTS, **run)
    moved = [0, 3]  # one client has no row, and one draws its only row now and then
    assert worst(got[moved], wanted[moved], start) <= 1e-5  # nothing hides how training magnifies the last bits
    assert torch.equal(got[1], start)


def test_cuts_into_micro_batches_change_nothing_beyond_rounding() -> None:
    bench = CohortBench(block=B_AND_HEAD)
    run = {**RUN, "sample_rate": 0.3}
    start, wanted = one_by_one(bench.block, CLIENTS, **run)
    for token_budget in (1, 20, 10_000):
        assert worst(together(shipped, bench, CLIENTS, token_budget=token_budget, **run), wanted, start) <= 1e-6


def test_the_number_of_threads_changes_no_bit() -> None:
    run = {**RUN, "sample_rate": 0.5, "token_budget": 20}
    ends = [together(shipped, CohortBench(block=B_AND_HEAD, num_workers=n), CLIENTS, **run) for n in (1, 2, 5)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_the_order_of_the_clients_and_who_else_trains_change_nothing_beyond_rounding() -> None:
    bench = CohortBench(block=B_AND_HEAD)
    shares, run = dealt(CLIENTS), {**RUN, "sample_rate": 0.3, "round_index": 2}
    start, wanted = flat(bench.start), together(shipped, bench, CLIENTS, **{**RUN, "sample_rate": 0.3})
    for order in ([3, 2, 1, 0], [2, 0, 3, 1], [3], [1], [0, 3]):
        bench.releases(shipped, [shares[i] for i in order], client_ids=[CLIENT_IDS[i] for i in order], **run)
        assert worst(bench.stack.theta, wanted[order], start) <= 1e-6


def test_clients_that_start_elsewhere_end_where_they_would_alone() -> None:
    bench = CohortBench(block=A_AND_B)
    generator = torch.Generator().manual_seed(0)
    starts = [
        {slot: v + 0.1 * torch.randn(v.shape, generator=generator) for slot, v in bench.start.items()} for _ in SIZES
    ]
    shares, run = dealt(CLIENTS), {**RUN, "sample_rate": 0.3}
    bench.releases(shipped, shares, starts=starts, client_ids=CLIENT_IDS, **run)
    got = bench.stack.theta.clone()
    for index, share in enumerate(shares):
        bench.releases(shipped, [share], starts=[starts[index]], client_ids=[CLIENT_IDS[index]], **run)
        assert worst(got[index, None], bench.stack.theta, flat(starts[index])) <= 1e-6


def test_a_client_of_lower_rank_trains_as_a_model_of_that_rank_and_is_noised_within_it() -> None:
    ranks, block = (4, 2, 1, 3), A_AND_B | {HEAD}
    bench = CohortBench(block=block)
    run = {"num_steps": 5, "sample_rate": 0.3, "optimizer": SGD}
    bench.releases(shipped, CLIENTS, client_ids=CLIENT_IDS, ranks=ranks, **run)
    for client, rank in enumerate(ranks):
        narrow = CohortBench(block=block)
        narrow.model = small_model(rank=rank)
        own = {
            slot: p if slot.role == HEAD else p[:rank] if slot.role == LORA_A else p[:, :rank]
            for slot, p in adapter_parameters(bench.model).items()
        }
        write_adapter(narrow.model, own)
        trained = train_only(narrow.model, block)
        train_client(
            narrow.model,
            HookGradients(narrow.model, trained, loss=class_losses),
            dealt(CLIENTS)[client],
            training=LocalTraining(5, SGD, 64, DIVISOR, PoissonSampler(0.3)),
            mechanism=Mechanism(SIGMA, BOUND, 0.3, DIVISOR),
            randomness=SeededRandomness(11),
            client_id=CLIENT_IDS[client],
            round_index=0,
            trained=trained,
        )
        for slot, got in bench.stack.tensors(client).items():
            inside = shipped.within(got, slot, rank)
            torch.testing.assert_close(inside, trained[slot].detach(), rtol=1e-5, atol=2e-6)
            assert not shipped.beyond(got, slot, rank).any()


CREDITED = "owner = torch.from_numpy(owners[places])"
DRAWN = "    rows, owners = np.concatenate(drawn)"
WRONG = {
    "one generator for all": [
        ("noises = [randomness.noise(**key) for key in keys]", "noises = [randomness.noise(**keys[0])] * len(keys)")
    ],
    "noise of another client": [("generators[client])", "generators[client - 1])")],
    "noise of another shape": [
        ("gaussian_noise(own.shape,", "gaussian_noise(own.T.shape,"),
        ("generator=generators[client])", "generator=generators[client]).T"),
    ],
    "a sum over all clients": [("        found.add_to(total)", "        total += found.values.sum(dim=0)")],
    "a batch cut short": [(DRAWN, f"    drawn = [mine[:2] for mine in drawn]\n{DRAWN}")],
    "tensors of another client": [
        ("stacks = stack.by_slot()", "stacks = {s: v.roll(1, 0) for s, v in stack.by_slot().items()}")
    ],
    "no clip": [
        (
            "            max_grad_norm=max_grad_norm,\n            ranks=ranks",
            "            max_grad_norm=math.inf,\n            ranks=ranks",
        )
    ],
    "an owner that is not the row's": [(CREDITED, CREDITED.replace("owners[places]", "np.sort(owners[places])"))],
}


@pytest.mark.parametrize("name", WRONG)
def test_training_that_differs_is_caught(name: str) -> None:
    run = {**RUN, "num_steps": 4, "sample_rate": 0.3}
    with pytest.raises(AssertionError):
        check_parity(mutant(shipped, *WRONG[name]), CohortBench(block=A_AND_B), **run)
