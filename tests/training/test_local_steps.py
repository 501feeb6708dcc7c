"""Steps, divisor, sampling and noise come from the configuration and the streams, not from the data.

R-P3, R-P5, R-P6, R-P7 and the scale of the noise (acceptance 22). Mutants this file kills: a divisor, number
of steps or a skipped step that depends on the data; shuffled, capped or retried batches; rows of another client;
one stream for all clients, rounds or steps; noise from torch's global generator, 2/3 or 3/2 of what it should be, or
missing.
"""

import ast
import inspect
import itertools
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from fedlr.adapters.state import LORA_B, Slot
from fedlr.errors import InputError
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler, ShuffledSampler, UnsupportedSampling
from fedlr.streams import OsRandomness, SeededRandomness
from fedlr.tasks.batch import Batch
from fedlr.training import local as shipped
from fedlr.training.gradients import SumGradients
from tests.training.local_runs import BOUND, DIVISOR, SIGMA, Bench, KeepingSGD, RowCounts, silent_data
from tests.training.small_models import B_AND_HEAD, B_ONLY, among_others, client_data, mutant, random_rows

SIZES = (0, 1, 7, 63, 64, 65)
DRAW = "rows = data.rows[training.sampler.draw(len(data), randomness.sampling(**key))]"


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def check_release_ignores_the_number_of_rows(local: ModuleType, bench: Bench) -> None:
    """With zero gradients and the same noise, clients of every size release the same bits."""
    reference = bench.releases(local, silent_data(8), num_steps=3)
    for num_rows in SIZES:
        got = bench.releases(local, silent_data(num_rows), num_steps=3)
        assert bench.num_steps == 3
        assert len(got) == 3
        assert all(torch.equal(g, r) for g, r in zip(got, reference, strict=True))


def test_divisor_and_steps_do_not_depend_on_the_number_of_rows(bench: Bench) -> None:
    check_release_ignores_the_number_of_rows(shipped, bench)


@pytest.mark.parametrize(
    "change",
    [
        ("value / training.divisor", "value / max(1, len(rows))"),
        ("value / training.divisor", "value / max(1, len(data.labels) // 8)"),  # as Opacus does
        ("range(training.num_steps)", "range(max(1, len(data.labels) // 21))"),
        ("return training.num_steps", "return sum(len(rows) > 0 for _ in range(training.num_steps))"),
        (
            "        total = sum_over(",
            "        if len(rows) == 0:\n            continue\n        total = sum_over(",
        ),
    ],
)
def test_divisor_or_steps_from_the_data_are_caught(change: tuple[str, str], bench: Bench) -> None:
    with pytest.raises(AssertionError):
        check_release_ignores_the_number_of_rows(mutant(shipped, change), bench)


def test_the_sum_is_divided_by_the_configured_constant(bench: Bench) -> None:
    data = client_data(random_rows(9, seed=1))
    quiet = Mechanism(0.0, BOUND, 1.0, DIVISOR)
    (got,) = bench.releases(shipped, data, mechanism=quiet)
    inputs, labels = data.batch(range(9))
    total = bench.engine.clipped_sum(Batch(inputs, labels), max_grad_norm=BOUND)
    expected = torch.cat([value.flatten() for value in total.values()]) / DIVISOR
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def size_reads(source: str) -> list[str]:
    """Find reads of what a change of the data changes: any but as the argument of a draw."""
    tree = ast.parse(source)
    drawn = [
        a for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(".draw") for a in n.args
    ]
    allowed = {id(node) for argument in drawn for node in ast.walk(argument)}
    private = {"data", "table", "rows", "indices", "inputs", "labels", "part"}
    found = []
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "len",
            "print",
            "any",
            "all",
            "sum",
            "bool",
        }:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in {
            "shape",
            "size",
            "numel",
            "sum",
            "mean",
            "any",
            "item",
        }:
            owner = next((n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)), "")
            if owner in private:
                found.append(ast.unparse(node))
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            if names & (private | {"total"}):
                found.append(ast.unparse(node.test))
        if isinstance(node, ast.Import | ast.ImportFrom) and "logging" in ast.unparse(node):
            found.append(ast.unparse(node))
    return found


