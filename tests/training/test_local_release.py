"""A step is atomic, uses noised gradients only, and says nothing else: R-P4, R-P10, R-P12, R-A4.

Mutants this file kills: an accumulator that survives an aborted step; raw `p.grad` that reaches the
optimizer; an optimizer kept from one round to the next; a return value, a log line, a stream or a number of
releases that depends on the data; a sum that moves by more than C.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.models.peft_state import read_adapter
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.streams import SeededRandomness
from fedlr.tasks.losses import LossOfLogits, cross_entropy
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training import gradients as shipped_engines
from fedlr.training import local as shipped
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from tests.training.local_runs import BOUND, DIVISOR, Bench
from tests.training.small_models import (
    B_AND_HEAD,
    MAX_TOKENS,
    among_others,
    client_data,
    difference,
    joint_norm,
    mutant,
    random_rows,
)

QUIET = Mechanism(0.0, BOUND, 1.0, DIVISOR)
NUM_ROWS = 8


class Abort(Exception):
    """Stands for a signal, a time limit or an out-of-memory error."""


@contextmanager
def aborting(bench: Bench, micro_batch: int, where: str) -> Iterator[None]:
    """Raise in the given micro-batch, in the forward or the backward pass of a layer."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > micro_batch:
            raise Abort

    layers = bench.engine._model.base_model.model.bert.encoder.layer  # the fused engine has modules of its own
    handle = (
        layers[1].register_forward_hook(hook) if where == "forward" else layers[0].register_full_backward_hook(hook)
    )
    try:
        yield
    finally:
        handle.remove()


def check_an_aborted_step_leaves_nothing(local: ModuleType, bench: Bench, *, micro_batch: int, where: str) -> None:
    """Cut a step off; the next one is as if it had never begun, and within what its rows may move."""
    data = client_data(random_rows(NUM_ROWS, seed=1, num_tokens=5))
    run = partial(bench.releases, local, data, mechanism=QUIET, token_budget=1)
    (fresh,) = run()
    with aborting(bench, micro_batch, where), pytest.raises(Abort):
        run(lr=1.0)
    for slot, parameter in bench.trained.items():
        assert torch.equal(parameter.detach(), bench.start.tensors[slot])
        assert parameter.grad is None
    (again,) = run()
    assert torch.equal(again, fresh)
    assert float(again.norm()) * DIVISOR <= NUM_ROWS * BOUND * (1 + 1e-5)


@pytest.fixture(scope="module", params=[HookGradients, GhostGradients, FusedGradients], ids=lambda e: e.__name__)
def engine_bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(make_engine=request.param, block=B_AND_HEAD)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batch", range(NUM_ROWS))
def test_an_aborted_step_leaves_nothing(micro_batch: int, where: str, engine_bench: Bench) -> None:
    check_an_aborted_step_leaves_nothing(shipped, engine_bench, micro_batch=micro_batch, where=where)


KEEPS_ITS_SUM = (
    "    total = {slot: torch.zeros_like(trained[slot], dtype=torch.float32) for slot in sorted(trained)}\n",
    "    total = KEPT.setdefault('sum', {})\n"
    "    total.update({s: total.get(s, torch.zeros_like(trained[s])) for s in sorted(trained)})\n",
)


@pytest.mark.parametrize("micro_batch", [1, NUM_ROWS - 1])
def test_an_accumulator_that_survives_is_caught(micro_batch: int, engine_bench: Bench) -> None:
    local = mutant(shipped, KEEPS_ITS_SUM, ("    return total\n", "    KEPT.clear()\n    return total\n"))
    local.KEPT = {}
    with pytest.raises(AssertionError):
        check_an_aborted_step_leaves_nothing(local, engine_bench, micro_batch=micro_batch, where="forward")


def test_a_step_aborted_in_a_later_step_keeps_the_finished_ones(engine_bench: Bench) -> None:
    data = client_data(random_rows(NUM_ROWS, seed=1, num_tokens=5))
    (release,) = engine_bench.releases(shipped, data, token_budget=1, lr=1.0)
    with aborting(engine_bench, NUM_ROWS + 3, "forward"), pytest.raises(Abort):
        engine_bench.releases(shipped, data, token_budget=1, lr=1.0, num_steps=2)
    moved = [(engine_bench.start.tensors[slot] - p.detach()).flatten() for slot, p in engine_bench.trained.items()]
    torch.testing.assert_close(torch.cat(moved), release, rtol=1e-4, atol=1e-6)


SENTINEL = 1e6


def check_raw_gradients_never_arrive(local: ModuleType, engine: Callable) -> None:
    """Overwrite p.grad whenever a backward pass fills it: no release changes, and nothing stays behind."""
    data = client_data(random_rows(5, seed=2))
    bench = Bench(make_engine=engine)
    expected = bench.releases(local, data, num_steps=2, lr=0.1, token_budget=12)

    def poison(parameter: nn.Parameter) -> None:
        parameter.grad.fill_(SENTINEL)

    handles = [p.register_post_accumulate_grad_hook(poison) for p in bench.trained.values()]
    got = bench.releases(local, data, num_steps=2, lr=0.1, token_budget=12)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert torch.stack(got).abs().max() < SENTINEL / 1e3
    for parameter in bench.model.parameters():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
        assert not hasattr(parameter, "_norm_sample")


