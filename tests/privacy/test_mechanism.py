"""The noise has exactly its scale, and constants of a mechanism are refused where they make no sense (R-P7, R-P3).

Mutants this file kills, through `check_gaussian`: noise of 2/3, 3/2, 0.995 and 0.9 of its scale, uniform noise of the
right scale, noise that is skipped on one coordinate of twenty.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from fedlr.errors import InputError
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget, check_delta, gaussian_noise
from fedlr.streams import Purpose, stream

NUM_DRAWS = 1_000_000
Draw = Callable[..., torch.Tensor]  # (shape, *, std, generator)


def check_gaussian(draw: Draw, *, std: float) -> None:
    """Fail unless a million draws have this standard deviation within 0.3 % (4 sigma) and pass a KS test."""
    noise = draw((NUM_DRAWS,), std=std, generator=stream(7, Purpose.NOISE))
    assert noise.dtype == torch.float32 and noise.shape == (NUM_DRAWS,)
    drawn = noise.numpy().astype(np.float64)
    assert abs(drawn.std() / std - 1) < 0.003
    assert abs(drawn.mean()) < 5 * std / np.sqrt(NUM_DRAWS)
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-6


def scaled(factor: float) -> Draw:
    return lambda shape, *, std, generator: gaussian_noise(shape, std=factor * std, generator=generator)


def uniform(shape: tuple[int, ...], *, std: float, generator: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(generator.uniform(-(3**0.5) * std, 3**0.5 * std, shape).astype(np.float32))


def skipped_sometimes(shape: tuple[int, ...], *, std: float, generator: np.random.Generator) -> torch.Tensor:
    noise = gaussian_noise(shape, std=std * (20 / 19) ** 0.5, generator=generator)
    noise[::20] = 0
    return noise


@pytest.mark.parametrize("std", [1.0, 0.37, 250.0])
def test_noise_is_gaussian_at_its_scale(std: float) -> None:
    check_gaussian(gaussian_noise, std=std)


MUTANTS = {
    "2/3": scaled(2 / 3),
    "3/2": scaled(3 / 2),
    "0.995": scaled(0.995),
    "0.9": scaled(0.9),
    "uniform": uniform,
    "skipped": skipped_sometimes,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_noise_check_kills_every_other_noise(name: str) -> None:
    with pytest.raises(AssertionError):
        check_gaussian(MUTANTS[name], std=1.0)


def test_noise_has_the_shape_asked_for_and_ignores_torch_seeds() -> None:
    torch.manual_seed(42)
    one = gaussian_noise((2, 3), std=1.0, generator=stream(7, Purpose.NOISE, client=1))
    torch.manual_seed(42)
    other = gaussian_noise((2, 3), std=1.0, generator=stream(7, Purpose.NOISE, client=2))
    assert one.shape == (2, 3) and not torch.isclose(one, other).any()


def test_no_noise_is_zero() -> None:
    assert not gaussian_noise((4,), std=0.0, generator=np.random.default_rng(0)).any()


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(InputError, match="noise"):
        gaussian_noise((1,), std=std, generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("epsilon", "delta", "text"),
    [
        (-1, 1e-5, "Expected privacy.epsilon > 0, got -1"),
        (0, 1e-5, "Expected privacy.epsilon > 0, got 0"),
        (float("nan"), 1e-5, "got nan"),
        (float("inf"), 1e-5, "got inf"),
        ("6", 1e-5, "got 6"),
        (True, 1e-5, "got True"),
        (6, 0, r"Expected privacy.delta in \(0, 1\), got 0"),
        (6, 1, "got 1"),
        (6, float("nan"), "got nan"),
        (6, None, "got None"),
    ],
)
def test_a_budget_that_is_none_is_refused_by_value(epsilon: object, delta: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        PrivacyBudget(epsilon, delta)  # type: ignore[arg-type]


CONSTANTS = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.1, "divisor": 10.0}


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": -0.1},
        {"noise_multiplier": 1e-160},  # where the accountant overflows and would answer epsilon 0
        {"noise_multiplier": 9e-4},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1e-45},  # 68 % of the noise would be 0 in float32
        {"max_grad_norm": 9e-7},
        {"max_grad_norm": 1.1e6},
        {"max_grad_norm": float("inf")},
        {"noise_multiplier": 1e7},
        {"divisor": 1e-300},
        {"divisor": 1e300},
        {"sample_rate": 0.0},
        {"sample_rate": 1.01},
        {"divisor": 0.0},
        {"divisor": float("nan")},
        {"divisor": "8"},
    ],
)
def test_a_constant_outside_its_range_is_refused_by_name_and_value(change: dict[str, object]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"{name}.*got {re.escape(str(value))}"):
        Mechanism(**{**CONSTANTS, **change})  # type: ignore[arg-type]


def test_delta_must_be_below_one_over_the_largest_client() -> None:
    check_delta(1e-5, 99_999)
    with pytest.raises(InputError, match=r"1/100000 = 1e-05.*got 1e-05"):
        check_delta(1e-5, 100_000)
    with pytest.raises(InputError, match=r"1/1371"):
        check_delta(1e-2, 1371)