def test_no_size_of_the_data_is_read_outside_the_draw() -> None:
    assert size_reads(inspect.getsource(shipped)) == []


@pytest.mark.parametrize(
    "line",
    [
        "divisor = len(data.labels)",
        "n = labels.shape[0]",
        "if rows.any():\n    pass",
        "import logging",
        "print(rows)",
    ],
)
def test_the_lint_finds_sizes_that_are_read(line: str) -> None:
    assert size_reads(line)


def check_noise_is_fresh(local: ModuleType, bench: Bench) -> None:
    """No two noise vectors of clients, rounds or steps are alike, under one global seed for all."""
    vectors = []
    for client_id, round_index in itertools.product(range(10), range(3)):
        torch.manual_seed(42)
        np.random.seed(42)
        vectors += bench.releases(
            local, silent_data(client_id % 2), num_steps=3, client_id=client_id, round_index=round_index
        )
    correlation = torch.corrcoef(torch.stack(vectors)).fill_diagonal_(0.0)
    assert torch.unique(torch.stack(vectors), dim=0).shape[0] == 10 * 3 * 3
    assert correlation.abs().max() < 5 / vectors[0].numel() ** 0.5


def test_every_client_round_and_step_has_its_own_noise(bench: Bench) -> None:
    check_noise_is_fresh(shipped, bench)


@pytest.mark.parametrize(
    "change",
    [
        ('"client": client_id', '"client": 0'),
        ('"round_index": round_index', '"round_index": 0'),
        ('"step": step', '"step": 0'),
        ("noise.to(total[slot].device)", "torch.randn(noise.shape) * std"),
        ("total[slot] + noise.to(total[slot].device)", "total[slot]"),
    ],
)
def test_shared_or_missing_noise_is_caught(change: tuple[str, str], bench: Bench) -> None:
    with pytest.raises(AssertionError):
        check_noise_is_fresh(mutant(shipped, change), bench)


def test_noise_of_the_operating_system_does_not_repeat(bench: Bench) -> None:
    """Two Gaussians are as close with probability 3.2e-6; of n numbers 9 are with less than (3.2e-6 n)^9 / 9!."""
    one, other = (bench.releases(shipped, silent_data(1), randomness=OsRandomness())[0] for _ in range(2))
    assert (3.2e-6 * one.numel()) ** 9 / math.factorial(9) < 1e-9
    assert torch.isclose(one, other).sum() < 9 < one.numel() / 2


