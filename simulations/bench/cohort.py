"""A cohort of 64 clients with sentences of mixed length, against two processes that train one client after the other.

The rival is the strongest that a user can set up with Opacus: two processes that stay alive, one thread each, the model
resident in each, hooks, every batch trimmed to its own longest sentence, clients handed out four at a time.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.simulations.bench.contestants import Contestant
from fedlr.simulations.bench.federations import OPACUS, UPPER_THIRD, ours, overrides
from fedlr.simulations.bench.outcome import BenchmarkFailed, Check, Measure, Outcome, check_equal
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import Times, alternate

# In units of what one clipped example moves an adapter: a lost, doubled or foreign example would be about 1.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3}
RIVAL = "two processes"
BF16, CACHED = "runtime.base_dtype=bfloat16", "runtime.cache_prefix=true"


def run(settings: Settings) -> Outcome:
    """Measure fp32, bf16, and LoRA in the upper third with and without bf16 over the cached prefix."""
    upper = "adapter.layers=[1]" if settings.size == "tiny" else UPPER_THIRD
    groups: dict[str, tuple[list[str], dict[str, list[str]]]] = {
        "all layers": ([], {"cohort": [], "cohort-bf16": [BF16]}),
        "upper third": ([upper], {"cohort-upper": [BF16, CACHED]}),
    }
    if settings.size == "full":
        groups["upper third"][1]["cohort-upper-fp32"] = [CACHED]
    measures, checks, raw, told = [], [], {}, {}
    for name, (place, variants) in groups.items():
        found, times, said = measure(settings, place, variants)
        checks += [Check(f"{name}: {check.text}", check.difference, check.tolerance) for check in found]
        raw[name], told[name] = times.raw(), said
        for key in variants:
            measure_of = Measure(key, f"{name}, {key}: times faster than {RIVAL}", times.ratios(RIVAL, key), " x")
            measures.append(measure_of)
            settings.say(f"  {measure_of.text}: {measure_of.spread.median:.2f}")
        settings.say(f"  ({RIVAL} took {median(times.wall_s[RIVAL]):.2f} s a round)")
        for contestant, seconds in times.wall_s.items():
            measures.append(
                Measure(
                    f"cohort-seconds-{name}-{contestant}",
                    f"cohort, {name}: seconds of a round, {contestant}",
                    tuple(seconds),
                    " s",
                )
            )
    setting = {"federations": told, "threads": "ours: 1 process of 2; rival: 2 processes of 1", "clock": "wall"}
    return Outcome("cohort", tuple(measures), tuple(checks), setting, raw)


def measure(
    settings: Settings, place: Sequence[str], variants: Mapping[str, Sequence[str]]
) -> tuple[list[Check], Times, dict[str, object]]:
    """Start all contestants of one adapter placement, check that they compute the same, and time them."""
    num_clients = settings.pick(tiny=4, quick=64, full=64)
    num_steps = settings.pick(tiny=1, quick=1, full=4)
    shared = [*overrides(settings, num_clients=num_clients, num_steps=num_steps, batch=8), *place]
    clients = range(num_clients)
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(name, settings.scratch, [*shared, *ours(settings, *more)]))
            for name, more in variants.items()
        }
        for name, more in variants.items():
            wanted = "bfloat16" if BF16 in more else "float32"
            if contestants[name].told["base_dtype"] != wanted:
                raise BenchmarkFailed(f"Expected a {wanted} base in {name}, got {contestants[name].told}")
        rival = Contestant(RIVAL, settings.scratch, [*shared, *OPACUS], num_processes=2)
        contestants[RIVAL] = stack.enter_context(rival)

        for contestant in contestants.values():
            contestant.train(0, clients, keep="check")
        expected = rival.updates("check")
        checks = []
        for name, contestant in contestants.items():
            if name != RIVAL:
                tolerance = TOLERANCES[contestant.told["base_dtype"]] * num_steps
                unit = contestant.told["unit"]
                checks.append(compare(name, contestant.updates("check"), expected, unit=unit, tolerance=tolerance))
        turns = {name: partial(train, contestant, clients) for name, contestant in contestants.items()}
        times = alternate(turns, turns=settings.pick(tiny=1, quick=3, full=15), warmups=1, seed=settings.seed)
        return checks, times, {**{name: c.told for name, c in contestants.items()}, "overrides": shared}


def train(contestant: Contestant, clients: Sequence[int], turn: int) -> None:
    """Train the cohort once; round 0 was the check's, and no round is ever trained twice."""
    contestant.train(turn + 1, clients)


def compare(
    name: str,
    mine: Mapping[int, Mapping[Slot, Tensor]],
    theirs: Mapping[int, Mapping[Slot, Tensor]],
    *,
    unit: float,
    tolerance: float,
) -> Check:
    """Compare the updates of all clients; return the check of the client that differs most."""
    if mine.keys() != theirs.keys():
        raise BenchmarkFailed(f"Expected updates of the same clients ({name}), got {len(mine)} and {len(theirs)}")
    text = f"{name} and {RIVAL}, the client that differs most"
    checks = [check_equal(text, mine[c], theirs[c], unit=unit, tolerance=tolerance) for c in sorted(mine)]
    return max(checks, key=lambda check: check.difference)
