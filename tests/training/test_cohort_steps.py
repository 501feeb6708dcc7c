"""A cohort's steps, divisor, sampling and noise come from the configuration and each client's own streams.

R-P3, R-P5, R-P6, R-P7 and R-P8 of training many clients at once. Mutants this file kills: a divisor, a number of steps
or a skipped step that depends on the data of one client or of all; capped, retried or dropped batches, rows of others,
one sampling stream for all; noise shared by clients, rounds or steps, from torch's global generator, split among the
clients, of another scale, or missing; an optimizer that mixes clients.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from fedlr.adapters.state import HEAD, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import read_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler, ShuffledSampler, UnsupportedSampling
from fedlr.streams import OsRandomness, SeededRandomness
from fedlr.tasks.batch import Batch
from fedlr.training import cohort as shipped
from fedlr.training.fused import ClippedSums
from fedlr.training.local import LocalTraining
from tests.training.cohort_runs import CohortBench, dealt, flat, worker_threads
from tests.training.local_runs import BOUND, DIVISOR, SIGMA, KeepingSGD, silent_data
from tests.training.small_models import A_AND_B, B_AND_HEAD, B_ONLY, client_data, mutant, random_rows

SIZES = (0, 1, 7, 63, 64, 65)
TOTAL = "        total = sum_over_cohort("
DIVIDED = "total.div_(training.divisor)"
DRAW = "share.rows[training.sampler.draw(len(share), randomness.sampling(**key))]"
NOISES = "noises = [randomness.noise(**key) for key in keys]"
STD = "std = mechanism.noise_multiplier * mechanism.max_grad_norm"


@pytest.fixture(scope="module")
def bench() -> CohortBench:
    return CohortBench()


def check_release_ignores_the_number_of_rows(cohort: ModuleType, bench: CohortBench) -> None:
    """With zero gradients and one stream of noise, clients of every size release the same bits, whoever is beside."""
    run = {"num_steps": 3, "client_ids": [0] * len(SIZES), "token_budget": 1000}
    reference = bench.releases(cohort, [silent_data(8) for _ in SIZES], **run)
    got = bench.releases(cohort, [silent_data(size) for size in SIZES], **run)
    assert bench.num_steps == len(got) == len(reference) == 3
    for release, same in zip(got, reference, strict=True):
        assert torch.equal(release, same)
        assert torch.equal(release, release[:1].expand_as(release))


def test_divisor_and_steps_do_not_depend_on_the_number_of_rows(bench: CohortBench) -> None:
    check_release_ignores_the_number_of_rows(shipped, bench)


@pytest.mark.parametrize(
    "change",
    [
        (DIVIDED, "total.div_(torch.tensor([[max(1.0, len(mine))] for mine in drawn]))"),
        (DIVIDED, "total.div_(max(1, sum(map(len, drawn))))"),
        (DIVIDED, "total.div_(max(1, len(shares[0]) // 4))"),
        ("range(training.num_steps)", "range(max(1, len(shares[0]) // 3))"),
        ("return training.num_steps", "return sum(len(mine) > 0 for mine in drawn)"),
        (TOTAL, f"        if any(len(mine) == 0 for mine in drawn):\n            continue\n{TOTAL}"),
        (DIVIDED, f"total[[i for i, mine in enumerate(drawn) if len(mine) == 0]] = 0.0\n        {DIVIDED}"),
    ],
    ids=["own batch", "all batches", "a size", "steps", "steps said", "skipped for all", "no noise where empty"],
)
def test_divisor_or_steps_from_the_data_are_caught(change: tuple[str, str], bench: CohortBench) -> None:
    with pytest.raises(AssertionError):
        check_release_ignores_the_number_of_rows(mutant(shipped, change), bench)


def test_each_sum_is_divided_by_the_configured_constant(bench: CohortBench) -> None:
    clients = [client_data(random_rows(number, seed=number)) for number in (5, 2)]
    quiet = Mechanism(0.0, BOUND, 1.0, DIVISOR)
    (got,) = bench.releases(shipped, clients, mechanism=quiet)
    for release, data in zip(got, clients, strict=True):
        inputs, labels = data.batch(range(len(data)))
        total = bench.engines[0].clipped_sum(Batch(inputs, labels), max_grad_norm=BOUND)
        torch.testing.assert_close(release, flat(total) / DIVISOR, rtol=1e-4, atol=1e-6)


def check_noise_is_fresh(cohort: ModuleType, bench: CohortBench) -> None:
    """No two noise vectors of clients, rounds or steps are alike, under one global seed for all."""
    vectors: list[Tensor] = []
    for round_index in range(3):
        torch.manual_seed(42)
        np.random.seed(42)
        clients = [silent_data(client % 2) for client in range(10)]
        for release in bench.releases(cohort, clients, num_steps=3, round_index=round_index):
            vectors += release.unbind()
    together = torch.stack(vectors)
    assert torch.unique(together, dim=0).shape[0] == 10 * 3 * 3
    correlation = torch.corrcoef(together).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / together.shape[1] ** 0.5


def test_every_client_round_and_step_has_its_own_noise(bench: CohortBench) -> None:
    check_noise_is_fresh(shipped, bench)


@pytest.mark.parametrize(
    "change",
    [
        ('"client": client,', '"client": 0,'),
        ('"round_index": round_index', '"round_index": 0'),
        ('"step": step', '"step": 0'),
        (NOISES, "noises = [randomness.noise(**keys[0]) for key in keys]"),
        ("generator=generators[client])", "generator=np.random.default_rng(7))"),
        ("gaussian_noise(own.shape, std=std, generator=generators[client])", "torch.randn(own.shape).mul(std)"),
        ("range(len(total))), maxlen", "range(len(total) - 1)), maxlen"),
        ("range(len(total))), maxlen", "range(0)), maxlen"),
    ],
    ids=["client", "round", "step", "the first client's", "constant", "torch's", "one client without", "none"],
)
def test_shared_or_missing_noise_is_caught(change: tuple[str, str], bench: CohortBench) -> None:
    with pytest.raises(AssertionError):
        check_noise_is_fresh(mutant(shipped, change), bench)


def test_two_clients_with_the_same_rows_release_different_sums(bench: CohortBench) -> None:
    data = client_data(random_rows(4, seed=2))
    (release,) = bench.releases(shipped, [data, data])
    assert not torch.isclose(release[0], release[1]).any()
    (quiet,) = bench.releases(shipped, [data, data], mechanism=Mechanism(0.0, BOUND, 1.0, DIVISOR))
    torch.testing.assert_close(quiet[0], quiet[1], rtol=1e-4, atol=1e-6)


def test_noise_of_the_operating_system_does_not_repeat(bench: CohortBench) -> None:
    """Two Gaussians are as close with probability 3.2e-6; of n numbers 9 are with less than (3.2e-6 n)^9 / 9!."""
    runs = [bench.releases(shipped, [silent_data(1)] * 2, randomness=OsRandomness())[0] for _ in range(2)]
    pairs = list(itertools.combinations(torch.cat(runs), 2))
    close = [int(torch.isclose(one, other).sum()) for one, other in pairs]
    num_values = pairs[0][0].numel()
    assert (3.2e-6 * len(pairs) * num_values) ** 9 / math.factorial(9) < 1e-9
    assert sum(close) < 9 < num_values / 2


def test_no_global_generator_is_used(bench: CohortBench) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    bench.releases(shipped, [client_data(random_rows(3, seed=2)), silent_data(2)], num_steps=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def check_noise_scale(cohort: ModuleType, bench: CohortBench) -> None:
    """1e5 numbers: Gaussian, of standard deviation sigma * C / divisor within 1% (4.5 standard errors)."""
    clients = [silent_data(number) for number in (1, 0, 2, 1)]
    num_values = len(flat(bench.start)) * len(clients)
    values = torch.cat(bench.releases(cohort, clients, num_steps=-(-100_000 // num_values))).flatten().double()
    expected = SIGMA * BOUND / DIVISOR
    assert float(values.std()) == pytest.approx(expected, rel=0.01)
    assert abs(float(values.mean())) < 5 * expected / len(values) ** 0.5
    assert kstest(values.numpy(), "norm", args=(0.0, expected)).pvalue > 1e-6


def test_noise_has_the_scale_that_is_accounted(bench: CohortBench) -> None:
    check_noise_scale(shipped, bench)


@pytest.mark.parametrize(
    "std",
    [
        "std * 2 / 3",
        "std * 3 / 2",
        "mechanism.noise_multiplier",
        "std / mechanism.divisor",
        "std * (slot.role == 'lora_B')",
        "std / len(total) ** 0.5",  # as if the clients shared one draw
        "std * (client > 0)",
    ],
)
def test_noise_of_another_scale_is_caught(std: str, bench: CohortBench) -> None:
    with pytest.raises(AssertionError):
        check_noise_scale(mutant(shipped, ("std=std", f"std={std}")), bench)


@pytest.mark.parametrize("sample_rate", [0.01, 0.5])
def test_an_empty_batch_is_a_full_noisy_step_of_its_client(sample_rate: float, bench: CohortBench) -> None:
    clients = [client_data(random_rows(number, seed=3)) for number in (0, 1, 2)]
    got = bench.releases(shipped, clients, num_steps=4, sample_rate=sample_rate)
    assert len(got) == bench.num_steps == 4
    for release in torch.cat(got):
        assert float(release.std()) == pytest.approx(SIGMA * BOUND / DIVISOR, rel=0.2)


class RowCounts:
    """Stands where the engine does and reports which rows were summed, and for whom: row i holds the token i."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __call__(self, batch: Batch, *, owner: Tensor, stacks: object, **rest: object) -> ClippedSums:
        clients, local = owner.unique(return_inverse=True)
        counts = torch.zeros(len(clients), self.num_rows)
        counts.index_put_((local, batch.inputs["input_ids"][:, 0]), torch.ones(len(owner)), accumulate=True)
        return ClippedSums(clients, counts)


