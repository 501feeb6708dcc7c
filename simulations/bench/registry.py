"""Every benchmark by name: one line each. The modules are imported when they run."""

import importlib
from collections.abc import Callable

from fedlr.simulations.bench.outcome import Outcome
from fedlr.simulations.bench.settings import Settings

# NAME: what it measures. `fedlr.simulations.bench.NAME.run(settings)` measures it.
BENCHMARKS = {
    "step": "one private step, against plain PEFT and Opacus hooks, ghost, functorch",
    "cohort": "64 clients together, against two processes that train one by one",
    "round": "a round of 100 clients from a cold start, against Flower + Ray",
    "memory": "peak memory of 1,000 clients in a round",
    "overhead": "a round of up to 10,000 clients that train nothing",
    "parity": "the same 20 steps fused, one by one, and with Opacus",
    "aggregate": "peak memory of the server's rules over 1,000 clients, and the re-factorisation",
    "noise": "noise for release, by a cipher and on a grid, against numpy's generator",
    "robust": "accuracy under hostile clients, attacks against aggregation rules",
    "federation": "a round of three devices over TLS, against Flower's own FedAvg of the same arrays",
    "gpu": "64 clients on a GPU, against one by one",
    "profile": "where the time of a private step goes, with a flame graph",
}


def benchmark(name: str) -> Callable[[Settings], Outcome]:
    """Return the function of a benchmark."""
    run: Callable[[Settings], Outcome] = importlib.import_module(f"fedlr.simulations.bench.{name}").run
    return run