@pytest.mark.parametrize("engine", [HookGradients, GhostGradients, LoopGradients, FusedGradients])
def test_raw_gradients_never_reach_the_update(engine: Callable) -> None:
    check_raw_gradients_never_arrive(shipped, engine)


def test_raw_gradients_that_reach_the_update_are_caught() -> None:
    engines = mutant(shipped_engines, ("        parameter.grad = None\n", ""))
    local = mutant(
        shipped,
        (
            "parameter.grad = gradient[slot].to(parameter.dtype)",
            "parameter.grad = gradient[slot] + (0 if parameter.grad is None else parameter.grad)",
        ),
    )
    with pytest.raises(AssertionError):
        check_raw_gradients_never_arrive(local, engines.HookGradients)


def test_gradients_that_stay_behind_are_caught() -> None:
    engines = mutant(shipped_engines, ("parameter.grad_sample, parameter._forward_counter = None, 0", "pass"))
    with pytest.raises((AssertionError, ValueError)):
        check_raw_gradients_never_arrive(shipped, engines.HookGradients)


ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)


def two_rounds(local: ModuleType, optimizer: Callable, *, rebuild: bool) -> dict:
    """Train rounds 0 and 1; between them go on, or move only the adapter into new objects."""
    data = client_data(random_rows(6, seed=3))
    training = shipped.LocalTraining(2, optimizer, token_budget=64, divisor=DIVISOR, sampler=PoissonSampler(0.6))
    bench = Bench()
    for round_index in range(2):
        if rebuild and round_index == 1:
            values = read_adapter(bench.model)
            bench = Bench()
            bench.start = values
            bench.reset()
        local.train_client(
            bench.model,
            bench.engine,
            among_others(data),
            training=training,
            mechanism=Mechanism(1.0, BOUND, 0.6, DIVISOR),
            randomness=SeededRandomness(1),
            client_id=2,
            round_index=round_index,
            trained=bench.trained,
        )
    return {slot: p.detach().clone() for slot, p in bench.trained.items()}


def check_rounds_share_only_the_adapter(local: ModuleType, optimizer: Callable) -> None:
    going_on, rebuilt = (two_rounds(local, optimizer, rebuild=rebuild) for rebuild in (False, True))
    assert all(torch.equal(going_on[slot], rebuilt[slot]) for slot in rebuilt)


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_optimizer_state_does_not_outlive_a_round(optimizer: Callable) -> None:
    check_rounds_share_only_the_adapter(shipped, optimizer)


def test_an_optimizer_that_is_kept_is_caught() -> None:
    kept = mutant(
        shipped,
        (
            "optimizer = training.optimizer_of(list(trained.values()), round_index=round_index)",
            "optimizer = KEPT.setdefault(id(model), training.optimizer(list(trained.values())))",
        ),
    )
    kept.KEPT = {}
    with pytest.raises(AssertionError):
        check_rounds_share_only_the_adapter(kept, MOMENTUM)


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_the_update_is_the_optimizer_applied_to_the_releases_alone(optimizer: Callable) -> None:
    bench = Bench()
    released: list[dict] = []

    class Keeping(optimizer.func):
        def step(self) -> None:
            released.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            super().step()

    training = shipped.LocalTraining(
        3,
        partial(Keeping, **optimizer.keywords),
        token_budget=64,
        divisor=DIVISOR,
        sampler=PoissonSampler(0.5),
    )
    shipped.train_client(
        bench.model,
        bench.engine,
        among_others(client_data(random_rows(6, seed=3))),
        training=training,
        mechanism=Mechanism(1.0, BOUND, 0.5, DIVISOR),
        randomness=SeededRandomness(1),
        client_id=0,
        round_index=0,
        trained=bench.trained,
    )
    alone = [nn.Parameter(bench.start.tensors[slot].clone()) for slot in bench.trained]
    replayed = optimizer(alone)
    for gradients in released:
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient
        replayed.step()
    assert all(torch.equal(a, p) for a, p in zip(alone, bench.trained.values(), strict=True))


class Tape:
    """Freezes the mechanism: the first run records what it releases, the second releases the same again."""

    def __init__(self) -> None:
        self.sums: list[list[dict]] = []
        self.releases: list[dict] = []

    @contextmanager
    def running(self, local: ModuleType) -> Iterator[None]:
        mechanism, self.step = local.privatise, 0
        self.sums.append([])

        def frozen(total: dict, **arguments: object) -> dict:
            self.sums[-1].append({slot: value.clone() for slot, value in total.items()})
            if len(self.sums) == 1:
                self.releases.append(mechanism(total, **arguments))
            self.step += 1
            return {slot: value.clone() for slot, value in self.releases[self.step - 1].items()}

        local.privatise = frozen
        try:
            yield
        finally:
            local.privatise = mechanism