def check_global_generators_are_left_alone(local: ModuleType, bench: Bench) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    bench.releases(local, client_data(random_rows(3, seed=2)), num_steps=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_no_global_generator_is_used(bench: Bench) -> None:
    check_global_generators_are_left_alone(shipped, bench)


def check_noise_scale(local: ModuleType, bench: Bench) -> None:
    """1e5 numbers: Gaussian, of standard deviation sigma * C / divisor within 1% (4.5 standard errors)."""
    num_steps = -(-100_000 // sum(p.numel() for p in bench.trained.values()))
    values = torch.cat(bench.releases(local, silent_data(1), num_steps=num_steps)).double()
    expected = SIGMA * BOUND / DIVISOR
    assert float(values.std()) == pytest.approx(expected, rel=0.01)
    assert abs(float(values.mean())) < 5 * expected / len(values) ** 0.5
    assert kstest(values.numpy(), "norm", args=(0.0, expected)).pvalue > 1e-6


def test_noise_has_the_scale_that_is_accounted(bench: Bench) -> None:
    check_noise_scale(shipped, bench)


@pytest.mark.parametrize(
    "std",
    [
        "std * 2 / 3",
        "std * 3 / 2",
        "mechanism.noise_multiplier",
        "std / mechanism.divisor",
        "std * (slot.role == 'lora_B')",
    ],
)
def test_noise_of_another_scale_is_caught(std: str, bench: Bench) -> None:
    with pytest.raises(AssertionError):
        check_noise_scale(mutant(shipped, ("std=std", f"std={std}")), bench)


@pytest.mark.parametrize(("num_rows", "sample_rate"), [(0, 0.5), (1, 0.01), (2, 0.01)])
def test_an_empty_batch_is_a_full_noisy_step(num_rows: int, sample_rate: float, bench: Bench) -> None:
    got = bench.releases(shipped, client_data(random_rows(num_rows, seed=3)), num_steps=4, sample_rate=sample_rate)
    assert len(got) == bench.num_steps == 4
    for release in got:
        assert float(release.std()) == pytest.approx(SIGMA * BOUND / DIVISOR, rel=0.2)


def check_batches_are_poisson(local: ModuleType, *, num_rows: int, sample_rate: float, num_steps: int = 3000) -> None:
    """Marginals, pairs, sizes and empty batches of what is really summed, each within 5 standard errors."""
    slot, parameter = Slot("rows", LORA_B), nn.Parameter(torch.zeros(num_rows))
    kept: list[torch.Tensor] = []
    training = shipped.LocalTraining(
        num_steps=num_steps,
        optimizer=lambda parameters: KeepingSGD(parameters, kept=kept, lr=0.0),
        token_budget=7,
        divisor=1.0,
        sampler=PoissonSampler(sample_rate),
    )
    local.train_client(
        nn.Identity(),
        RowCounts(slot, num_rows),
        among_others(client_data([[row] for row in range(num_rows)])),
        training=training,
        mechanism=Mechanism(0.0, 1.0, sample_rate, 1.0),
        randomness=SeededRandomness(5),
        client_id=3,
        round_index=1,
        trained={slot: parameter},
    )
    joined, q = torch.stack(kept).double(), sample_rate
    assert len(kept) == num_steps
    assert set(joined.unique().tolist()) <= {0.0, 1.0}
    error = 5 / num_steps**0.5
    assert (joined.mean(dim=0) - q).abs().max() < error * (q * (1 - q)) ** 0.5
    centred = joined - q
    covariance = centred.T @ centred / num_steps
    assert covariance.fill_diagonal_(0.0).abs().max() < error * q * (1 - q)
    variance = num_rows * q * (1 - q)
    sizes = joined.sum(dim=1)
    assert abs(float(((sizes - num_rows * q) ** 2).mean()) - variance) < error * variance * (2 + 1 / variance) ** 0.5
    empty = (1 - q) ** num_rows
    assert abs(float((sizes == 0).double().mean()) - empty) < error * (empty * (1 - empty)) ** 0.5


SAMPLING = [(20, 0.25), (3, 0.3), (1, 0.5)]


@pytest.mark.parametrize(("num_rows", "sample_rate"), SAMPLING)
def test_batches_are_poisson(num_rows: int, sample_rate: float) -> None:
    check_batches_are_poisson(shipped, num_rows=num_rows, sample_rate=sample_rate)


IMPORT = "from fedlr.privacy.sampling import PoissonSampler, Sampler"
NOT_POISSON = {
    "shuffled": [
        (DRAW, DRAW.replace("training.sampler", "ShuffledSampler(5)")),
        (IMPORT, f"{IMPORT}, ShuffledSampler"),
    ],
    "capped": [(DRAW, DRAW + "[:3]")],
    "rows of others": [(DRAW, DRAW.replace("data.rows[", "(").replace("]", ")"))],
    "skipped when empty": [
        ("        total = sum_over(", "        if not len(rows): continue\n        total = sum_over(")
    ],
    "never empty": [(DRAW, f"{DRAW}\n        rows = rows if len(rows) else np.arange(1)")],
    "one stream": [("randomness.sampling(**key)", "randomness.sampling(client=0, round_index=0, step=0)")],
    "doubled": [("in micro_batches(table.lengths, rows,", "in micro_batches(table.lengths, np.repeat(rows, 2),")],
    "last batch dropped": [("token_budget=training.token_budget):", "token_budget=training.token_budget)[:-1]:")],
}


@pytest.mark.parametrize("name", NOT_POISSON)
def test_batches_that_are_not_poisson_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_batches_are_poisson(mutant(shipped, *NOT_POISSON[name]), num_rows=20, sample_rate=0.1)


@pytest.mark.parametrize(
    ("sampler", "mechanism", "error"),
    [
        (ShuffledSampler(4), Mechanism(1.0, 1.0, 0.5, 2.0), UnsupportedSampling),
        (PoissonSampler(0.5), Mechanism(1.0, 1.0, 0.25, 2.0), InputError),
        (PoissonSampler(0.5), Mechanism(1.0, 1.0, 0.5, 4.0), InputError),
    ],
)
def test_steps_that_are_not_as_accounted_are_refused(
    sampler: object, mechanism: Mechanism, error: type[Exception], bench: Bench
) -> None:
    training = shipped.LocalTraining(1, torch.optim.SGD, token_budget=64, divisor=2.0, sampler=sampler)
    with pytest.raises(error):
        shipped.train_client(
            bench.model,
            bench.engine,
            None,  # there are no data to read
            training=training,
            mechanism=mechanism,
            randomness=SeededRandomness(0),
            client_id=0,
            round_index=0,
            trained=bench.trained,
        )


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"token_budget": 0}, {"divisor": 0.0}, {"divisor": float("inf")}])
def test_steps_that_cannot_be_taken_are_refused(wrong: dict[str, float]) -> None:
    right = {"num_steps": 1, "token_budget": 8, "divisor": 2.0}
    with pytest.raises(InputError):
        shipped.LocalTraining(optimizer=torch.optim.SGD, sampler=PoissonSampler(0.5), **(right | wrong))


