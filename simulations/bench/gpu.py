"""64 clients on one GPU: together in one pass, against one client after the other with Opacus hooks.

Encoders of 110 M and 355 M parameters, random weights, bf16 base, LoRA on query and value, every client with as many
examples of 64 tokens as the batch holds, so that all contestants do the same work. A turn is one whole private step of
every client: sums, noise, optimizer. The share of the matrix rate counts 4 floating-point operations a token and frozen
weight of a linear layer (forward, and backward to the activations; no weight gradient exists), nothing else.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.state import LORA_B, Slot
from fedlr.models.peft_state import adapter_parameters, train_only
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.pools.local import sharing_base
from fedlr.simulations.bench.outcome import Check, Measure, Outcome, check_equal, joint_norm
from fedlr.simulations.bench.rivals.networks import Shape, build_network
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.timing import Times, alternate
from fedlr.streams import SeededRandomness
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.cohort import Stack, train_cohort
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import HookGradients
from fedlr.training.local import LocalTraining, train_client

BLOCK = frozenset({LORA_B})
MODELS = {
    "110m": Shape(hidden=768, layers=12, heads=12, tokens=64),
    "355m": Shape(hidden=1024, layers=24, heads=16, tokens=64, vocabulary=50_265),
}
TOY = Shape(hidden=32, layers=2, heads=2, tokens=8, vocabulary=64)
TOGETHER, ONE_BY_ONE = "together", "one by one"
TOLERANCE = 0.05  # of one client's step; bf16 rounds both differently
MATRIX = 8192


@dataclass(frozen=True)
class Case:
    """What is measured: a model, clients, and how much each of them holds."""

    shape: Shape
    num_clients: int
    batch: int
    token_budget: int


def run(settings: Settings) -> Outcome:
    """Measure both models; nothing without a GPU."""
    if not torch.cuda.is_available():
        return Outcome("gpu", not_run="no GPU")
    device, turns = torch.device("cuda"), settings.pick(tiny=1, quick=5, full=15)
    rate = matrix_rate(device, MATRIX)
    settings.say(f"  bf16 matrix product of {MATRIX}: {rate / 1e12:.0f} TFLOP/s")
    measures, checks, raw = [], [], {}
    for name, shape in MODELS.items():
        case = Case(shape, num_clients=64, batch=4, token_budget=16_384)
        check, times = measure(case, device, turns=turns, seed=settings.seed)
        checks.append(check)
        text = f"64 clients, {name} encoder: times faster than one by one"
        measures.append(Measure(f"gpu-{name}", text, times.ratios(ONE_BY_ONE, TOGETHER), " x"))
        full = Case(shape, num_clients=64, batch=32, token_budget=65_536)
        together, work = Contestants(full, device, seed=settings.seed).together, full.num_clients * full.batch
        large = alternate({TOGETHER: together}, turns=turns, warmups=1, seed=settings.seed)
        shares = tuple(flops_a_token(shape) * work * shape.tokens / s / rate for s in large.wall_s[TOGETHER])
        key = "gpu-rate" if name == "355m" else f"gpu-rate-{name}"
        measures.append(Measure(key, f"share of the bf16 matrix rate, {name} encoder, batch 32", shares))
        raw[name] = {"batch 4": times.raw(), "batch 32": large.raw()}
        settings.say(f"  {name}: {median(measures[-2].values):.1f} x, {median(shares):.2f} of the matrix rate")
    setting = {"matrix_rate_flops": rate, "clients": 64, "tokens": 64, "base": "bfloat16", "optimizer": "SGD"}
    return Outcome("gpu", tuple(measures), tuple(checks), setting, raw)


def measure(case: Case, device: torch.device, *, turns: int, seed: int) -> tuple[Check, Times]:
    """Check that both give the same adapters after one step, then time them."""
    contestants = Contestants(case, device, seed=seed)
    together, alone = contestants.together(0), contestants.one_by_one(0)
    checks = []
    for mine, theirs in zip(together, alone, strict=True):
        text = f"{case.num_clients} clients together and one by one, the one that differs most"
        checks.append(check_equal(text, mine, theirs, unit=joint_norm(theirs), tolerance=TOLERANCE))
    turn_of = {TOGETHER: contestants.together, ONE_BY_ONE: contestants.one_by_one}
    return max(checks, key=lambda check: check.difference), alternate(turn_of, turns=turns, warmups=1, seed=seed)


class Contestants:
    """The same clients two ways, over one frozen base on a device."""

    def __init__(self, case: Case, device: torch.device, *, seed: int) -> None:
        network = build_network("encoder", case.shape, batch=1, seed=seed)
        adapter = set(map(id, adapter_parameters(network.model).values()))
        for tensor in [*network.model.parameters(), *network.model.buffers()]:
            if id(tensor) not in adapter and tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16)
        self._model: nn.Module = network.model.to(device)
        self._device = device
        self._clients = shares(case, seed=seed)
        # No noise to speak of: the check would see nothing else.
        mechanism = Mechanism(noise_multiplier=1e-3, max_grad_norm=1e-2, sample_rate=1.0, divisor=1.0)
        training = LocalTraining(
            num_steps=1,
            optimizer=partial(torch.optim.SGD, lr=1.0),
            token_budget=case.token_budget,
            divisor=1.0,
            sampler=PoissonSampler(1.0),
        )
        self._steps: dict[str, Any] = {
            "training": training,
            "mechanism": mechanism,
            "randomness": SeededRandomness(seed),
        }
        self._fused = FusedGradients(self._model, train_only(self._model, BLOCK), loss=class_losses)
        self._start = {slot: p.detach().clone() for slot, p in train_only(self._model, BLOCK).items()}
        self._hooked = sharing_base(self._model)
        self._trained = train_only(self._hooked, BLOCK)
        self._hooks = HookGradients(self._hooked, self._trained, loss=class_losses)
        self._threads = ThreadPoolExecutor(1)

    def together(self, turn: int) -> list[dict[Slot, Tensor]]:
        """Take one step of every client in joint micro-batches; return their adapters' changes."""
        stack = Stack.of([self._start] * len(self._clients), device=self._device)
        ids = range(len(self._clients))
        train_cohort(
            self._fused.clipped_sums,
            self._threads,
            stack,
            self._clients,
            client_ids=ids,
            round_index=turn,
            **self._steps,
        )
        self._wait()
        return [self._moved(stack.tensors(place)) for place in ids]

    def one_by_one(self, turn: int) -> list[dict[Slot, Tensor]]:
        """Take one step of every client, one after the other, with Opacus hooks; return their adapters' changes."""
        found = []
        for client, share in enumerate(self._clients):
            with torch.no_grad():
                for slot, parameter in self._trained.items():
                    parameter.copy_(self._start[slot])
            train_client(
                self._hooked,
                self._hooks,
                share,
                client_id=client,
                round_index=turn,
                trained=self._trained,
                **self._steps,
            )
            found.append(self._moved({slot: p.detach().clone() for slot, p in self._trained.items()}))
        self._wait()
        return found

    def _moved(self, tensors: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        return {slot: tensor - self._start[slot] for slot, tensor in tensors.items()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def shares(case: Case, *, seed: int) -> Sequence[Share]:
    """Return clients with `batch` random examples each, all of the same length: rows of one table."""
    generator = np.random.default_rng(seed)
    rows, length = case.num_clients * case.batch, case.shape.tokens
    table = TokenisedText(
        ids=generator.integers(5, case.shape.vocabulary, rows * length).astype(np.int32),
        offsets=np.arange(rows + 1, dtype=np.int64) * length,
        labels=generator.integers(0, 2, rows),
        pad_id=0,
        num_truncated=0,
    )
    return [Share(table, np.arange(case.batch) + case.batch * client) for client in range(case.num_clients)]


def flops_a_token(shape: Shape) -> float:
    """Return the floating-point operations of one token in the frozen linear layers, forward and backward."""
    weights_a_layer = 4 * shape.hidden**2 + 2 * shape.hidden * 4 * shape.hidden
    return 4.0 * weights_a_layer * shape.layers


def matrix_rate(device: torch.device, size: int) -> float:
    """Return the floating-point operations a second of a large bf16 matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best
