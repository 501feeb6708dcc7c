"""Peak memory of a round of 1,000 clients, against the same process with one client: MiniLM, 23 M parameters.

Each contestant is a fresh process that loads the base model and the data and then forgets its peak (Linux: clear_refs),
so that what loading needed for a moment does not count. Then one trains one client, the other a thousand in one round:
training, checks and aggregation. Memory is the resident set; nothing is shared with other processes but library code.
"""

from collections.abc import Sequence
from statistics import median

from fedlr.simulations.bench.contestants import Contestant
from fedlr.simulations.bench.federations import ours, overrides
from fedlr.simulations.bench.memory_use import can_measure
from fedlr.simulations.bench.outcome import Measure, Outcome
from fedlr.simulations.bench.settings import Settings

# What a machine with little memory sets: smaller micro-batches, and fewer clients at once.
FRUGAL = ("trainer.token_budget=256", "runtime.memory_gb=0.01")
ONE, MANY = "one client", "all clients"


def run(settings: Settings) -> Outcome:
    """Measure both peaks, in turn, each in fresh processes: with frugal settings; in full, also with default ones."""
    if not can_measure():
        return Outcome("memory", not_run="this system keeps no peak of a process that can be set back (Linux does)")
    num_clients = settings.pick(tiny=8, quick=1000, full=1000)
    words = [*overrides(settings, num_clients=num_clients, num_steps=1, batch=4), *ours(settings)]
    measures, raw = [], {}
    variants: list[tuple[str, str, Sequence[str]]] = [("memory", ", frugal settings", FRUGAL)]
    if settings.size != "quick":
        variants.append(("memory-default", ", default settings", ()))
    for key, text, more in variants:
        peaks = measure_peaks(settings, [*words, *more], num_clients)
        one, many = median(peaks[ONE]), median(peaks[MANY])
        settings.say(f"  {' '.join(more) or 'default'}: one client {one:.0f} MB, {num_clients:,} clients {many:.0f} MB")
        measures.append(
            Measure(
                key,
                f"peak memory of {num_clients:,} clients in a round / of one client{text}",
                tuple(b / a for a, b in zip(peaks[ONE], peaks[MANY], strict=True)),
                note=f"{one:.0f} MB and {many:.0f} MB",
            )
        )
        raw[key] = peaks
    setting = {
        "clients": num_clients,
        "overrides": words,
        "frugal": list(FRUGAL),
        "counted": "VmHWM after the base and the data are loaded",
    }
    return Outcome("memory", tuple(measures), (), setting, {"peak_mb": raw})


def measure_peaks(settings: Settings, words: Sequence[str], num_clients: int) -> dict[str, list[float]]:
    """Return the peaks in MB of fresh processes that train one client, and all of them."""
    peaks: dict[str, list[float]] = {ONE: [], MANY: []}
    for _ in range(settings.pick(tiny=1, quick=1, full=3)):
        for name, clients in ((ONE, 1), (MANY, num_clients)):
            with Contestant(name, settings.scratch, words) as contestant:
                contestant.ask("peak", reset=True)
                contestant.ask("round", clients=clients)
                peaks[name].append(contestant.ask("peak", reset=False)["peak_mb"])
    return peaks