class ListedRandomness(SeededRandomness):
    """Lists which streams are asked for."""

    def __init__(self, seed: int, asked: list) -> None:
        super().__init__(seed)
        object.__setattr__(self, "asked", asked)

    def sampling(self, **key: int) -> np.random.Generator:
        self.asked.append(("sampling", *key.items()))
        return super().sampling(**key)

    def noise(self, **key: int) -> np.random.Generator:
        self.asked.append(("noise", *key.items()))
        return super().noise(**key)


class Printed(logging.Handler):
    """Keeps every log line of every library."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def everything_else(local: ModuleType, bench: Bench, data: TokenisedText, tape: Tape, sample_rate: float) -> dict:
    """Run a client against the tape and return all that leaves besides the releases themselves."""
    asked: list = []
    printed = Printed()
    logging.getLogger().addHandler(printed)
    try:
        with tape.running(local):
            kept = bench.releases(
                local,
                data,
                num_steps=2,
                sample_rate=sample_rate,
                lr=0.5,
                randomness=ListedRandomness(9, asked),
            )
    finally:
        logging.getLogger().removeHandler(printed)
    return {
        "steps returned": bench.num_steps,
        "streams": asked,
        "log": printed.lines,
        "sums": [[(s, v.dtype, v.shape) for s, v in total.items()] for total in tape.sums[-1]],
        "given to the optimizer": [g.tolist() for g in kept],
        "model": {name: value.tolist() for name, value in bench.model.named_parameters() if value.requires_grad},
        "buffers": {name: value.tolist() for name, value in bench.model.named_buffers()},
        "generators": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "left on parameters": [(p.grad, getattr(p, "grad_sample", None)) for p in bench.trained.values()],
    }


BAD_LABEL = 2


def sometimes_nan(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the rows of one class a loss of nan."""
    return cross_entropy(logits, labels) * torch.where(labels == BAD_LABEL, float("nan"), 1.0)


def neighbours(seed: int) -> tuple[TokenisedText, TokenisedText]:
    """Return data and the same data without the last row: the coins of the others stay as they were."""
    generator = np.random.default_rng(seed)
    num_rows = int(generator.choice([1, 1, 2, 5, 8]))
    rows = random_rows(num_rows, seed=seed)
    rows[-1] = rows[-1] * int(generator.integers(1, 5))
    labels = generator.choice([0, 1, BAD_LABEL, -100], size=num_rows, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    return client_data(rows, labels), client_data(rows[:-1], labels[:-1])


def check_only_the_release_depends_on_the_data(
    local: ModuleType, bench: Bench, capfd: pytest.CaptureFixture[str], *, num_pairs: int
) -> None:
    distances = []
    for seed in range(num_pairs):
        tape, sample_rate = Tape(), 1.0 if seed % 2 else 0.5
        capfd.readouterr()
        left = everything_else(local, bench, neighbours(seed)[0], tape, sample_rate), capfd.readouterr()
        right = everything_else(local, bench, neighbours(seed)[1], tape, sample_rate), capfd.readouterr()
        assert left == right
        for one, other in zip(*tape.sums, strict=True):
            distances.append(joint_norm(difference(one, other)))
    assert max(distances) <= BOUND * (1 + 1e-5)
    # The pairs are worth something: removed rows do count, up to the bound.
    assert max(distances) > 0.99 * BOUND


@pytest.fixture(scope="module")
def nan_bench() -> Bench:
    return Bench(loss=LossOfLogits(sometimes_nan))


def test_only_the_release_depends_on_the_data(nan_bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    assert MAX_TOKENS * 4 < 64
    check_only_the_release_depends_on_the_data(shipped, nan_bench, capfd, num_pairs=100)


LEAKS = {
    "steps returned": [("return training.num_steps", "return len(rows)")],
    "a divisor": [("value / training.divisor", "value / max(1, len(data.labels))")],
    "a line printed": [("        total = sum_over(", "        print(len(rows))\n        total = sum_over(")],
    "a line logged": [
        ("import math\n", "import logging\nimport math\n"),
        ("        total = sum_over(", "        logging.warning('%d', len(rows))\n        total = sum_over("),
    ],
    "a step skipped": [
        (
            "        total = sum_over(",
            "        if len(rows) == 0:\n            continue\n        total = sum_over(",
        )
    ],
    "a stream": [('"step": step}', '"step": step + 100 * len(data.labels)}')],
    "an early stop": [
        (
            "        apply(optimizer, trained, gradient)\n",
            "        apply(optimizer, trained, gradient)\n        if len(rows) < 2: break\n",
        )
    ],
    "a learning rate": [("value / training.divisor", "value / training.divisor * (1 + 0.1 * len(rows))")],
    "a global seed": [("        total = sum_over(", "        torch.rand(len(rows))\n        total = sum_over(")],
    "twice the bound": [("else mechanism.max_grad_norm", "else 2 * mechanism.max_grad_norm")],
}


@pytest.mark.parametrize("name", LEAKS)
def test_whatever_else_depends_on_the_data_is_caught(
    name: str, nan_bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        check_only_the_release_depends_on_the_data(mutant(shipped, *LEAKS[name]), nan_bench, capfd, num_pairs=12)
