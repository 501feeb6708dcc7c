"""Noise for release against numpy's: nanoseconds of a number, for a client's trained values of one step.

Numpy's Philox is what a seeded run draws from, and what noise for release was drawn from before. Ours is the ChaCha20
keystream (`fedlr.streams.Keystream`), in floating point and exactly on a grid (`fedlr.privacy.grid`). Every contestant
draws for as many steps as fill a turn, each step from a new generator, as training does.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from fedlr.privacy.mechanism import Mechanism, gaussian_noise, on_grid
from fedlr.simulations.bench.outcome import BenchmarkFailed, Measure, Outcome
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import alternate
from fedlr.streams import OsRandomness, Purpose, stream
from fedlr.training.threads import torch_threads

SIZES = (770, 50_000)  # values that train: a head of two classes on 384 features, and LoRA beside it
NUMPYS, CIPHER, GRID = "numpy's Philox", "ChaCha20", "ChaCha20, exactly on a grid"
ON_GRID = Mechanism(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, divisor=1.0, release_noise="grid")


def run(settings: Settings) -> Outcome:
    """Time each way of drawing the noise of a step, in turn."""
    a_turn = settings.pick(tiny=10_000, quick=2_000_000, full=10_000_000)
    turns = settings.pick(tiny=2, quick=7, full=21)
    measures, raw = list[Measure](), dict[str, object]()
    with torch_threads(1):
        for size in SIZES:
            steps = max(1, a_turn // size)
            times = alternate(contestants(size, steps), turns=turns, warmups=1, seed=settings.seed)
            raw[str(size)] = times.raw()
            nanoseconds = [1e9 * cpu / (size * steps) for cpu in times.cpu_s[CIPHER]]
            for key, text, values, unit in (
                ("noise-cipher", f"{CIPHER} / {NUMPYS}", times.ratios(CIPHER, NUMPYS, clock="cpu_s"), ""),
                ("noise-grid", f"{GRID} / {NUMPYS}", times.ratios(GRID, NUMPYS, clock="cpu_s"), ""),
                ("noise-cipher-ns", f"{CIPHER}, a number", tuple(nanoseconds), " ns"),
            ):
                measures.append(Measure(f"{key}-{size}", f"noise of {size:,} values: {text}", values, unit))
                settings.say(f"  {measures[-1].text}: {measures[-1].spread.median:.2f}{unit}")
    return Outcome("noise", tuple(measures), setting={"sizes": list(SIZES), "threads": 1, "clock": "CPU"}, raw=raw)


def contestants(size: int, steps: int) -> dict[str, Callable[[int], object]]:
    """Return the ways to draw: each gets a turn's number, and draws the noise of `steps` steps.

    Raises:
        BenchmarkFailed: one draws nothing like noise of standard deviation 1.
    """
    ways: dict[str, Callable[[int, int], torch.Tensor]] = {
        NUMPYS: lambda turn, step: gaussian_noise(
            (size,), std=1.0, generator=stream(0, Purpose.NOISE, round_index=turn, step=step)
        ),
        CIPHER: lambda turn, step: gaussian_noise(
            (size,), std=1.0, generator=OsRandomness().noise(client=0, round_index=turn, step=step)
        ),
    }
    zeros, grid = torch.zeros(size), ON_GRID.grid(size)
    assert grid is not None
    ways[GRID] = lambda turn, step: on_grid(
        zeros, grid, generator=OsRandomness().noise(client=0, round_index=turn, step=step)
    )
    for name, way in ways.items():
        found = float(np.mean([way(0, step).square().mean() for step in range(max(1, 10_000 // size))]))
        if not 0.8 < found < 1.2:  # 10,000 squares: 14 standard errors
            raise BenchmarkFailed(f"{name} draws numbers of mean square {found:.3g} where 1 is asked for")

    def all_steps(way: Callable[[int, int], torch.Tensor]) -> Callable[[int], object]:
        return lambda turn: deque((way(turn, step) for step in range(steps)), maxlen=0)

    return {name: all_steps(way) for name, way in ways.items()}
