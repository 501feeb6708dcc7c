"""One client's private step against the same step without privacy, and against Opacus hooks, functorch and ghost.

All contestants share one frozen base, train lora_B of query and value with AdamW on the same batch, and run on one
thread. The clock is CPU time of this process, which other work on the machine disturbs less than the wall clock.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.state import LORA_B, Slot
from fedlr.models.peft_state import train_only
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.pools.local import sharing_base
from fedlr.simulations.bench.outcome import Check, Measure, Outcome, check_equal, joint_norm
from fedlr.simulations.bench.rivals.networks import FAMILIES, Network, Shape, build_network
from fedlr.simulations.bench.rivals.opacus_steps import OpacusGhostStep, OpacusStep, PlainStep
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import Times, alternate
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import Gradients, LoopGradients
from fedlr.training.local import apply, privatise
from fedlr.training.threads import torch_threads

NOISE_MULTIPLIER = 1.0
TOLERANCE = 1e-4  # relative to the sum's norm
OURS, PLAIN, HOOKS, GHOST, FUNCTORCH = "ours", "plain", "Opacus hooks", "Opacus ghost", "Opacus functorch"
TINY = Shape(hidden=32, layers=2, heads=2, tokens=10, vocabulary=64, decoder_vocabulary=64)
MINILM = Shape(hidden=384, layers=6, heads=12, tokens=65)

GradientsFactory = Callable[..., Gradients]


class Step(Protocol):
    """A contestant: takes one step, and shows the sum that its step starts from."""

    def step(self, batch: Batch) -> None:
        """Take one training step."""
        ...

    def sums(self, batch: Batch) -> dict[Slot, Tensor]:
        """Return the sum of gradients before noise."""
        ...


class OurStep:
    """The private step of this project, as `fedlr.training.local` takes it."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[Slot, nn.Parameter],
        *,
        loss: PerExampleLoss,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: float,
        gradients: GradientsFactory = FusedGradients,
    ) -> None:
        self._trained = trained
        self._gradients = gradients(model, trained, loss=loss)
        self._optimizer = optimizer(list(trained.values()))
        self._mechanism = Mechanism(
            noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=max_grad_norm, sample_rate=0.5, divisor=1.0
        )
        self._generator = np.random.default_rng(0)

    def step(self, batch: Batch) -> None:
        """Take one private step."""
        total = self.sums(batch)
        apply(
            self._optimizer,
            self._trained,
            privatise(total, mechanism=self._mechanism, generator=self._generator),
        )

    def sums(self, batch: Batch, *, max_grad_norm: float | None = None) -> dict[Slot, Tensor]:
        """Return the sum of clipped gradients, before any noise."""
        bound = self._mechanism.max_grad_norm if max_grad_norm is None else max_grad_norm
        return self._gradients.clipped_sum(batch, max_grad_norm=bound)


def run(settings: Settings, *, gradients: GradientsFactory = FusedGradients) -> Outcome:
    """Measure every family at every batch size."""
    sizes = sizes_of(settings)
    checks, ratios, raw = [], {}, {}
    with torch_threads(1):
        for family, size, batch in sizes:
            name = f"{family}, batch {batch}, {size.tokens} tokens"
            turns = settings.pick(tiny=2, quick=5, full=21)
            found, times = measure(family, size, batch=batch, turns=turns, seed=settings.seed, gradients=gradients)
            checks += found
            raw[name] = times.raw()
            ratios[name] = {
                rival: times.ratios(OURS, rival, clock="cpu_s") for rival in (PLAIN, HOOKS, GHOST, FUNCTORCH)
            }
            medians = ", ".join(f"{median(values):.3f} of {rival}" for rival, values in ratios[name].items())
            settings.say(f"  {name}: {medians}")
    setting = {
        "threads": 1,
        "clock": "CPU time of the process",
        "adapter": f"LoRA rank {sizes[0][1].rank} on query and value of all layers, lora_B trains",
        "optimizer": "AdamW",
        "steps_a_turn": {name: steps_a_turn(batch) for name, (_, _, batch) in zip(raw, sizes, strict=True)},
    }
    return Outcome("step", measures_of(ratios), tuple(checks), setting, raw)


