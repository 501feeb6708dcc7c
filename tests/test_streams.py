"""Random streams are fresh for every client, round and step, and nothing global reaches them (R-P5).

Mutants this file kills: a stream that ignores the client, the round or the step; one generator of torch for every
client (an unseeded `torch.Generator()` has a constant seed, and the global one follows `manual_seed`); client and round
packed into a 64-bit seed of torch, of which it keeps 32 bits; noise of its own on top of noise shared by all clients.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedlr.errors import InputError
from fedlr.streams import OsRandomness, Purpose, Randomness, SeededRandomness, stream

NUM_CLIENTS, NUM_ROUNDS, NUM_STEPS = 50, 20, 5
NoiseOf = Callable[..., np.ndarray]  # (size, *, client, round_index, step) -> noise


def check_noise_is_fresh(noise: NoiseOf, *, size: int, sigmas: float) -> None:
    """Fail unless the noise of 50 clients x 20 rounds x 5 steps is pairwise distinct and uncorrelated.

    There are 12.5 million pairs. At 5 sigma about 7 of them would exceed 5 / sqrt(d) by chance if d were large; in 32
    dimensions the tail of a correlation is light enough for that bound (expected excesses 3e-4), and in more
    dimensions the bound has to be wider.
    """
    rows = []
    for client in range(NUM_CLIENTS):
        seed_everything_alike()  # each client is a process that calls set_seed(42)
        for round_index in range(NUM_ROUNDS):
            rows += [noise(size, client=client, round_index=round_index, step=step) for step in range(NUM_STEPS)]
    drawn = np.stack(rows)
    assert len(np.unique(drawn[:, 0])) == len(drawn), "some noise was drawn twice"
    drawn = drawn - drawn.mean(axis=1, keepdims=True)
    drawn = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    bound = sigmas / np.sqrt(size)
    for start in range(0, len(drawn), 500):
        correlation = np.abs(drawn[start : start + 500] @ drawn.T)
        own = np.arange(len(correlation))
        correlation[own, start + own] = 0
        assert correlation.max() < bound, f"noise correlates by {correlation.max():.3f}, more than {bound:.3f}"


def seed_everything_alike() -> None:
    torch.manual_seed(42)
    np.random.seed(42)
    random.seed(42)


def noise_of(randomness: Randomness) -> NoiseOf:
    return lambda size, **key: randomness.noise(**key).standard_normal(size)


def ignoring(name: str) -> NoiseOf:
    fresh = noise_of(SeededRandomness(0))
    return lambda size, **key: fresh(size, **{**key, name: 0})


def unseeded_torch(size: int, *, client: int, round_index: int, step: int) -> np.ndarray:
    return torch.randn(size, generator=torch.Generator()).numpy()


def global_torch(size: int, *, client: int, round_index: int, step: int) -> np.ndarray:
    return torch.randn(size).numpy()


def packed_torch_seed(size: int, *, client: int, round_index: int, step: int) -> np.ndarray:
    generator = torch.Generator().manual_seed((client << 32) | (round_index << 8) | step)
    return torch.randn(size, generator=generator).numpy()


def mostly_shared(size: int, *, client: int, round_index: int, step: int) -> np.ndarray:
    shared = stream(0, Purpose.NOISE, round_index=round_index, step=step).standard_normal(size)
    own = stream(1, Purpose.NOISE, client=client, round_index=round_index, step=step).standard_normal(size)
    return 0.99 * shared + 0.1 * own


MUTANTS: dict[str, NoiseOf] = {
    "ignores the client": ignoring("client"),
    "ignores the round": ignoring("round_index"),
    "ignores the step": ignoring("step"),
    "unseeded torch": unseeded_torch,
    "global torch": global_torch,
    "64-bit seed of torch": packed_torch_seed,
    "mostly shared": mostly_shared,
}


@pytest.mark.parametrize(("size", "sigmas"), [(32, 5.0), (512, 7.0)])
def test_seeded_noise_is_fresh_for_every_client_round_and_step(size: int, sigmas: float) -> None:
    check_noise_is_fresh(noise_of(SeededRandomness(0)), size=size, sigmas=sigmas)


def test_noise_of_the_operating_system_is_fresh_for_every_client_round_and_step() -> None:
    check_noise_is_fresh(noise_of(OsRandomness()), size=512, sigmas=9.0)  # not repeatable: 1e-11 of a false alarm


@pytest.mark.parametrize("mutant", MUTANTS)
def test_freshness_check_kills_shared_noise(mutant: str) -> None:
    with pytest.raises(AssertionError):
        check_noise_is_fresh(MUTANTS[mutant], size=32, sigmas=5.0)


def test_torch_keeps_32_bits_of_a_seed() -> None:
    """The reason for numpy: if this ever fails, the comment in streams.py is out of date."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(torch.randn(8, generator=one), torch.randn(8, generator=other))


def test_a_stream_is_a_pure_function_of_its_five_numbers() -> None:
    key = {"client": 3, "round_index": 2, "step": 1}
    seed_everything_alike()
    once = stream(7, Purpose.NOISE, **key).random(4)
    np.random.seed(0)
    assert np.array_equal(once, stream(7, Purpose.NOISE, **key).random(4))
    assert np.array_equal(once, SeededRandomness(7).noise(**key).random(4))


def test_no_two_keys_share_a_stream() -> None:
    """Each of the five numbers counts, and so does its place."""
    keys = {(s, p, c, r, t) for s in (0, 1) for p in Purpose for c in (0, 1, 2) for r in (0, 1, 2) for t in (0, 1, 2)}
    drawn = {stream(s, p, client=c, round_index=r, step=t).integers(2**63) for s, p, c, r, t in keys}
    assert len(drawn) == len(keys)


def test_purposes_keep_their_numbers() -> None:
    """They are part of the key: renumbering would change every seeded result."""
    named = (Purpose.SAMPLING, Purpose.NOISE, Purpose.COHORT, Purpose.PARTITION, Purpose.INIT, Purpose.EVALUATION)
    assert [int(purpose) for purpose in named] == [1, 2, 3, 4, 5, 6]


def test_noise_and_sampling_have_separate_streams() -> None:
    key = {"client": 0, "round_index": 0, "step": 0}
    for randomness in (SeededRandomness(1), OsRandomness()):
        assert randomness.noise(**key).bytes(8) != randomness.sampling(**key).bytes(8)


def test_streams_leave_the_global_generators_alone() -> None:
    seed_everything_alike()
    expected = (random.random(), np.random.random(), torch.rand(()).item())
    seed_everything_alike()
    for randomness in (SeededRandomness(1), OsRandomness()):
        randomness.noise(client=0, round_index=0, step=0).random(1)
    assert expected == (random.random(), np.random.random(), torch.rand(()).item())


def test_randomness_of_the_operating_system_takes_no_seed() -> None:
    with pytest.raises(TypeError):
        OsRandomness(seed=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None, "1"])
def test_a_seed_that_is_no_32_bit_word_is_refused_by_name(seed: object) -> None:
    """2**32 would be split in two words and collide with another key."""
    with pytest.raises(InputError, match="seed"):
        SeededRandomness(seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="client"):
        stream(0, Purpose.NOISE, client=seed)  # type: ignore[arg-type]
