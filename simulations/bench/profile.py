"""Where the time of a cohort's private step goes: sampled stacks, their shares, and the floor below them.

64 clients of MiniLM over real sentences, as in the cohort benchmark, on one thread without a pool, so that one stack
shows everything. The floor is one private step of one client against the forward and backward pass of the same network
without any adapter, privacy or optimizer.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.config.schema import compose_experiment
from fedlr.models.peft_state import adapted_layers, train_only
from fedlr.rounds.pools.local import sharing_base
from fedlr.simulations.bench.federations import ours, overrides
from fedlr.simulations.bench.flame import Stack, sampled
from fedlr.simulations.bench.outcome import Measure, Outcome
from fedlr.simulations.bench.rivals.networks import Network, build_network
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.step import MINILM, OURS, PLAIN, TINY, build_contestants
from fedlr.simulations.bench.timing import alternate
from fedlr.simulations.federation import Federation, assemble
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses
from fedlr.training.cohort import Stack as ClientStack
from fedlr.training.cohort import train_cohort
from fedlr.training.fused import FusedGradients
from fedlr.training.threads import torch_threads

FLOOR, FORWARD = "network without adapters, forward and backward", "network without adapters, forward"
# Part of a step: its colour, and the functions whose frame puts a stack there. The first that fits counts.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "noise": ("purple", ("privatise_rows", "gaussian_noise")),
    "optimizer": ("yellow", ("SGD.step", "Optimizer.profile_hook_step")),
    "norms, clipping, sums": ("vermillion", ("FusedGradients._sums",)),
    "layers with an adapter, backward": ("orange", ("_StackedLora.backward",)),
    "layers with an adapter, forward": ("green", ("_StackedLora.forward",)),
    "drawing, sorting, padding": ("grey", ("TokenisedText.batch", "micro_batches", "PoissonSampler.draw")),
    "frozen layers, backward": ("sky", ("grad", "_engine_run_backward")),
    "frozen layers, forward": ("blue", ("losses_of",)),
}
OTHER = "all else"


class Inline(Executor):
    """Runs everything at once, in this thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call and return what came out."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def run(settings: Settings) -> Outcome:
    """Sample a cohort's steps; time the floor of one client's."""
    num_clients = settings.pick(tiny=4, quick=64, full=64)
    rounds = settings.pick(tiny=20, quick=2, full=8)
    words = [*overrides(settings, num_clients=num_clients, num_steps=1, batch=8), *ours(settings)]
    stacks: Counter[Stack] = Counter()
    with torch_threads(1):
        federation = assemble(compose_experiment(words), seed=settings.seed)
        sample_cohort_steps(federation, stacks, rounds=rounds)
        floor, raw = measure_floor(settings)
    shares = shares_of(stacks)
    for part, share in sorted(shares.items(), key=lambda item: -item[1]):
        settings.say(f"  {100 * share:5.1f} % {part}")
    measures = [Measure(f"share: {part}", f"share of a cohort's step: {part}", (s,)) for part, s in shares.items()]
    collapsed = {";".join(stack): seconds for stack, seconds in stacks.items()}
    setting = {"threads": 1, "overrides": words, "clients": num_clients, "rounds": rounds}
    return Outcome("profile", (*measures, *floor), (), setting, {"stacks": collapsed, **raw})


def sample_cohort_steps(f: Federation, stacks: Counter[Stack], *, rounds: int) -> None:
    """Train all clients for so many rounds, and sample all but the first."""
    model = sharing_base(f.working)
    engine = FusedGradients(model, train_only(model, f.request().block), loss=class_losses)
    start = f.start.adapter.select(f.request().block)

    def train(round_index: int) -> None:
        train_cohort(
            engine.clipped_sums,
            Inline(),
            ClientStack.of([start] * len(f.clients), device=torch.device("cpu")),
            f.clients,
            training=f.training,
            mechanism=f.mechanism,
            randomness=f.randomness,
            client_ids=range(len(f.clients)),
            round_index=round_index,
        )

    train(0)
    with sampled(stacks):
        for round_index in range(1, rounds + 1):
            train(round_index)


def measure_floor(settings: Settings) -> tuple[list[Measure], dict[str, Any]]:
    """Time one client's private step, the plain one, and the network alone."""
    shape = settings.pick(tiny=TINY, quick=MINILM, full=MINILM)
    network = build_network("encoder", shape, batch=8, seed=settings.seed)
    contestants = build_contestants(network)
    bare = without_adapters(network)
    turn_of: dict[str, Callable[[int], object]] = {
        name: partial(_step, contestants[name].step, network) for name in (OURS, PLAIN)
    }
    turn_of[FLOOR] = partial(_bare, bare, network, backward=True)
    turn_of[FORWARD] = partial(_bare, bare, network, backward=False)
    turns = settings.pick(tiny=2, quick=7, full=21)
    times = alternate(turn_of, turns=turns, warmups=1, seed=settings.seed)
    measures = [
        Measure(
            f"floor: {name}", f"{name} / our private step, encoder, batch 8", times.ratios(name, OURS, clock="cpu_s")
        )
        for name in (FORWARD, FLOOR, PLAIN)
    ]
    for measure in measures:
        settings.say(f"  {median(measure.values):.2f} = {measure.text}")
    return measures, {"floor": times.raw()}


def without_adapters(network: Network) -> nn.Module:
    """Return the frozen network alone, whose backward pass goes as far down as the lowest adapter."""
    model = sharing_base(network.model)
    model.requires_grad_(False)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base_layer)
        layer.base_layer.register_forward_hook(_starts_here)
    return model


def _starts_here(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _step(step: Callable[[Batch], None], network: Network, _turn: int) -> None:
    step(network.batch)


def _bare(model: nn.Module, network: Network, _turn: int, *, backward: bool) -> None:
    loss = network.loss(model, network.batch).sum()
    if backward:
        loss.backward()


def part_of(stack: Stack) -> str:
    """Return the part of a step that a stack belongs to."""
    functions = {name.partition(" ")[0] for name in stack}
    return next((part for part, (_, names) in PARTS.items() if functions & set(names)), OTHER)


def shares_of(stacks: Mapping[Stack, float]) -> dict[str, float]:
    """Return each part's share of the sampled time, in the order of `PARTS`."""
    seconds: Counter[str] = Counter()
    for stack, some in stacks.items():
        seconds[part_of(stack)] += some  # type: ignore[assignment]
    whole = sum(seconds.values())
    return {part: seconds[part] / whole for part in [*PARTS, OTHER] if seconds[part] > 0}


def colour_of(stack: Stack) -> str:
    """Return the colour of a frame: that of the part it belongs to."""
    part = part_of(stack)
    return PARTS[part][0] if part in PARTS else "grid"
