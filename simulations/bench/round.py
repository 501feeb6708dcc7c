"""A whole round in fresh processes, start-up included: ours against Flower's Ray simulation.

100 clients take 4 private steps on 4 examples each, on average, and the server averages. The rival has two actors of
one core; `cached` keeps model and data in a global of the actor, `example` loads them for every message, as Flower's
public examples do. The means that the timed processes leave behind must be the same, to rounding, or no time counts.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

from fedlr.simulations.bench.contestants import ENVIRONMENT, by_slot
from fedlr.simulations.bench.federations import DIVISOR, LR, MAX_GRAD_NORM, OPACUS, ours, overrides
from fedlr.simulations.bench.outcome import BenchmarkFailed, Measure, Outcome, check_equal
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import alternate

OURS, CACHED, EXAMPLE = "ours", "Flower, cached", "Flower, example"
TOLERANCE = 1e-2  # of what one clipped example of one client moves the mean
MODULES = {
    OURS: ("fedlr.simulations.bench.one_round",),
    CACHED: ("fedlr.simulations.bench.rivals.flower_round", "cached"),
    EXAMPLE: ("fedlr.simulations.bench.rivals.flower_round", "example"),
}
LONGEST_S = 1200


def run(settings: Settings) -> Outcome:
    """Time ours and each rival in turn, and compare what the timed processes computed."""
    num_clients = settings.pick(tiny=4, quick=100, full=100)
    num_steps = settings.pick(tiny=1, quick=4, full=4)
    shared = overrides(settings, num_clients=num_clients, num_steps=num_steps, batch=4, is_toy=False)
    words = {OURS: [*shared, *ours(settings)], CACHED: [*shared, *OPACUS], EXAMPLE: [*shared, *OPACUS]}
    outs = {name: settings.scratch / f"round-{number}.safetensors" for number, name in enumerate(words)}
    turn_of = {name: partial(one_round, name, outs[name], words[name]) for name in words}

    unit = LR * MAX_GRAD_NORM / DIVISOR / num_clients
    checks, measures, raw = [], [], {}
    rivals = (("round-cached", CACHED, (1, 1, 5)), ("round-examples", EXAMPLE, (1, 1, 3)))
    for key, rival, (tiny, quick, full) in rivals:
        turns = settings.pick(tiny=tiny, quick=quick, full=full)
        pair = {name: turn_of[name] for name in (OURS, rival)}
        times = alternate(pair, turns=turns, warmups=0, seed=settings.seed)
        mean, theirs = (by_slot(load_file(outs[name])) for name in (OURS, rival))
        text = f"mean of the round: ours and {rival}"
        checks.append(check_equal(text, mean, theirs, unit=unit, tolerance=TOLERANCE))
        raw[rival] = times.raw()
        measures.append(
            Measure(key, f"round, start-up included: times faster than {rival}", times.ratios(rival, OURS), " x")
        )
        for name, found in times.wall_s.items():
            text = f"round, start-up included: seconds of {name}, in turn with {rival}"
            measures.append(Measure(f"round-seconds-{rival}-{name}", text, tuple(found), " s"))
        seconds = {name: f"{median(found):.1f} s" for name, found in times.wall_s.items()}
        settings.say(f"  {rival}: {seconds[rival]}, ours {seconds[OURS]}")
    setting = {
        "clients": num_clients,
        "steps": num_steps,
        "overrides": words,
        "threads": "ours: 1 process of 2; rivals: 2 actors of 1",
        "clock": "wall, from the start of the process to its end",
    }
    return Outcome("round", tuple(measures), tuple(checks), setting, raw)


def one_round(name: str, out: Path, words: Sequence[str], _turn: int) -> None:
    """Run one contestant's process from start to end.

    Raises:
        BenchmarkFailed: it did not end well, or left nothing.
    """
    out.unlink(missing_ok=True)
    module, *first = MODULES[name]
    done = subprocess.run(
        [sys.executable, "-m", module, *first, str(out), *words],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    if done.returncode != 0 or not out.exists():
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise BenchmarkFailed(f"{name} ended with exit code {done.returncode}: {said}")
