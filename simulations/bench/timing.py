"""Contestants in turn: every turn runs each of them once, in an order drawn anew, and gives one ratio.

A ratio compares two times of the same turn, so that a machine that is slow for a minute is slow for both. Garbage is
collected before each run, warm-up turns are thrown away, and an exception of any contestant ends the benchmark.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# A contestant does the work of one turn; it is told the turn's number, the same for all, warm-up included.
Contestant = Callable[[int], object]


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant, one entry a turn. `cpu_s` is that of this process, all its threads together."""

    wall_s: Mapping[str, list[float]]
    cpu_s: Mapping[str, list[float]]
    orders: list[list[str]]

    def ratios(self, numerator: str, denominator: str, *, clock: str = "wall_s") -> tuple[float, ...]:
        """Return the ratio of two contestants' times, one a turn."""
        times: Mapping[str, list[float]] = getattr(self, clock)
        return tuple(a / b for a, b in zip(times[numerator], times[denominator], strict=True))

    def raw(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def alternate(contestants: Mapping[str, Contestant], *, turns: int, warmups: int, seed: int) -> Times:
    """Run every contestant once a turn, `warmups` + `turns` times, and return the times of the last `turns`."""
    generator = random.Random(seed)
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    orders = []
    gc.freeze()  # what was there before need not be looked at before each run
    try:
        for turn in range(warmups + turns):
            order = list(contestants)
            generator.shuffle(order)
            for name in order:
                gc.collect()
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                contestants[name](turn)
                cpu_s, wall_s = time.process_time() - cpu_start, time.perf_counter() - wall_start
                if turn >= warmups:
                    wall[name].append(wall_s)
                    cpu[name].append(cpu_s)
            if turn >= warmups:
                orders.append(order)
    finally:
        gc.unfreeze()
    return Times(wall, cpu, orders)
