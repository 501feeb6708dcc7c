"""What the tests of cohort training share: clients of one table that train together, with every release kept.

A check takes the module under test, `fedlr.training.cohort` or a mutant of it; a release is what a step hands to its
optimizer, one row a client.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from fedlr.adapters.state import Block, Slot
from fedlr.models.peft_state import read_adapter, train_only
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training import cohort as shipped
from fedlr.training import fused, stacked
from fedlr.training.fused import ClippedSums, FusedGradients
from fedlr.training.local import LocalTraining
from tests.training.local_runs import BOUND, DIVISOR, SIGMA, KeepingSGD
from tests.training.small_models import A_AND_B, client_data, mutant, small_model

Rows = Sequence[tuple[list[int], int]]  # tokens and label


def dealt(clients: Sequence[TokenisedText]) -> list[Share]:
    """Deal the clients' rows to one table in turns, with rows of nobody between them."""
    places: list[list[int]] = [[] for _ in clients]
    rows: list[list[int]] = []
    labels: list[int] = []
    for index in range(max(map(len, clients), default=0)):
        for client, data in enumerate(clients):
            if index < len(data):
                places[client].append(len(rows))
                rows.append(data.ids[data.offsets[index] : data.offsets[index + 1]].tolist())
                labels.append(int(data.labels[index]))
        rows.append([4, 4])
        labels.append(0)
    table = client_data(rows, labels)
    return [Share(table, np.array(mine, dtype=np.int64)) for mine in places]


def engine_over(*changes: tuple[str, str]) -> type[FusedGradients]:
    """Return the fused engine over layers whose source has these texts changed."""
    layers, engine = mutant(stacked, *changes), mutant(fused)
    for name in ("Pass", "StackedLinear", "StackedLora"):
        setattr(engine, name, getattr(layers, name))
    return engine.FusedGradients


class Engines:
    """A `FusedSums`: hands each micro-batch to an engine that is free."""

    def __init__(self, engines: Sequence[FusedGradients]) -> None:
        self._free: SimpleQueue[FusedGradients] = SimpleQueue()
        for engine in engines:
            self._free.put(engine)

    def __call__(self, *arguments: object, **named: object) -> ClippedSums:
        engine = self._free.get()
        try:
            return engine.clipped_sums(*arguments, **named)
        finally:
            self._free.put(engine)


@contextmanager
def worker_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads as a pool has them: each computes alone."""
    with ThreadPoolExecutor(number, "rows", initializer=lambda: torch.set_num_threads(1)) as threads:
        yield threads


@dataclass
class CohortBench:
    """A small model with its fused engines; every run starts from the same adapter."""

    block: Block = A_AND_B
    architecture: str = "bert"
    loss: Callable = class_losses
    engine: type[FusedGradients] = FusedGradients
    num_workers: int = 1
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = small_model(self.architecture)
        trained = train_only(self.model, self.block)
        self.start = read_adapter(self.model).select(self.block)
        self.engines = [self.engine(self.model, trained, loss=self.loss) for _ in range(self.num_workers)]
        self.sums: Callable = Engines(self.engines)

    def releases(
        self,
        cohort: ModuleType,
        clients: Sequence[TokenisedText] | Sequence[Share],
        *,
        num_steps: int = 1,
        sample_rate: float = 1.0,
        token_budget: int = 64,
        client_ids: Sequence[int] | None = None,
        round_index: int = 0,
        seed: int = 11,
        lr: float = 0.0,
        optimizer: Callable | None = None,
        mechanism: Mechanism | None | str = "default",
        randomness: object = None,
        starts: Sequence[dict[Slot, Tensor]] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Train the clients together and return what each of their steps released, (C, V) each."""
        kept: list[Tensor] = []
        training = LocalTraining(
            num_steps=num_steps,
            optimizer=optimizer or (lambda parameters: KeepingSGD(parameters, kept=kept, lr=lr)),
            token_budget=token_budget,
            divisor=DIVISOR,
            sampler=PoissonSampler(sample_rate),
        )
        if mechanism == "default":
            mechanism = Mechanism(SIGMA, BOUND, sample_rate, DIVISOR)
        self.stack = shipped.Stack.of(starts or [self.start] * len(clients), ranks=ranks)
        before = set(threading.enumerate())
        with worker_threads(self.num_workers) as threads:
            self.num_steps = cohort.train_cohort(
                self.sums,
                threads,
                self.stack,
                clients if isinstance(clients[0], Share) else dealt(clients),
                training=training,
                mechanism=mechanism,
                randomness=randomness or SeededRandomness(seed),
                client_ids=list(range(len(clients)) if client_ids is None else client_ids),
                round_index=round_index,
            )
        assert not set(threading.enumerate()) - before
        return [release.view_as(self.stack.theta) for release in kept]


def flat(tensors: dict[Slot, Tensor]) -> Tensor:
    """Return a client's tensors as its row of a stack."""
    return torch.cat([tensors[slot].detach().flatten() for slot in sorted(tensors)])
