"""Noise on a grid is exact, covers what rounding adds to the sensitivity, and leaves no bits beside the grid (R-P14).

Mutants killed: a sum that is not rounded; noise that is not, or is one number for all; noise without what rounding
adds; a spacing four times as wide, or of one value; float64 taken for exact; an open number decided by its first bits,
or by the bits of another tail; boundaries that lie elsewhere; a thousandth more (`MUTANTS`, `WRONG`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mpmath import mp, mpf, ncdf
from scipy.stats import chi2, norm

import fedlr.privacy.grid
from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.grid import ROUNDING, SENSITIVITY, Grid
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import FLOATING_POINT, ON_A_GRID, privacy_statement
from fedlr.streams import Keystream, Purpose, stream
from fedlr.training.local import privatise
from tests.training.small_models import mutant

A, B = Slot("layer", "lora_A"), Slot("layer", "lora_B")
NUM_VALUES = 14
ON_GRID = Mechanism(noise_multiplier=1.5, max_grad_norm=0.7, sample_rate=1.0, divisor=4.0, release_noise="grid")


class Given:
    """Words that a test chooses, and then more."""

    def __init__(self, words: list[int]) -> None:
        self._bytes = b"".join(word.to_bytes(8, "little") for word in words)

    def bytes(self, length: int) -> bytes:
        found, self._bytes = self._bytes[:length], self._bytes[length:]
        assert len(found) == length, "more bits are drawn than are needed"
        return found


def boundary(integer: int, spacings: float) -> int:
    """Return the tail beyond integer + 1/2, times 2^192, rounded down."""
    with mp.workdps(90):
        return int(ncdf(-(mpf(integer) + mpf(1) / 2) / mpf(spacings)) * mpf(2) ** 192)


def check_open_numbers(module: ModuleType) -> None:
    """Fail unless numbers whose first bits are those of a boundary go to the side that their later bits say."""
    for integer, spacings in itertools.product((0, 1, 5), (0.6, 3.0, 4100.0)):
        tail = boundary(integer, spacings)
        first, second, third = tail >> 128, tail >> 64 & (2**64 - 1), tail & (2**64 - 1)
        if first >= 2**63 or first < 2**20:
            continue
        for sign in (0, 1):
            word = first << 1 & (2**64 - 1) | sign
            wanted = {
                integer: ([word, second, min(third + 2**40, 2**64 - 1)], [word, min(second + 2**40, 2**64 - 1)]),
                integer + 1: ([word, second, max(third - 2**40, 0)], [word, max(second - 2**40, 0)]),
            }
            for expected, streams in wanted.items():
                for words in streams:
                    found = module.rounded_normals(1, spacings=spacings, draws=Given(words))
                    assert found.tolist() == [(1 if sign else -1) * expected]


def check_distribution(module: ModuleType) -> None:
    """Fail unless 40,000 integers of one key, ever the same, pass a chi-squared test."""
    for spacings in (0.4, 2.5):
        drawn = module.rounded_normals(40_000, spacings=spacings, draws=Keystream(bytes(32)))
        edge = int(3 * spacings) + 1
        cuts = np.arange(-edge, edge + 2) - 0.5
        chances = np.diff(norm.cdf([-math.inf, *(cuts / spacings)[1:-1], math.inf]))
        counts = np.bincount(np.clip(drawn, -edge, edge) + edge, minlength=len(chances))
        expected = chances * len(drawn)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert chi2.sf(statistic, len(chances) - 1) > 1e-3


def check_exact(module: ModuleType) -> None:
    """Fail unless every integer is that of its tail, in 50 digits, at the widths of real runs and the least."""
    for spacings in (1e-3, 0.5, 4100.0, 2.0**33):
        words = [2, 3, 2**12, 2**33 + 1, 2**64 - 1, 2**64 - 2, *Keystream(bytes(32)).words(40).tolist()]
        drawn = module.rounded_normals(len(words), spacings=spacings, draws=More(words))
        for word, integer in zip(words, drawn.tolist(), strict=True):
            with mp.workdps(60):
                tail, size = mpf(word >> 1) / 2**64, abs(integer)
                within = ncdf(-(mpf(size) + mpf(1) / 2) / mpf(spacings))
                beyond = ncdf(-(mpf(size) - mpf(1) / 2) / mpf(spacings)) if size else mpf(1)
                assert within <= tail + mpf(1) / 2**64 and tail <= beyond, f"{integer} of {word} at {spacings}"


class More(Given):
    """Words that a test chooses, and then those of a key."""

    def bytes(self, length: int) -> bytes:
        return super().bytes(length) if self._bytes else Keystream(bytes(32)).bytes(length)


def check_draws(module: ModuleType) -> None:
    check_open_numbers(module)
    check_exact(module)
    check_distribution(module)


def test_integers_are_rounded_normal_numbers_to_the_last_bit() -> None:
    check_draws(fedlr.privacy.grid)


WRONG = {
    "float64 taken for exact": ("np.flatnonzero(is_open)", "np.flatnonzero(is_open)[:0]"),
    "the bits of another tail": (
        'bits << 64 | int.from_bytes(draws.bytes(8), "little")',
        'int.from_bytes(draws.bytes(8), "little") << length | bits',
    ),
    "one sign": ("np.where(words & np.uint64(1), nearest, -nearest)", "nearest"),
    "decided by the first bits": ('bits << 64 | int.from_bytes(draws.bytes(8), "little")', "bits << 64"),
    "no errors allowed for": ("errors > 0.5", "0 * errors > 0.5"),
    "boundaries half a unit up": ("mpf(integer) + mpf(1) / 2", "mpf(integer) + 1"),
    "a thousandth more": ("sizes = normals * spacings", "sizes = normals * spacings * 1.001"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_integers_of_another_distribution_are_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_draws(mutant(fedlr.privacy.grid, change))


def neighbours() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield sums that differ by the clip bound 1, where rounding hurts most: every coordinate just crosses a middle."""
    for size, seed in itertools.product((1, 4, 1000), range(3)):
        generator = np.random.default_rng(seed)
        step = np.full(size, 1 / math.sqrt(size)) * generator.choice([-1, 1], size)
        spacing = Grid.of(max_norm=1.0, noise_multiplier=1.0, num_values=size).spacing
        middle = (generator.integers(-50, 50, size) + 0.5) * spacing
        rest = np.remainder(np.abs(step), spacing)
        outward = np.sign(step) * np.where(rest > 0, spacing - rest, 0) * 0.999
        yield middle - step / 2, middle + step / 2
        yield middle, middle + np.sign(step) * np.abs(step)
        yield middle + np.sign(step) * spacing * 1e-9 - step + outward * 0, middle + np.sign(step) * spacing * 1e-9