def check_batches_are_poisson(
    cohort: ModuleType, *, sizes: tuple[int, ...], sample_rate: float, num_steps: int = 500
) -> None:
    """Marginals, all pairs (of one client and of two), sizes and empty batches of what is really summed, each within 5
    standard errors."""
    firsts = np.cumsum([0, *sizes])
    num_rows, slot = int(firsts[-1]), Slot("rows", LORA_B)
    clients = [
        client_data([[row] for row in range(first, first + size)])
        for first, size in zip(firsts[:-1], sizes, strict=True)
    ]
    kept: list[Tensor] = []
    training = LocalTraining(
        num_steps=num_steps,
        optimizer=lambda parameters: KeepingSGD(parameters, kept=kept, lr=0.0),
        token_budget=12,
        divisor=1.0,
        sampler=PoissonSampler(sample_rate),
    )
    with worker_threads(1) as threads:
        cohort.train_cohort(
            RowCounts(num_rows),
            threads,
            shipped.Stack.of([{slot: torch.zeros(num_rows)}] * len(sizes)),
            dealt(clients),
            training=training,
            mechanism=Mechanism(0.0, 1.0, sample_rate, 1.0),
            randomness=SeededRandomness(5),
            client_ids=[3, 4, 9][: len(sizes)],
            round_index=1,
        )
    assert len(kept) == num_steps
    summed = torch.stack(kept).double().view(num_steps, len(sizes), num_rows)
    own = torch.zeros(len(sizes), num_rows, dtype=torch.bool)
    for client, first in enumerate(firsts[:-1]):
        own[client, first : first + sizes[client]] = True
    assert not summed[:, ~own].any(), "a row went to another client"
    joined, q = summed[:, own], sample_rate
    assert set(joined.unique().tolist()) <= {0.0, 1.0}
    error = 5 / num_steps**0.5
    assert (joined.mean(dim=0) - q).abs().max() < error * (q * (1 - q)) ** 0.5
    centred = joined - q
    covariance = centred.T @ centred / num_steps
    assert covariance.fill_diagonal_(0.0).abs().max() < error * q * (1 - q)
    for client, size in enumerate(sizes):
        drawn = summed[:, client].sum(dim=1)
        variance = size * q * (1 - q)
        spread = float(((drawn - size * q) ** 2).mean())
        assert abs(spread - variance) < error * variance * (2 + 1 / variance) ** 0.5
        empty = (1 - q) ** size
        assert abs(float((drawn == 0).double().mean()) - empty) < error * (empty * (1 - empty)) ** 0.5


