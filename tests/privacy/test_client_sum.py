"""The mechanism of the client unit: sensitivity, mean and covariance of what is released, and its accounting.

Mutants killed: the clip skipped, or of each tensor by itself; noise in units of the divisor, or of the cohort; the
divisor the number of updates that came; noise drawn once for all tensors; a weight that counts; no noise on an empty
cohort; an update that is not finite let through; epsilon of a fixed cohort amplified.
"""

import itertools
import math
from collections.abc import Sequence
from types import ModuleType

import dp_accounting
import numpy as np
import pytest
import torch
from torch import Tensor

import fedlr.privacy.client_sum
from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import OsRandomness, Purpose, SeededRandomness, stream
from tests.training.small_models import mutant

A, B = Slot("layer", "lora_A"), Slot("layer", "lora_B")
SENT = {A: torch.full((2, 3), 0.5), B: torch.full((4, 2), -1.0)}
NUM_VALUES = 14
MECHANISM = Mechanism(noise_multiplier=1.5, max_grad_norm=0.7, sample_rate=1.0, divisor=4.0)

Changes = Sequence[dict[Slot, Tensor]]


def updates(changes: Changes, weights: Sequence[float] | None = None) -> list[ClientUpdate]:
    return [
        ClientUpdate(k, {slot: SENT[slot] + change[slot] for slot in SENT}, weights[k] if weights else 1.0, 0)
        for k, change in enumerate(changes)
    ]


