"""Noise and batches for release are the keystream of a cipher, under a key of the operating system's generator (R-P5,
R-P20).

A generator that was keyed by a clock, a counter or 32 bits looks as fresh as any in a test of its numbers. So what the
operating system gives is replaced by known bytes, and what comes out is held against the keystream that RFC 8439 prints
for them: every bit of the key must come from there, and every number from the cipher.

Mutants this file kills (`MUTANTS`): Philox keyed by a clock, by 32 bits, by all that the operating system gave; the
cipher keyed by a clock, by 32 bits, by 32 bits repeated, by a counter, by half a key; one generator for all; numpy's
default; normal numbers of 32 bits, of one tail, of another scale, whose sign hangs on their size.
"""

import secrets
import time
from collections.abc import Callable
from functools import cache
from itertools import count

import numpy as np
import pytest
from mpmath import erfinv, mp, mpf, sqrt
from scipy.stats import kstest

from fedlr import streams
from fedlr.errors import InputError
from fedlr.streams import KEY_BYTES, MOST_BYTES, Draws, Keystream, OsRandomness, signed_normals

KEY = {"client": 0, "round_index": 0, "step": 0}
ROUND = {"round_index": 0}
# RFC 8439, appendix A.1: test vectors 1, 3 and 4. Key, first block asked for, and how the keystream begins there.
VECTORS = (
    (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
    (bytes(31) + b"\1", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
    (b"\0\xff" + bytes(30), 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
)


def every_draw() -> dict[str, Callable[[], Draws]]:
    """Return all that private code is given under the operating system's randomness."""
    found = OsRandomness()
    return {
        "sampling": lambda: found.sampling(**KEY),
        "noise": lambda: found.noise(**KEY),
        "cohort": lambda: found.cohort(**ROUND),
        "server_noise": lambda: found.server_noise(**ROUND),
    }


def check_it_is_the_cipher_under_the_operating_systems_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that mutants fail."""
    for draw in every_draw().values():
        for key, block, expected in VECTORS:
            asked: list[int] = []

            def known(length: int, *, key: bytes = key, asked: list[int] = asked) -> bytes:
                asked.append(length)
                return key[:length]

            with monkeypatch.context() as patch:
                patch.setattr(secrets, "token_bytes", known)
                generator = draw()
                found = generator.bytes(64 * block + 32)[64 * block :].hex()
            assert asked == [KEY_BYTES] == [32], "a whole key is asked for, and no more"
            assert found == expected, "numbers are not the keystream of that key"


def test_it_is_the_cipher_under_the_operating_systems_key(monkeypatch: pytest.MonkeyPatch) -> None:
    check_it_is_the_cipher_under_the_operating_systems_key(monkeypatch)


def test_no_two_generators_begin_alike() -> None:
    """By chance with probability below 2^-230."""
    drawn = [draw().bytes(32) for draw in every_draw().values() for _ in range(500)]
    assert len(set(drawn)) == 2_000


def philox(**state: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(**state))


def padded(number: int) -> bytes:
    return number.to_bytes(32, "little")


COUNTER = count()
SHARED = Keystream(secrets.token_bytes(32))
MUTANTS: dict[str, Callable[[], Draws]] = {
    "Philox of a clock": lambda: philox(key=time.perf_counter_ns()),
    "Philox of 32 bits": lambda: philox(key=secrets.randbits(32)),
    "Philox of a whole state": lambda: philox(key=secrets.randbits(128), counter=secrets.randbits(256)),
    "Philox of a whole key": lambda: philox(key=int.from_bytes(secrets.token_bytes(32)[:16])),
    "a clock": lambda: Keystream(padded(time.perf_counter_ns())),
    "32 bits": lambda: Keystream(secrets.token_bytes(4) + bytes(28)),
    "32 bits of a key": lambda: Keystream(secrets.token_bytes(32)[:4] + bytes(28)),
    "32 bits, repeated": lambda: Keystream(secrets.token_bytes(4) * 8),
    "half a key": lambda: Keystream(secrets.token_bytes(32)[:16] * 2),
    "a counter": lambda: Keystream(padded(next(COUNTER))),
    "one generator for all": lambda: SHARED,
    "a default generator": np.random.default_rng,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_source_or_another_generator_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(streams, "_from_operating_system", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_it_is_the_cipher_under_the_operating_systems_key(monkeypatch)


@cache
def inverse(word: int) -> float:
    """Return the normal number of 64 bits, in 60 digits."""
    with mp.workdps(60):
        tail = (mpf(word >> 1) + mpf(1) / 2) / 2**64
        return float((-1) ** (word & 1) * sqrt(2) * erfinv(2 * tail - 1))


def check_normals(make: Callable[[np.ndarray], np.ndarray]) -> None:
    """Fail unless numbers of the far tails, of the middle and of the stream's own are the inverse, to 2e-14 of it."""
    ends = [0, 1, 2, 3, 2**32, 2**33 + 1, 2**62, 2**63 + 1, 2**64 - 2048, 2**64 - 2047]
    words = np.array([*ends, *Keystream(bytes(32)).words(60).tolist()], dtype=np.uint64)
    expected = [inverse(int(word)) for word in words]
    np.testing.assert_allclose(make(words), expected, rtol=2e-14, atol=1e-16)


def normals(words: np.ndarray) -> np.ndarray:
    out = np.empty(len(words))
    signed_normals(words, out=out)
    return out


def test_a_normal_number_is_the_inverse_of_the_distribution_function_at_its_bits() -> None:
    check_normals(normals)
    key = secrets.token_bytes(32)
    words = Keystream(key).words(20_000)
    assert np.array_equal(Keystream(key).standard_normal((4, 5_000)).ravel(), normals(words))


WRONG_NORMALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "32 bits": lambda words: normals(words & np.uint64(0xFFFFFFFF00000001)),
    "one tail": lambda words: np.abs(normals(words)),
    "three parts in a million more": lambda words: normals(words) * 1.000003,
    "the sign is a bit of the size": lambda words: normals(
        (words >> np.uint64(1) << np.uint64(1)) | words >> np.uint64(63)
    ),
}


@pytest.mark.parametrize("wrong", WRONG_NORMALS)
def test_other_numbers_than_the_inverse_are_seen(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_normals(WRONG_NORMALS[wrong])


def test_numbers_have_the_distributions_that_they_are_named_for() -> None:
    """One key for ever, so that no draw decides; p is 0.05 or more for 19 keys of 20."""
    generator = Keystream(bytes(32))
    assert kstest(generator.standard_normal(100_000), "norm").pvalue > 1e-3
    assert kstest(generator.random(100_000), "uniform").pvalue > 1e-3
    assert sorted(generator.permutation(50).tolist()) == list(range(50))


def test_a_key_ends_before_its_counter_begins_again() -> None:
    generator = Keystream(bytes(32))
    generator._left = 8
    generator.bytes(8)
    with pytest.raises(InputError, match=str(MOST_BYTES)):
        generator.bytes(1)