@pytest.mark.parametrize(("sizes", "sample_rate"), [((12, 12, 3), 0.25), ((1, 2), 0.5)])
def test_batches_are_poisson_and_each_clients_own(sizes: tuple[int, ...], sample_rate: float) -> None:
    check_batches_are_poisson(shipped, sizes=sizes, sample_rate=sample_rate)


OWNERS = "np.repeat(np.arange(len(drawn)), [len(mine) for mine in drawn])"
NOT_POISSON = {
    "capped": [(DRAW, DRAW + "[:2]")],
    "capped for the cohort": [("np.arange(len(rows)), token_budget)", "np.arange(len(rows))[:4], token_budget)")],
    "never empty": [(TOTAL, f"        drawn = [m if len(m) else s.rows[:1] for m, s in zip(drawn, shares)]\n{TOTAL}")],
    "skipped when empty": [(TOTAL, f"        if not all(len(mine) for mine in drawn): continue\n{TOTAL}")],
    "rows of others": [(DRAW, DRAW.replace("share.rows[", "(").replace("]", ")"))],
    "one stream": [("randomness.sampling(**key)", "randomness.sampling(**keys[0])")],
    "one stream for all steps": [("randomness.sampling(**key)", "randomness.sampling(**{**key, 'step': 0})")],
    "last batch dropped": [("token_budget)):\n", "token_budget)[:-1]):\n")],
    "doubled": [("np.arange(len(rows)), token_budget)", "np.arange(len(rows)).repeat(2), token_budget)")],
    "credited to another": [(OWNERS, OWNERS.replace("np.repeat", "np.roll(np.repeat") + ", 1)")],
    "all credited to the first": [
        ("owner = torch.from_numpy(owners[places])", "owner = torch.zeros(len(places)).long()")
    ],
}


