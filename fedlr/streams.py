"""Named random streams: who draws, for what, in which round and step.

A stream is a pure function of (seed, purpose, client, round, step), so resuming a run needs no generator
state, no two clients can share noise, and torch's and numpy's global seeds have no say in anything private.

Everything here is numpy. A torch CPU generator keeps only 32 bits of the seed it is given (measured on torch
2.13: `manual_seed(1)` and `manual_seed(1 + 2**32)` draw the same numbers), so a seed that packs a client and
a round into 64 bits would silently hand the same noise to many clients. SeedSequence hashes all of its words
into a 128-bit pool.
"""

import secrets
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

import numpy as np

from fedlr.errors import InputError


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
    ATTACK = 18  # who is hostile in a simulated attack, and what noise they send


class Randomness(Protocol):
    """Where one client's private steps take their two kinds of randomness from."""

    def sampling(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return the generator that chooses the examples of this step."""
        ...

    def noise(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return the generator that draws the noise of this step."""
        ...


class ServerRandomness(Protocol):
    """Where a server that hides whole clients takes its two kinds of randomness from."""

    def cohort(self, *, round_index: int) -> np.random.Generator:
        """Return the generator that decides who takes part in this round."""
        ...

    def server_noise(self, *, round_index: int) -> np.random.Generator:
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

    Philox is not a cryptographic generator: its state comes from the operating system's, its stream does not.
    """

    kind: ClassVar[str] = "os"

    def sampling(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return a new generator; the indices have no influence on it."""
        return _from_operating_system()

    def noise(self, *, client: int, round_index: int, step: int) -> np.random.Generator:
        """Return a new generator; the indices have no influence on it."""
        return _from_operating_system()

    def cohort(self, *, round_index: int) -> np.random.Generator:
        """Return a new generator; the round has no influence on it."""
        return _from_operating_system()

    def server_noise(self, *, round_index: int) -> np.random.Generator:
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


def _from_operating_system() -> np.random.Generator:
    # All of Philox's state, so nothing passes through SeedSequence's 128-bit pool.
    return np.random.Generator(np.random.Philox(key=secrets.randbits(128), counter=secrets.randbits(256)))


def _require_word(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
            raise InputError(f"Expected {name} to be an integer in [0, 2**32), got {value!r}")