def test_without_privacy_the_same_rows_are_summed_without_clip_or_noise() -> None:
    data = client_data(random_rows(12, seed=4))
    plain = Bench(make_engine=SumGradients).releases(shipped, data, num_steps=3, sample_rate=0.4, mechanism=None)
    wide = Mechanism(0.0, 1e6, 0.4, DIVISOR)
    clipped = Bench().releases(shipped, data, num_steps=3, sample_rate=0.4, mechanism=wide)
    torch.testing.assert_close(torch.stack(plain), torch.stack(clipped), rtol=1e-4, atol=1e-6)


def test_a_plain_sum_is_refused_under_a_mechanism() -> None:
    with pytest.raises(InputError, match="no epsilon would hold"):
        Bench(make_engine=SumGradients).releases(shipped, client_data([[5, 6]]))


@pytest.mark.parametrize("block", [B_ONLY, B_AND_HEAD], ids=lambda b: "+".join(sorted(b)))
def test_exactly_the_trained_tensors_are_noised_and_nothing_else_changes(block: frozenset[str]) -> None:
    bench = Bench(block=block)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    bench.releases(shipped, silent_data(2), lr=1.0)
    trainable = {name for name, p in bench.model.named_parameters() if p.requires_grad}
    changed = {n for n, value in bench.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == trainable
    assert len(changed) == len(bench.trained)
    assert {slot.role for slot in bench.trained} == block
    # Every single entry moved: none was left without noise.
    assert all((bench.model.state_dict()[n] != before[n]).all() for n in changed)


def test_an_empty_batch_changes_weights_by_noise_alone(bench: Bench) -> None:
    (release,) = bench.releases(shipped, client_data([]), lr=1.0)
    moved = torch.cat([(bench.start.tensors[slot] - p.detach()).flatten() for slot, p in bench.trained.items()])
    torch.testing.assert_close(moved, release, rtol=1e-4, atol=1e-6)