@pytest.mark.parametrize("name", NOT_POISSON)
def test_batches_that_are_not_poisson_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_batches_are_poisson(mutant(shipped, *NOT_POISSON[name]), sizes=(12, 12, 3), sample_rate=0.25)


class Unreadable:
    """Stands where a client's rows do: whoever looks at them fails the test."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError("a row was looked at")


def train_unreadable(*, optimizer: object = torch.optim.SGD, sampler: object, mechanism: Mechanism | None) -> None:
    """Ask for training of clients whose rows nobody may look at."""
    slot = Slot("layer", LORA_B)
    with worker_threads(1) as threads:
        shipped.train_cohort(
            Unreadable(),
            threads,
            shipped.Stack.of([{slot: torch.zeros(2, 2)}] * 2),
            [Unreadable(), Unreadable()],
            training=LocalTraining(1, optimizer, token_budget=64, divisor=2.0, sampler=sampler),
            mechanism=mechanism,
            randomness=SeededRandomness(0),
            client_ids=[0, 1],
            round_index=0,
        )


@pytest.mark.parametrize(
    ("sampler", "mechanism", "error"),
    [
        (ShuffledSampler(4), Mechanism(1.0, 1.0, 0.5, 2.0), UnsupportedSampling),
        (PoissonSampler(0.5), Mechanism(1.0, 1.0, 0.25, 2.0), InputError),
        (PoissonSampler(0.5), Mechanism(1.0, 1.0, 0.5, 4.0), InputError),
    ],
)
def test_steps_that_are_not_as_accounted_are_refused(
    sampler: object, mechanism: Mechanism, error: type[Exception]
) -> None:
    with pytest.raises(error):
        train_unreadable(sampler=sampler, mechanism=mechanism)


def muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return Muon, which takes matrices only: a cohort is one, a bias is not."""
    return torch.optim.Muon([p if p.dim() == 2 else nn.Parameter(p[None]) for p in parameters])


MIXING = {"LBFGS": torch.optim.LBFGS, "Muon": muon, "Adafactor": torch.optim.Adafactor}


@pytest.mark.parametrize("name", MIXING)
def test_an_optimizer_that_mixes_entries_is_refused_by_name_before_any_row_is_read(name: str) -> None:
    mechanism = Mechanism(1.0, 1.0, 0.5, 2.0)
    with pytest.raises(InputError, match=f"got {name}; set trainer.engine=opacus"):
        train_unreadable(optimizer=MIXING[name], sampler=PoissonSampler(0.5), mechanism=mechanism)


