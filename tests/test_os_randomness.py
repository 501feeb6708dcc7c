"""Noise for release has all of its state from the operating system's generator (R-P20).

Two generators that were seeded from a clock, a counter or 32 bits look as fresh as any in a test of their numbers, so
the state itself is held against what the operating system gave: every bit of it must come from there, each in its
place, and nothing else may.

Mutants this file kills (`MUTANTS`): Philox keyed by a clock, by 32 bits, by a counter; a counter that begins at 0; one
state for sampling and noise.
"""

import secrets
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from fedlr import streams
from fedlr.streams import OsRandomness

KEY = {"client": 0, "round_index": 0, "step": 0}


def state_of(generator: np.random.Generator) -> int:
    """Key and counter as one number."""
    state = generator.bit_generator.state["state"]
    words = [*state["key"].tolist(), *state["counter"].tolist()]
    return sum(word << 64 * place for place, word in enumerate(words))


def all_state_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that mutants fail: a known source gives a known state, another source another one, bit by bit."""
    for draw in (OsRandomness().noise, OsRandomness().sampling):
        for fill in (0, (1 << 256) - 1, 0x5555 << 100):
            asked: list[int] = []

            def known(bits: int, *, fill: int = fill, asked: list[int] = asked) -> int:
                asked.append(bits)
                return fill & ((1 << bits) - 1)

            with monkeypatch.context() as patch:
                patch.setattr(secrets, "randbits", known)
                state = state_of(draw(**KEY))
            assert sorted(asked) == [128, 256], "all of the state, and no more, is asked for"
            expected = (fill & ((1 << 128) - 1)) | (fill & ((1 << 256) - 1)) << 128
            assert state == expected, "a bit of the state is not what the operating system gave"


def test_all_state_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    all_state_is_the_operating_systems(monkeypatch)


def test_no_two_generators_begin_alike() -> None:
    """By chance with probability below 2^-360."""
    drawn = [state_of(draw(**KEY)) for draw in (OsRandomness().noise, OsRandomness().sampling) for _ in range(1_000)]
    assert len(set(drawn)) == 2_000


def generator(**state: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(**state))


COUNTER = count()
SHARED = generator(key=secrets.randbits(128), counter=secrets.randbits(256))
MUTANTS: dict[str, Callable[[], np.random.Generator]] = {
    "a clock": lambda: generator(key=time.perf_counter_ns()),
    "32 bits": lambda: generator(key=secrets.randbits(32)),
    "32 bits and a whole counter": lambda: generator(key=secrets.randbits(32), counter=secrets.randbits(256)),
    "a counter": lambda: generator(key=next(COUNTER), counter=secrets.randbits(256)),
    "a counter that begins at 0": lambda: generator(key=secrets.randbits(128)),
    "one generator for all": lambda: SHARED,
    "a default generator": np.random.default_rng,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_state_of_another_source_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(streams, "_from_operating_system", MUTANTS[mutant])
    with pytest.raises((AssertionError, KeyError)):
        all_state_is_the_operating_systems(monkeypatch)