def check_sensitivity(module: ModuleType) -> None:
    """Fail unless the noise covers what one part moves the rounded sum by, and all of it is on the grid."""
    for one, other in neighbours():
        grid = module.Grid.of(max_norm=1.0, noise_multiplier=1.5, num_values=one.size)
        moved = float(np.linalg.norm(np.rint(one / grid.spacing) - np.rint(other / grid.spacing))) * grid.spacing
        assert moved <= 1 + ROUNDING * (1 + 1e-12)
        assert math.sqrt(one.size) * grid.spacing <= ROUNDING, "the proof's bound"
        assert grid.spacings * grid.spacing >= 1.5 * (1 + 2 * ROUNDING), "noise that the sensitivity needs"
        drawn = grid.release(one, Keystream(bytes(32)))
        units = drawn / grid.spacing
        assert np.array_equal(units, np.rint(units)), "a value beside the grid"
        integers = module.rounded_normals(one.size, spacings=grid.spacings, draws=Keystream(bytes(32)))
        assert np.array_equal(units, np.rint(one / grid.spacing) + integers), "not the rounded sum and the integers"


def test_the_noise_covers_what_rounding_adds_and_all_that_leaves_is_on_the_grid() -> None:
    check_sensitivity(fedlr.privacy.grid)


MUTANTS = {
    "a sum that is not rounded": ("units = np.rint(total / self.spacing)", "units = total / self.spacing"),
    "noise of one value": ("draws=draws).reshape(units.shape)", "draws=draws)[0]"),
    "without what rounding adds": ("noise_multiplier * SENSITIVITY * max_norm", "noise_multiplier * max_norm"),
    "a spacing four times as wide": ("math.ldexp(1.0, exponent - 1)", "math.ldexp(1.0, exponent + 1)"),
    "a spacing of one value": ("max_norm / math.sqrt(num_values)", "max_norm"),
    "noise that is not rounded": (
        "rounded_normals(units.size, spacings=self.spacings, draws=draws).reshape(units.shape)",
        "draws.standard_normal(units.shape) * self.spacings",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_a_grid_that_breaks_the_proof_is_seen(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_sensitivity(mutant(fedlr.privacy.grid, change))


def test_a_step_leaves_on_the_grid_with_noise_of_its_scale() -> None:
    """Of 40 steps of one key: the variance of 560 numbers is within 6 of its standard errors."""
    total = {A: torch.full((2, 3), 0.3), B: torch.full((4, 2), -1.0)}
    spacing = Grid.of(max_norm=0.7, noise_multiplier=1.5, num_values=NUM_VALUES).spacing
    drawn = []
    for step in range(40):
        found = privatise(total, mechanism=ON_GRID, generator=stream(0, Purpose.NOISE, step=step))
        values = np.concatenate([found[slot].double().numpy().ravel() for slot in (A, B)])
        assert np.array_equal(values / spacing, np.rint(values / spacing))
        drawn.append(values - np.array([0.3] * 6 + [-1.0] * 8))
    noise = np.stack(drawn) / ON_GRID.noise_std
    assert abs((noise**2).mean() - 1) < 6 * math.sqrt(2 / noise.size)
    assert ON_GRID.noise_std == 1.5 * 0.7 * SENSITIVITY


def test_no_noise_has_no_grid_and_far_too_much_is_refused() -> None:
    assert Mechanism(0.0, 1.0, 1.0, 1.0, release_noise="grid").grid(5) is None
    assert Mechanism(1.0, 1.0, 1.0, 1.0).grid(5) is None
    with pytest.raises(InputError, match="release_noise=float"):
        Mechanism(1e6, 1.0, 1.0, 1.0, release_noise="grid").grid(10**6)
    with pytest.raises(InputError, match="float or grid"):
        Mechanism(1.0, 1.0, 1.0, 1.0, release_noise="lattice")  # type: ignore[arg-type]


def test_the_ledger_tells_the_grid_from_floating_point_and_counts_both_alike(tmp_path: Path) -> None:
    plain = Mechanism(1.5, 0.7, 0.5, 4.0)
    told = {}
    for name, mechanism in (("float", plain), ("grid", Mechanism(1.5, 0.7, 0.5, 4.0, release_noise="grid"))):
        path = tmp_path / name
        ledger = PrivacyLedger.create(
            path, PrivacyBudget(6.0, 1e-5), dataset_id="d", randomness="seeded", accountant="rdp"
        )
        ledger.reserve(0, mechanism, 2, [0])
        told[name] = privacy_statement(path, [0])
        assert ('"release_noise"' in path.read_text()) is (name == "grid")
    expected = epsilon([(PoissonSampler(0.5).dp_event(1.5), 2)], 1e-5, accountant="rdp")
    assert told["grid"]["epsilon"] == told["float"]["epsilon"] and told["grid"]["epsilon"]["maximum"] == expected
    assert told["float"]["floating_point"] == FLOATING_POINT and told["grid"]["floating_point"] == ON_A_GRID
    assert (
        told["grid"]["mechanisms"][0]["release_noise"] == "grid"
        and "release_noise" not in told["float"]["mechanisms"][0]
    )


Sum = Callable[[np.ndarray], np.ndarray]


def test_the_attack_on_floating_point_sees_nothing_on_the_grid() -> None:
    """Mironov (2012): which numbers are possible hangs on the sum in floating point, and not on the grid."""
    grid = Grid.of(max_norm=1.0, noise_multiplier=1.0, num_values=1)

    def remainders(release: Sum) -> list[set[float]]:
        return [set(np.remainder(release(np.full(2_000, s)), grid.spacing).tolist()) for s in (0.0, 1.0)]

    generator = np.random.default_rng(0)
    in_float = remainders(lambda s: (s + generator.standard_normal(len(s)).astype(np.float32)).astype(np.float32))
    on_grid = remainders(lambda s: grid.release(s, Keystream(bytes(32))))
    assert in_float[0] != in_float[1] and on_grid == [{0.0}, {0.0}]
