"""Named random streams: who draws, for what, in which round and step.

A stream is a pure function of (seed, purpose, client, round, step), so resuming a run needs no generator
state, no two clients can share noise, and torch's and numpy's global seeds have no say in anything private.

Everything here is numpy. A torch CPU generator keeps only 32 bits of the seed it is given (measured on torch
2.13: `manual_seed(1)` and `manual_seed(1 + 2**32)` draw the same numbers), so a seed that packs a client and
a round into 64 bits would silently hand the same noise to many clients. SeedSequence hashes all of its words
into a 128-bit pool.

Noise and batches for release come from no such stream but from `Keystream`, ChaCha20 under a key of the operating
system: what was seen of its numbers tells nothing of the others.
"""

import secrets
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri

from fedlr.errors import InputError

KEY_BYTES = 32  # of ChaCha20: all of its key is secret
MOST_BYTES = 2**38 - 64  # of one key: its counter of blocks has 32 bits
CHUNK = 2**13  # numbers that are made at once: they stay in the processor's cache


class Purpose(IntEnum):
    """What a stream is for. The integers are part of the key: append new ones, never renumber."""

    SAMPLING = 1  # which examples a private step reads
    NOISE = 2  # what hides them
    COHORT = 3  # which clients a round asks
    PARTITION = 4  # which client holds which public example
    INIT = 5  # the adapter before the first round
    EVALUATION = 6
    DATA = 7  # synthetic data
    BASELINE = 8  # the seed of a run that another is compared with
    REINIT = 9  # lora_A where a method draws it anew between rounds
    SKETCH = 10  # random directions a server multiplies released products with
    AUDIT = 11  # an auditor's rows and coins
    SERVER_NOISE = 12  # what hides one client's update in the sum of a round
    TRIALS = 13  # how many trials a private selection has, and which
    CODEC = 17  # how an update is rounded or projected on its way to the server
    ATTACK = 18  # who is hostile in a simulated attack, and what noise they send