def some(num_clients: int, *, length: float = 3.0, seed: int = 0) -> list[dict[Slot, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [{slot: torch.randn(t.shape, generator=generator) for slot, t in SENT.items()} for _ in range(num_clients)]
    return [{slot: length * t / math.sqrt(NUM_VALUES) for slot, t in one.items()} for one in drawn]


def vector(change: dict[Slot, Tensor]) -> np.ndarray:
    return np.concatenate([change[slot].double().numpy().ravel() for slot in sorted(change)])


def released(module: ModuleType, given: list[ClientUpdate], mechanism: Mechanism, *, seed: int = 0) -> np.ndarray:
    """Return what leaves, less what was broadcast."""
    generator = stream(seed, Purpose.SERVER_NOISE)
    found = module.released_update(given, SENT, mechanism, generator=generator, round_index=0)
    return vector({slot: found.tensors[slot].double() - SENT[slot].double() for slot in SENT})


WORST = {
    "huge": {A: torch.full((2, 3), 1e6), B: torch.full((4, 2), -1e6)},
    "only one tensor": {A: torch.full((2, 3), 50.0), B: torch.zeros(4, 2)},
    "both tensors at the bound": {A: torch.full((2, 3), 0.7 / 6**0.5), B: torch.full((4, 2), 0.7 / 8**0.5)},
    "not finite": {A: torch.full((2, 3), math.nan), B: torch.zeros(4, 2)},
    "infinite": {A: torch.full((2, 3), math.inf), B: torch.zeros(4, 2)},
    "nothing": {A: torch.zeros(2, 3), B: torch.zeros(4, 2)},
    "tiny": {A: torch.full((2, 3), 1e-30), B: torch.zeros(4, 2)},
}


def check_sensitivity(module: ModuleType) -> None:
    """Fail unless one client, whatever it sends and weighs, moves the sum by at most the bound."""
    noiseless = Mechanism(0.0, 0.7, 1.0, 4.0)
    for number, (worst, weight) in enumerate(itertools.product([*WORST.values(), *some(20, length=5.0)], [1.0, 1e6])):
        others = some(3, seed=number)
        with_it = released(module, updates([*others, worst], [1.0, 1.0, 1.0, weight]), noiseless)
        without = released(module, updates(others), noiseless)
        moved = noiseless.divisor * float(np.linalg.norm(with_it - without))
        assert moved <= 0.7 * (1 + 1e-5), f"one client moved the sum by {moved:.3g}"


def test_one_client_moves_the_sum_by_at_most_the_bound() -> None:
    check_sensitivity(fedlr.privacy.client_sum)


MUTANTS = {
    "clip skipped": ("min(1.0, max_norm / norm) if norm > 0 else 1.0", "1.0"),
    "clipped tensor by tensor": (
        "return {slot: tensor * factor for slot, tensor in change.items()}",
        "return {s: t * min(1.0, max_norm / max(float(t.norm()), 1e-30)) for s, t in change.items()}",
    ),
    "weighted": ("total[slot] += change", "total[slot] += change * update.weight"),
    "no guard": ("if not math.isfinite(norm):", "if False:"),
    "divisor by the cohort": (
        "noised / mechanism.divisor",
        "noised / max(1, len(updates))",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_sums_that_one_client_moves_further_are_found(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_sensitivity(mutant(fedlr.privacy.client_sum, change))


def check_noise(module: ModuleType, num_clients: int) -> None:
    """Fail unless the release is the mean of the clipped changes, with white noise of the configured scale on it.

    1,000 draws of 14 values. The mean of each value is within 7 standard errors, the variance of all of them together
    within 7 of theirs, each covariance of two within 7: false alarms 1e-10 over the 14 + 1 + 91 comparisons.
    """
    given, draws = updates(some(num_clients, length=1.0, seed=5)), 1_000
    found = np.stack([released(module, given, MECHANISM, seed=k) for k in range(draws)])
    noiseless = Mechanism(0.0, MECHANISM.max_grad_norm, 1.0, MECHANISM.divisor)
    mean = released(fedlr.privacy.client_sum, given, noiseless)
    sd = 1.5 * 0.7 / 4.0
    assert np.abs(found.mean(axis=0) - mean).max() < 7 * sd / draws**0.5
    whitened = (found - mean) / sd
    assert abs((whitened**2).mean() - 1) < 7 * (2 / whitened.size) ** 0.5
    covariances = whitened.T @ whitened / draws
    assert np.abs(covariances - np.diag(np.diag(covariances))).max() < 7 / draws**0.5


@pytest.mark.parametrize("num_clients", [0, 2])
def test_what_is_released_is_the_clipped_mean_with_white_noise_of_its_scale(num_clients: int) -> None:
    check_noise(fedlr.privacy.client_sum, num_clients)


STD, NOISE = (
    "mechanism.noise_std\n",
    "generator.standard_normal(tuple(change.shape)) * std",
)
MEAN = "noised / mechanism.divisor"
WRONG_NOISE = {
    "without its multiplier": (STD, "mechanism.max_grad_norm\n"),
    "scaled by the divisor": (STD, "mechanism.noise_std / mechanism.divisor\n"),
    "a tenth too small": (NOISE, f"{NOISE} * 0.9"),
    "after the division": (MEAN, "change / mechanism.divisor + (noised - change)"),
    "not on one tensor": (NOISE, f"{NOISE} * (slot.role != 'lora_A')"),
    "one number for a tensor": (
        NOISE,
        "generator.standard_normal(1).repeat(change.numel()).reshape(tuple(change.shape)) * std",
    ),
    "none for nobody": (STD, "mechanism.noise_std * bool(updates)\n"),
    "divided by those who came": (MEAN, "noised / max(1, len(updates))"),
}


@pytest.mark.parametrize("change", WRONG_NOISE.values(), ids=WRONG_NOISE)
def test_other_noise_and_other_divisors_are_found(change: tuple[str, str]) -> None:
    module = mutant(fedlr.privacy.client_sum, change)
    with pytest.raises(AssertionError):
        check_noise(module, 2)
        check_noise(module, 0)


def test_noise_after_the_svd_is_no_mechanism_of_this_sensitivity() -> None:
    """Why the noise is on the sum: one client's clipped update turns the factors of an SVD as far as it likes."""
    base = torch.diag(torch.tensor([1.0, 1.0 - 1e-6], dtype=torch.float64))
    moved = base + 1e-3 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    factors = [torch.linalg.svd(matrix)[0] for matrix in (base, moved)]
    assert float((moved - base).norm()) < 2e-3 < 0.5 < float((factors[0].abs() - factors[1].abs()).norm())


SETTINGS = [
    (0.01, 1.0, 100, 1e-3),
    (0.05, 1.0, 100, 1e-3),
    (0.1, 1.0, 100, 1e-5),
    (0.1, 0.7, 50, 1e-4),
    (0.1, 2.0, 200, 1e-6),
    (0.25, 1.5, 20, 1e-3),
    (0.25, 0.5, 5, 1e-2),
    (0.5, 3.0, 60, 1e-3),
    (0.5, 0.534, 3, 0.1393),
    (1.0, 1.0, 50, 1e-3),
    (1.0, 8.0, 100, 1e-5),
    (1.0, 0.6, 2, 1e-2),
]


@pytest.mark.parametrize(("rate", "noise", "rounds", "delta"), SETTINGS)
def test_epsilon_is_dp_accountings_own(rate: float, noise: float, rounds: int, delta: float) -> None:
    """Of 12 settings, composed by hand, to a millionth; the grid of the loss distribution is the accountant's rule."""
    found = epsilon([(PoissonSampler(rate).dp_event(noise), rounds)], delta)
    for grid in (1e-4, max(min(1e-4, 1e-3 * found), 1e-6 * found)):
        own = dp_accounting.pld.PLDAccountant(
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
        )
        gaussian = dp_accounting.GaussianDpEvent(noise)
        event = gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        own.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
        if math.isclose(found, own.get_epsilon(delta), rel_tol=1e-6):
            return
    raise AssertionError(f"{found} is none of dp-accounting's")


def test_a_fixed_cohort_that_is_taken_for_a_poisson_one_understates_epsilon() -> None:
    budget = PrivacyBudget(3.0, 1e-3)
    noise = calibrate_noise_multiplier(budget, sample_rate=0.1, num_steps=20, accountant="rdp")
    assert epsilon([(PoissonSampler(1.0).dp_event(noise), 20)], 1e-3, accountant="rdp") > 10


def test_noise_and_cohorts_of_a_server_are_streams_of_their_own() -> None:
    """No two rounds share noise, and none is a client's: 60 streams, all different."""
    seeded, drawn = SeededRandomness(3), []
    for index in range(20):
        drawn += [
            seeded.server_noise(round_index=index).standard_normal(),
            seeded.cohort(round_index=index).standard_normal(),
            seeded.noise(client=0, round_index=index, step=0).standard_normal(),
        ]
    assert len(set(drawn)) == len(drawn)
    again = [seeded.server_noise(round_index=1).standard_normal() for _ in range(2)]
    fresh = [OsRandomness().server_noise(round_index=1).bytes(8) for _ in range(2)]
    assert again[0] == again[1] and fresh[0] != fresh[1]