def check_rows_are_optimizers_of_their_own(kind: type[torch.optim.Optimizer]) -> None:
    """Three steps of a matrix are those of its rows, whatever the other rows' gradients are."""
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(3, 8, generator=generator)
    gradients = torch.randn(3, 3, 8, generator=generator) * torch.tensor([1e-3, 1.0, 1e4])[:, None]

    def trained(values: Tensor, steps: Tensor) -> Tensor:
        parameter = nn.Parameter(values.clone())
        optimizer = kind([parameter], lr=0.02)
        for gradient in steps:
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    together = trained(start, gradients)
    alone = torch.cat([trained(start[client, None], gradients[:, client, None]) for client in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    assert not torch.equal(together, start)


@pytest.mark.parametrize("kind", shipped.ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_rows_of_an_elementwise_optimizer_do_not_mix(kind: type[torch.optim.Optimizer]) -> None:
    check_rows_are_optimizers_of_their_own(kind)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
def test_rows_of_other_optimizers_do(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(AssertionError):
        check_rows_are_optimizers_of_their_own(kind)


def test_shares_of_several_tables_are_refused(bench: CohortBench) -> None:
    shares = [dealt([silent_data(2)])[0] for _ in range(2)]
    with pytest.raises(ValueError, match="one table"):
        bench.releases(shipped, shares)


def test_without_privacy_the_same_rows_are_summed_without_clip_or_noise(bench: CohortBench) -> None:
    clients = [client_data(random_rows(number, seed=4)) for number in (9, 5)]
    run = {"num_steps": 3, "sample_rate": 0.4}
    plain = bench.releases(shipped, clients, mechanism=None, **run)
    wide = bench.releases(shipped, clients, mechanism=Mechanism(0.0, 1e6, 0.4, DIVISOR), **run)
    torch.testing.assert_close(torch.stack(plain), torch.stack(wide), rtol=1e-4, atol=1e-6)
    assert torch.stack(plain).norm() > 1


@pytest.mark.parametrize("block", [B_ONLY, A_AND_B, B_AND_HEAD], ids=lambda b: "+".join(sorted(b)))
def test_exactly_the_trained_tensors_are_noised_and_nothing_else_changes(block: frozenset[str]) -> None:
    bench = CohortBench(block=block)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    bench.releases(shipped, [silent_data(2), silent_data(0)], lr=1.0)
    after = bench.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in bench.model.parameters())
    assert {slot.role for slot in bench.stack.shapes} == block
    assert list(bench.stack.shapes) == list(read_adapter(bench.model).select(block))
    assert (HEAD in block) == any(slot.role == HEAD for slot in bench.stack.shapes)
    # Every single entry of every client moved: none was left without noise.
    assert (bench.stack.theta != flat(bench.start)).all()


def test_an_empty_batch_changes_a_client_by_noise_alone(bench: CohortBench) -> None:
    (release,) = bench.releases(shipped, [client_data([]), silent_data(1)], lr=1.0)
    torch.testing.assert_close(flat(bench.start) - bench.stack.theta, release, rtol=1e-4, atol=1e-6)


def most_waiting(module: ModuleType) -> int:
    """Return how many of a thousand results wait for the first to be taken, at most."""
    submitted: list[int] = []

    class Threads(ThreadPoolExecutor):
        def submit(self, work: Any, /, *given: Any, **named: Any) -> Any:
            submitted.append(1)
            return super().submit(work, *given, **named)

    with Threads(2) as threads:
        pieces = [np.array([number]) for number in range(1000)]
        found = module.in_order(threads, lambda piece: piece, pieces)
        most = [len(submitted) - taken for taken, _ in enumerate(found)]
        assert len(most) == 1000 == len(submitted)
    return max(most)


def test_the_memory_of_a_step_does_not_tell_how_many_rows_were_drawn() -> None:
    assert most_waiting(shipped) <= shipped.AHEAD + 1
    unbounded = mutant(shipped, ("islice(rest, AHEAD)", "rest"))
    with pytest.raises(AssertionError):
        assert most_waiting(unbounded) <= shipped.AHEAD + 1