class Draws(Protocol):
    """What private code draws from: `Keystream`, or a `numpy.random.Generator`."""

    def random(self, size: int, /) -> NDArray[np.float64]:
        """Return independent numbers, uniform in [0, 1)."""
        ...

    def standard_normal(self, size: int | tuple[int, ...], /) -> NDArray[np.float64]:
        """Return independent standard normal numbers."""
        ...

    def permutation(self, x: int | NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return 0, 1, ..., x - 1, or the entries of x, in a uniformly random order."""
        ...

    def bytes(self, length: int, /) -> bytes:
        """Return uniformly random bytes."""
        ...


class Randomness(Protocol):
    """Where one client's private steps take their two kinds of randomness from."""

    def sampling(self, *, client: int, round_index: int, step: int) -> Draws:
        """Return the generator that chooses the examples of this step."""
        ...

    def noise(self, *, client: int, round_index: int, step: int) -> Draws:
        """Return the generator that draws the noise of this step."""
        ...


class ServerRandomness(Protocol):
    """Where a server that hides whole clients takes its two kinds of randomness from."""

    def cohort(self, *, round_index: int) -> Draws:
        """Return the generator that decides who takes part in this round."""
        ...

    def server_noise(self, *, round_index: int) -> Draws:
        """Return the generator that draws the noise of this round's sum."""
        ...


@dataclass(frozen=True)
class SeededRandomness:
    """Reproducible: a simulation of privacy, because whoever knows the seed can subtract the noise."""

    kind: ClassVar[str] = "seeded"
    seed: int

    def __post_init__(self) -> None:
        _require_word(seed=self.seed)

    def sampling(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return the same generator whenever the three indices and the seed are the same."""
        return stream(self.seed, Purpose.SAMPLING, client=client, round_index=round_index, step=step)

    def noise(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return the same generator whenever the three indices and the seed are the same."""
        return stream(self.seed, Purpose.NOISE, client=client, round_index=round_index, step=step)

    def cohort(self, *, round_index: int) -> np.random.Generator:
        """Return the same generator whenever round and seed are the same."""
        return stream(self.seed, Purpose.COHORT, round_index=round_index)

    def server_noise(self, *, round_index: int) -> np.random.Generator:
        """Return the same generator whenever round and seed are the same."""
        return stream(self.seed, Purpose.SERVER_NOISE, round_index=round_index)


@dataclass(frozen=True)
class OsRandomness:
    """Randomness of the operating system, fresh at every call; it takes no seed and cannot be repeated.

    Guarantees: every call draws a new 256-bit key from the operating system's generator, and numbers are the ChaCha20
        keystream under it (RFC 8439). No key is stored, shared or used twice.
    """

    kind: ClassVar[str] = "os"

    def sampling(self, *, client: int, round_index: int, step: int) -> "Keystream":
        """Return a new generator; the indices have no influence on it."""
        return _from_operating_system()

    def noise(self, *, client: int, round_index: int, step: int) -> "Keystream":
        """Return a new generator; the indices have no influence on it."""
        return _from_operating_system()

    def cohort(self, *, round_index: int) -> "Keystream":
        """Return a new generator; the round has no influence on it."""
        return _from_operating_system()

    def server_noise(self, *, round_index: int) -> "Keystream":
        """Return a new generator; the round has no influence on it."""
        return _from_operating_system()


def stream(seed: int, purpose: Purpose, *, client: int = 0, round_index: int = 0, step: int = 0) -> np.random.Generator:
    """Return the generator of one purpose, client, round and step: Philox keyed by their hash.

    Args:
        seed: seed of the run.
        purpose: what the numbers are for.
        client, round_index, step: where they are used; 0 where there is no such thing.

    Raises:
        InputError: a number is not an integer in [0, 2**32).

    >>> one = stream(7, Purpose.NOISE, client=1).standard_normal(3)
    >>> bool((one == stream(7, Purpose.NOISE, client=1).standard_normal(3)).all())
    True
    >>> bool((one == stream(7, Purpose.NOISE, client=2).standard_normal(3)).any())
    False
    """
    # Each number must fit one 32-bit word: SeedSequence would split a larger one in two and [2**32] would
    # equal [0, 1].
    _require_word(seed=seed, client=client, round_index=round_index, step=step)
    words = [int(seed), int(purpose), int(client), int(round_index), int(step)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


class Keystream:
    """Numbers of the ChaCha20 keystream (RFC 8439, nonce 0, blocks from 0) of one key.

    Every number has 64 bits of its own. A normal number is the inverse of the distribution function at 63 of them,
    signed by the last, in float64: no rejection, so how much is drawn does not depend on what is drawn.

    >>> Keystream(bytes(32)).bytes(4).hex()
    '76b8e0ad'
    """

    def __init__(self, key: bytes) -> None:
        """Start at the first block of a key, which must be used for nothing else."""
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._left = MOST_BYTES

    def bytes(self, length: int, /) -> bytes:
        """Return the next bytes.

        Raises:
            InputError: more is asked of one key than it has.
        """
        self._left -= length
        if self._left < 0:
            raise InputError(f"Expected at most {MOST_BYTES} random bytes of one step, got more asked for")
        return self._encryptor.update(bytes(length))

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next integers, uniform in [0, 2**64)."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8")

    def random(self, size: int, /) -> NDArray[np.float64]:
        """Return the next numbers, uniform in [0, 1): multiples of 2**-53, as numpy's are."""
        return np.asarray((self.words(size) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def standard_normal(self, size: int | tuple[int, ...], /) -> NDArray[np.float64]:
        """Return the next standard normal numbers; none is beyond 9.2."""
        found = np.empty(size)
        flat = found.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            signed_normals(self.words(part.size), out=part)
        return found

    def permutation(self, x: int | NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return 0, 1, ..., x - 1, or the entries of x, in a random order; of equal words the first stays first."""
        entries = np.arange(x) if isinstance(x, int) else x
        return entries[np.argsort(self.words(len(entries)), kind="stable")]


def signed_normals(words: NDArray[np.uint64], *, out: NDArray[np.float64]) -> None:
    """Write the normal numbers of 64-bit integers: the upper 63 bits are a tail's probability, the last is the sign."""
    np.multiply(words >> np.uint64(1), 2.0**-64, out=out)
    out += 2.0**-65  # the middle of what 63 bits leave open; at most 1/2, so never beyond the mean
    ndtri(out, out=out)
    bits = out.view(np.uint64)
    bits ^= words << np.uint64(63)


def _from_operating_system() -> Keystream:
    return Keystream(secrets.token_bytes(KEY_BYTES))


def _require_word(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
            raise InputError(f"Expected {name} to be an integer in [0, 2**32), got {value!r}")
