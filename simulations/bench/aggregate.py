"""The server's part of a round over 48 layers of 1024 x 1024: peak memory with 1,000 clients, and the re-factorisation.

Memory: every rule runs in a fresh process, through `run_round`, its checks and its diagnostics included. Both factors
train, so the clients' products have no common factor: the sum has rank min(D, K), and 1,000 clients' factors take 3 GB.
The updates are made one by one from a seed. Counted is the peak of the resident set above what it was before the round,
with the adapter made and the libraries warm (Linux: VmHWM, set back by clear_refs).
Time: `svd_refactor`, which never forms the product, against the SVD of the product, as the authors of FedSVD do it.
Each rule, and the re-factorisation, must first give what its dense definition gives.
Legend: D out_features, K in_features, R rank.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from fedlr.adapters.factors import svd_refactor
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.methods.aggregate.fair import LoraFairRidge
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.rank import svd_redistribution
from fedlr.methods.method import Aggregator, Always, Method, full_adapter, keep
from fedlr.rounds.round import RoundRequest, ServerState, run_round
from fedlr.simulations.bench.contestants import ENVIRONMENT
from fedlr.simulations.bench.memory_use import can_measure, peak_mb, reset_peak, resident_mb
from fedlr.simulations.bench.outcome import BenchmarkFailed, Check, Measure, Outcome, check_equal
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import alternate
from fedlr.training.threads import torch_threads

FACTORED, DENSE = "svd_refactor", "torch.linalg.svd of the product"
REFACTORS_A_TURN = 20  # one takes a few milliseconds
TOLERANCE = 1e-4  # of the size of the product: the dense SVD is one of float32 numbers
LONGEST_S = 1200
WAYS_AT_ONCE = 2  # processes; nothing is timed while they run


@dataclass(frozen=True)
class Shape:
    """A federation: every layer is `features` x `features`."""

    num_clients: int
    num_layers: int
    features: int
    rank: int


# key of the goal: (what it is, the rule)
RULES: Mapping[str, tuple[str, Aggregator]] = {
    "aggregate-mean": ("weighted mean", weighted_mean),
    "aggregate-fair": ("LoRA-FAIR, ridge", LoraFairRidge()),
    "aggregate-flex": ("FlexLoRA", svd_redistribution),
}


@dataclass(frozen=True)
class Streamed:
    """A pool that makes each client's update when it is asked for, around the adapter, in one block of memory."""

    adapter: AdapterState
    seed: int

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate]:
        """Yield the cohort's updates in order."""
        for client in cohort:
            yield self.update(client, task.round_index)

    def update(self, client: int, round_index: int) -> ClientUpdate:
        """Return one client's update: every factor with noise of half its size."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + client)
        old = self.adapter.tensors
        noise = torch.randn(sum(t.numel() for t in old.values()), generator=generator)
        parts = zip(old.items(), noise.split([t.numel() for t in old.values()]), strict=True)
        new = {slot: part.view(t.shape).mul_(0.5 * float(t.std())).add_(t) for (slot, t), part in parts}
        return ClientUpdate(client, new, weight=1.0 + client % 3, base_round=round_index)


def run(settings: Settings) -> Outcome:
    """Check every rule against its dense definition, then measure memory, then time."""
    shape = Shape(
        num_clients=settings.pick(tiny=60, quick=1000, full=1000),
        num_layers=settings.pick(tiny=2, quick=48, full=48),
        features=settings.pick(tiny=192, quick=1024, full=1024),
        rank=settings.pick(tiny=4, quick=8, full=8),
    )
    checks = [check_rule(key, seed=settings.seed) for key in RULES]
    measures, raw = list[Measure](), dict[str, object]()
    not_measured = "" if can_measure() else "; no memory: this system keeps no peak of a process (Linux does)"
    if can_measure():
        for key, found in in_processes(shape, settings).items():
            text = f"{RULES[key][0]}: peak memory of a round of {shape.num_clients:,} clients, above the state before"
            measures.append(Measure(key, text, tuple(one["above_mb"] for one in found), " MB"))
            raw[key] = found
            settings.say(f"  {RULES[key][0]}: {measures[-1].spread.median:.0f} MB, {found[0]['seconds']:.0f} s")
    found_checks, ratio, times = time_refactor(shape, settings)
    settings.say(f"  {FACTORED}: {ratio.spread.median:.0f} times faster{not_measured}")
    setting = {**asdict(shape), "threads": 1, "counted": f"VmHWM less VmRSS before the round{not_measured}"}
    return Outcome("aggregate", (*measures, ratio), (*checks, *found_checks), setting, {**raw, "refactor": times})


def in_processes(shape: Shape, settings: Settings) -> dict[str, list[dict[str, float]]]:
    """Return what fresh processes say of each rule."""
    repeats = settings.pick(tiny=1, quick=1, full=3)
    jobs = [(key, number) for number in range(repeats) for key in reversed(list(RULES))]  # the longest first
    with ThreadPoolExecutor(WAYS_AT_ONCE) as threads:
        answers = list(threads.map(lambda job: in_process(job[0], shape, settings.seed + job[1]), jobs))
    told: dict[str, list[dict[str, float]]] = {key: [] for key in RULES}
    for (key, _), answer in zip(jobs, answers, strict=True):
        told[key].append(answer)
    return told


def in_process(key: str, shape: Shape, seed: int) -> dict[str, float]:
    """Run one rule in a fresh process and return what it prints.

    Raises:
        BenchmarkFailed: it did not end well.
    """
    task = json.dumps({"key": key, "shape": asdict(shape), "seed": seed})
    done = subprocess.run(
        [sys.executable, "-m", "fedlr.simulations.bench.aggregate", task],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkFailed(f"{key} ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def measure_round(key: str, shape: Shape, seed: int) -> dict[str, float]:
    """Run one round of one rule in this process; return its peak memory above what it was before, and its time.

    Raises:
        RuntimeError: a client is missing.
    """
    method = Method(key, Always([LORA_A, LORA_B]), RULES[key][1], keep, full_adapter)
    few = Shape(num_clients=40, num_layers=1, features=192, rank=4)
    adapter = make_adapter(few, seed)
    run_round(ServerState(adapter), range(few.num_clients), pool=Streamed(adapter, seed), method=method)
    state = ServerState(make_adapter(shape, seed))
    pool = Streamed(state.adapter, seed)
    gc.collect()
    reset_peak()
    before, started = resident_mb(), time.perf_counter()
    _, diagnostics = run_round(state, range(shape.num_clients), pool=pool, method=method)
    if len(diagnostics.trained) != shape.num_clients:
        raise RuntimeError(f"Expected {shape.num_clients} clients in the mean, got {len(diagnostics.trained)}")
    return {
        "above_mb": peak_mb() - before,
        "before_mb": before,
        "seconds": time.perf_counter() - started,
        "aggregation_error": fmean(diagnostics.aggregation_error.values()),
    }


def make_adapter(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Return a random adapter with products of about the size of one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(shape.num_layers):
        for role, size in ((LORA_A, (shape.rank, shape.features)), (LORA_B, (shape.features, shape.rank))):
            numbers = torch.randn(size, generator=generator, dtype=torch.float64) / shape.features**0.5
            tensors[Slot(f"layer.{number:02}", role)] = numbers.to(dtype)
    return AdapterState(tensors, scale=1.0)


def check_rule(key: str, *, seed: int) -> Check:
    """Compare a rule with its dense definition, on layers small enough for it.

    Raises:
        BenchmarkFailed: they differ.
    """
    shape = Shape(num_clients=8, num_layers=2, features=24, rank=3)
    adapter = make_adapter(shape, seed, torch.float64)
    updates = [Streamed(adapter, seed).update(client, 0) for client in range(shape.num_clients)]
    total = sum(update.weight for update in updates)
    found, expected = {}, {}
    for path, layer in RULES[key][1](adapter, updates).factors().items():
        clients = [(u.tensors[Slot(path, LORA_A)], u.tensors[Slot(path, LORA_B)], u.weight / total) for u in updates]
        mean_A = sum((lora_A.double() * share for lora_A, _, share in clients), start=torch.tensor(0.0))
        mean_B = sum((lora_B.double() * share for _, lora_B, share in clients), start=torch.tensor(0.0))
        products = (product(LoraFactors(lora_A, lora_B)) * share for lora_A, lora_B, share in clients)
        found[Slot(path, "product")] = product(layer)
        expected[Slot(path, "product")] = DEFINITIONS[key](mean_A, mean_B, sum(products, start=torch.tensor(0.0)))
    return check_equal(f"{RULES[key][0]}, as defined", found, expected, unit=1.0, tolerance=1e-5)


def mean_product(mean_A: Tensor, mean_B: Tensor, ideal_DK: Tensor) -> Tensor:
    """Return the product of the means."""
    return mean_B @ mean_A


def ridge_product(mean_A: Tensor, mean_B: Tensor, ideal_DK: Tensor) -> Tensor:
    """Return the product that solves the normal equations of `LoraFairRidge`."""
    penalty = LoraFairRidge().penalty
    gram = mean_A @ mean_A.T + penalty * torch.eye(len(mean_A), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram, ideal_DK @ mean_A.T + penalty * mean_B, left=False)
    return solved @ mean_A


def best_product(mean_A: Tensor, mean_B: Tensor, ideal_DK: Tensor) -> Tensor:
    """Return the best approximation of the mean product that has the adapter's rank."""
    U, S, Vh = torch.linalg.svd(ideal_DK)
    rank = len(mean_A)
    best: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