def sizes_of(settings: Settings) -> list[tuple[str, Shape, int]]:
    """Return family, shape and batch of every size that is measured."""
    if settings.size == "tiny":
        return [(family, TINY, 2) for family in FAMILIES]
    if settings.size == "quick":
        short = replace(MINILM, tokens=33)  # a ViT of 33 tokens there is not
        sizes = [(family, MINILM, 4) for family in FAMILIES]
        return [*sizes, ("encoder", short, 32), ("vit", MINILM, 32), ("decoder", short, 32)]
    sizes = [(family, MINILM, batch) for family in FAMILIES for batch in (4, 8, 16, 32)]
    return [*sizes, *(("vit", replace(MINILM, tokens=197), batch) for batch in (4, 16))]


def steps_a_turn(batch: int) -> int:
    """Return how many steps make one turn: enough to be timed, few enough to take turns often."""
    return max(1, 8 // batch)


def measure(
    family: str, shape: Shape, *, batch: int, turns: int, seed: int, gradients: GradientsFactory = FusedGradients
) -> tuple[list[Check], Times]:
    """Check that all contestants compute the same, then time them."""
    network = build_network(family, shape, batch=batch, seed=seed)
    contestants = build_contestants(network, gradients)
    checks = check(contestants, network, f"{family}, batch {batch}")

    def several(contestant: Step, _turn: int) -> None:
        for _ in range(steps_a_turn(batch)):
            contestant.step(network.batch)

    turn_of = {name: partial(several, contestant) for name, contestant in contestants.items()}
    return checks, alternate(turn_of, turns=turns, warmups=1, seed=seed)


def build_contestants(network: Network, gradients: GradientsFactory = FusedGradients) -> dict[str, Step]:
    """Give every contestant an adapter of its own over one frozen base, all with the same values."""
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    bound = clip_bound(network)
    private: dict[str, Any] = {"max_grad_norm": bound, "noise_multiplier": NOISE_MULTIPLIER}
    makers: dict[str, Callable[..., Step]] = {
        OURS: partial(OurStep, max_grad_norm=bound, gradients=gradients),
        PLAIN: PlainStep,
        HOOKS: partial(OpacusStep, **private),
        FUNCTORCH: partial(OpacusStep, **private, functorch=True),
        GHOST: partial(OpacusGhostStep, **private),
    }
    contestants = {}
    for name, make in makers.items():
        model = sharing_base(network.model)
        trained = train_only(model, frozenset({LORA_B}))
        contestants[name] = make(model, trained, loss=network.loss, optimizer=adamw)
    return contestants


def clip_bound(network: Network) -> float:
    """Return a bound between the norms of the examples' gradients, so that some are clipped and some are not."""
    model = sharing_base(network.model)
    loop = LoopGradients(model, train_only(model, frozenset({LORA_B})), loss=network.loss)
    norms = []
    for row in range(network.batch.num_examples):
        norms.append(joint_norm(loop.clipped_sum(network.batch.one(row), max_grad_norm=math.inf)))
    return median(norms)


def check(contestants: Mapping[str, Step], network: Network, text: str) -> list[Check]:
    """Compare our clipped sum with that of each private rival, and our unclipped sum with the plain gradient."""
    ours = contestants[OURS]
    assert isinstance(ours, OurStep)
    clipped = ours.sums(network.batch)
    whole = ours.sums(network.batch, max_grad_norm=math.inf)
    checks = []
    for name, contestant in contestants.items():
        if name != OURS:
            theirs = contestant.sums(network.batch)
            mine, unit = (whole, joint_norm(whole)) if name == PLAIN else (clipped, joint_norm(clipped))
            checks.append(check_equal(f"{text}: ours and {name}", mine, theirs, unit=unit, tolerance=TOLERANCE))
    return checks


def measures_of(ratios: Mapping[str, Mapping[str, tuple[float, ...]]]) -> tuple[Measure, ...]:
    """Return the figures of the goals, over all sizes and by family, and the rest by size."""
    keys = {PLAIN: "step-plain", HOOKS: "step-hooks", GHOST: "step-ghost", FUNCTORCH: "step-functorch"}
    measures = []
    for rival, key in keys.items():
        everything = tuple(itertools.chain.from_iterable(found[rival] for found in ratios.values()))
        measures.append(Measure(key, f"private step / {rival}, all sizes", everything))
        for family in FAMILIES:
            mine = [found[rival] for name, found in ratios.items() if name.startswith(family)]
            values = tuple(itertools.chain.from_iterable(mine))
            measures.append(Measure(f"{key}-{family}", f"private step / {rival}, {family}", values))
    for name, found in ratios.items():
        measures += [Measure(f"{name} / {rival}", f"{name}: private step / {rival}", v) for rival, v in found.items()]
    return tuple(measures)
