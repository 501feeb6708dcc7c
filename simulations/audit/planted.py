"""Faults that an audit must find: a federation that says one thing to its ledger and does another.

They are made of the parts that any run is made of, and are planted in the federation under audit, so that an audit that
could not fail is seen to be one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import Sampler
from fedlr.simulations.federation import Federation
from fedlr.streams import Draws, Randomness

FIXED = 0.75  # of the expected size of a batch


@dataclass(frozen=True)
class SameNoise:
    """Draws the noise of round 0 and step 0 in every round and step, or that of client 0 for every client."""

    randomness: Randomness
    of_clients: bool  # whether it is the clients that share it

    def sampling(self, *, client: int, round_index: int, step: int) -> Draws:
        """Return the generator of the run."""
        return self.randomness.sampling(client=client, round_index=round_index, step=step)

    def noise(self, *, client: int, round_index: int, step: int) -> Draws:
        """Return a generator that others have too."""
        if self.of_clients:
            return np.random.default_rng([0, round_index, step])
        return np.random.default_rng([1, client])


@dataclass(frozen=True)
class Truncated:
    """Cuts a batch off at a fixed size, and says that it is a Poisson batch."""

    sampler: Sampler
    sample_rate: float

    def draw(self, num_examples: int, generator: Draws) -> NDArray[np.int64]:
        """Return at most so many of the rows that were drawn."""
        drawn = self.sampler.draw(num_examples, generator)
        return np.sort(generator.permutation(drawn)[: max(1, int(FIXED * self.sample_rate * num_examples))])

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Return the event of the sampler that it cuts."""
        return self.sampler.dp_event(noise_multiplier)


def _mechanism(f: Federation) -> Mechanism:
    assert f.mechanism is not None
    return f.mechanism


def noise_off(f: Federation) -> Federation:
    """Clip, and add nothing."""
    return replace(f, mechanism=replace(_mechanism(f), noise_multiplier=0.0))


def clip_doubled(f: Federation) -> Federation:
    """Clip at 2 C, with the noise for C."""
    clip, sigma = _mechanism(f).max_grad_norm, _mechanism(f).noise_multiplier
    return replace(f, mechanism=replace(_mechanism(f), max_grad_norm=2 * clip, noise_multiplier=sigma / 2))


def noise_reused(f: Federation) -> Federation:
    """Add a client's first noise in all its steps and rounds."""
    return replace(f, randomness=SameNoise(f.randomness, of_clients=False))


def batch_truncated(f: Federation) -> Federation:
    """Cut batches off at a fixed size."""
    sampler = Truncated(f.training.sampler, _mechanism(f).sample_rate)
    return replace(f, training=replace(f.training, sampler=sampler))


def one_seed(f: Federation) -> Federation:
    """Draw the noise of all clients from one seed."""
    return replace(f, randomness=SameNoise(f.randomness, of_clients=True))


PLANTED: Mapping[str, Callable[[Federation], Federation]] = {
    "noise off": noise_off,
    "clip doubled": clip_doubled,
    "noise reused": noise_reused,
    "batch truncated": batch_truncated,
    "one seed for all clients": one_seed,
}