DEFINITIONS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "aggregate-mean": mean_product,
    "aggregate-fair": ridge_product,
    "aggregate-flex": best_product,
}


def product(layer: LoraFactors) -> Tensor:
    """Return lora_B @ lora_A, (D, K) float64."""
    return layer.lora_B.double() @ layer.lora_A.double()


def dense_refactor(layer: LoraFactors) -> LoraFactors:
    """Return the factors that the SVD of the whole product gives."""
    U, S, Vh = torch.linalg.svd(layer.lora_B @ layer.lora_A, full_matrices=False)
    rank = len(layer.lora_A)
    return LoraFactors(Vh[:rank], U[:, :rank] * S[:rank])


def time_refactor(
    shape: Shape, settings: Settings, refactor: Callable[[LoraFactors], LoraFactors] = svd_refactor
) -> tuple[list[Check], Measure, dict[str, object]]:
    """Compare both re-factorisations of one layer, then time them in turn.

    Raises:
        BenchmarkFailed: they differ.
    """
    (layer,) = make_adapter(Shape(0, 1, shape.features, shape.rank), settings.seed).factors().values()
    slot, whole = Slot("layer", "product"), product(layer)
    contestants: dict[str, Callable[[int], object]] = {
        FACTORED: lambda turn: [refactor(layer) for _ in range(REFACTORS_A_TURN)],
        DENSE: lambda turn: dense_refactor(layer),
    }
    with torch_threads(1):
        checks = [
            check_equal(f"{name}: product", {slot: found}, {slot: whole}, unit=float(whole.norm()), tolerance=TOLERANCE)
            for name, found in ((FACTORED, product(refactor(layer))), (DENSE, product(dense_refactor(layer))))
        ]
        times = alternate(contestants, turns=settings.pick(tiny=2, quick=3, full=7), warmups=1, seed=settings.seed)
    ratios = tuple(REFACTORS_A_TURN * ratio for ratio in times.ratios(DENSE, FACTORED, clock="cpu_s"))
    text = f"re-factorisation of {shape.features} x {shape.features}, rank {shape.rank}: times faster than {DENSE}"
    return checks, Measure("aggregate-refactor", text, ratios, " x"), times.raw()


def main(arguments: Sequence[str]) -> int:
    """Measure one rule as the JSON text says, and print what was found."""
    (text,) = arguments
    task = json.loads(text)
    with torch_threads(1):
        print(json.dumps(measure_round(task["key"], Shape(**task["shape"]), task["seed"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
