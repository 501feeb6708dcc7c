"""A cohort's step is atomic, uses noised gradients only, and says nothing else: R-P4, R-P10, R-P12, R-A4.

Mutants this file kills: an accumulator that survives an aborted step; an error that is swallowed; an optimizer kept
from one round to the next; a return value, a log line, a stream or a number of releases that depends on the data; a sum
that moves by more than C, or with another client's rows; a clip of all clients together; a loss averaged over the
micro-batch; NaN that passes from row to row.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlr.privacy.mechanism import Mechanism
from fedlr.streams import SeededRandomness
from fedlr.tasks.losses import LossOfLogits, cross_entropy
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training import cohort as shipped
from fedlr.training.fused import ClippedSums
from tests.training.cohort_runs import CohortBench, engine_over, flat
from tests.training.local_runs import BOUND, DIVISOR
from tests.training.small_models import B_AND_HEAD, client_data, mutant, random_rows

QUIET = Mechanism(0.0, BOUND, 1.0, DIVISOR)
TOTAL = "        total = sum_over_cohort("


class Abort(Exception):
    """Stands for a signal, a time limit or an out-of-memory error."""


@contextmanager
def aborting(bench: CohortBench, micro_batch: int, where: str) -> Iterator[None]:
    """Raise in the given micro-batch: before it is computed, in its forward or in its backward pass, or after it."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > micro_batch:
            raise Abort

    layers = bench.engines[0]._model.base_model.model.bert.encoder.layer
    sums = bench.sums

    def failing(*arguments: object, **named: object) -> ClippedSums:
        if where == "before":
            hook()
        found = sums(*arguments, **named)
        if where == "after":
            hook()
        return found

    bench.sums = failing
    handles = []
    if where == "forward":
        handles = [layers[1].register_forward_hook(hook)]
    if where == "backward":
        handles = [layers[0].register_full_backward_hook(hook)]
    try:
        yield
    finally:
        bench.sums = sums
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def bench() -> CohortBench:
    return CohortBench(block=B_AND_HEAD)


CLIENTS = [client_data(random_rows(number, seed=number, num_tokens=5)) for number in (3, 1, 4)]
NUM_ROWS = 8


def check_an_aborted_step_leaves_nothing(cohort: ModuleType, bench: CohortBench, micro_batch: int, where: str) -> None:
    """Cut a step off; no client has moved, and the next step is as if it had never begun."""
    run = partial(bench.releases, cohort, CLIENTS, mechanism=QUIET, token_budget=1)
    (fresh,) = run()
    with aborting(bench, micro_batch, where), pytest.raises(Abort):
        run(lr=1.0)
    assert torch.equal(bench.stack.theta, flat(bench.start).expand_as(bench.stack.theta))
    assert all(p.grad is None for p in bench.model.parameters())
    shared = bench.engines[0]._shared
    assert (shared.owner, shared.ranks, dict(shared.values), shared.found) == (None, None, {}, {})
    (again,) = run()
    assert torch.equal(again, fresh)
    for client, data in enumerate(CLIENTS):
        assert float(again[client].norm()) * DIVISOR <= len(data) * BOUND * (1 + 1e-5)


@pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
@pytest.mark.parametrize("micro_batch", [0, 1, 4, NUM_ROWS - 1])
def test_an_aborted_step_leaves_nothing(micro_batch: int, where: str, bench: CohortBench) -> None:
    check_an_aborted_step_leaves_nothing(shipped, bench, micro_batch, where)


KEEPS_ITS_SUM = (
    "    total = torch.zeros_like(stack.theta)\n",
    "    total = KEPT.setdefault('sum', torch.zeros_like(stack.theta))\n",
)


@pytest.mark.parametrize("micro_batch", [1, NUM_ROWS - 1])
def test_an_accumulator_that_survives_is_caught(micro_batch: int, bench: CohortBench) -> None:
    cohort = mutant(shipped, KEEPS_ITS_SUM, ("    return total\n", "    KEPT.clear()\n    return total\n"))
    cohort.KEPT = {}
    with pytest.raises(AssertionError):
        check_an_aborted_step_leaves_nothing(cohort, bench, micro_batch, "before")


def test_a_failure_that_is_swallowed_is_caught(bench: CohortBench) -> None:
    quiet = mutant(
        shipped,
        ("            found = waiting.popleft().result()\n", "            found = waiting.popleft()\n"),
        ("            yield found\n", "            yield from survivors(found)\n"),
        (
            "def check_elementwise",
            "def survivors(f):\n    if f.exception() is None: yield f.result()\n\n\ndef check_elementwise",
        ),
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_an_aborted_step_leaves_nothing(quiet, bench, 1, "before")


def test_a_step_aborted_in_a_later_step_keeps_the_finished_ones(bench: CohortBench) -> None:
    (release,) = bench.releases(shipped, CLIENTS, token_budget=1, lr=1.0)
    with aborting(bench, NUM_ROWS + 3, "forward"), pytest.raises(Abort):
        bench.releases(shipped, CLIENTS, token_budget=1, lr=1.0, num_steps=2)
    torch.testing.assert_close(flat(bench.start) - bench.stack.theta, release, rtol=1e-4, atol=1e-6)


def test_a_failure_on_one_of_several_threads_is_raised_and_waits_for_the_others() -> None:
    bench = CohortBench(num_workers=3)
    fresh = bench.releases(shipped, CLIENTS, token_budget=1)
    with aborting(bench, 2, "before"), pytest.raises(Abort):
        bench.releases(shipped, CLIENTS, token_budget=1, lr=1.0)
    # `releases` has found no thread alive; every engine is free and clean again.
    again = bench.releases(shipped, CLIENTS, token_budget=1)
    assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))


ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)


def check_rounds_share_only_the_adapter(cohort: ModuleType, optimizer: Callable) -> None:
    """Two rounds of one cohort are the same when every object but the values of the adapter is new."""
    ends = []
    for rebuild in (False, True):
        bench, starts = CohortBench(), None
        for round_index in range(2):
            if rebuild and round_index == 1:
                bench = CohortBench()
            run = {"num_steps": 2, "sample_rate": 0.6, "round_index": round_index, "optimizer": optimizer}
            bench.releases(cohort, CLIENTS, starts=starts, **run)
            starts = [bench.stack.tensors(client) for client in range(len(CLIENTS))]
        ends.append(bench.stack.theta)
    assert torch.equal(*ends)


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_optimizer_state_does_not_outlive_a_round(optimizer: Callable) -> None:
    check_rounds_share_only_the_adapter(shipped, optimizer)


def test_an_optimizer_that_is_kept_is_caught() -> None:
    kept = mutant(
        shipped,
        (
            "optimizer = training.optimizer_of([theta], round_index=round_index)",
            "optimizer = KEPT.setdefault(id(sums), training.optimizer([theta]))\n"
            "    optimizer.state[theta] = optimizer.state.pop(optimizer.param_groups[0]['params'][0], {})\n"
            "    optimizer.param_groups[0]['params'] = [theta]",
        ),
    )
    kept.KEPT = {}
    with pytest.raises(AssertionError):
        check_rounds_share_only_the_adapter(kept, MOMENTUM)


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_the_update_is_the_optimizer_applied_to_the_releases_alone(optimizer: Callable) -> None:
    bench = CohortBench()
    released: list[Tensor] = []

    class Keeping(optimizer.func):
        def step(self) -> None:
            released.append(self.param_groups[0]["params"][0].grad.clone())
            super().step()

    keeping = partial(Keeping, **optimizer.keywords)
    bench.releases(shipped, CLIENTS, num_steps=3, sample_rate=0.5, optimizer=keeping)
    alone = nn.Parameter(flat(bench.start).repeat(len(CLIENTS), 1))
    replayed = optimizer([alone])
    for gradient in released:
        alone.grad = gradient
        replayed.step()
    assert torch.equal(alone, bench.stack.theta)


class Tape:
    """Freezes the mechanism: the first run records what it releases, the second releases the same again."""

    def __init__(self) -> None:
        self.sums: list[list[Tensor]] = []
        self.releases: list[Tensor] = []

    @contextmanager
    def running(self, cohort: ModuleType) -> Iterator[None]:
        mechanism, self.step = cohort.privatise_rows, 0
        self.sums.append([])

        def frozen(total: Tensor, stack: object, **arguments: object) -> None:
            self.sums[-1].append(total.clone())
            if len(self.sums) == 1:
                mechanism(total, stack, **arguments)
                self.releases.append(total.clone())
            self.step += 1
            total.copy_(self.releases[self.step - 1])

        cohort.privatise_rows = frozen
        try:
            yield
        finally:
            cohort.privatise_rows = mechanism


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


def everything_else(
    cohort: ModuleType, bench: CohortBench, clients: Sequence[TokenisedText], tape: Tape, sample_rate: float
) -> dict:
    """Train clients against the tape and return all that leaves besides the releases themselves."""
    asked: list = []
    printed = Printed()
    logging.getLogger().addHandler(printed)
    try:
        with tape.running(cohort):
            run = {"num_steps": 2, "sample_rate": sample_rate, "lr": 0.5, "randomness": ListedRandomness(9, asked)}
            kept = bench.releases(cohort, clients, **run)
    finally:
        logging.getLogger().removeHandler(printed)
    return {
        "steps returned": bench.num_steps,
        "streams": asked,
        "log": printed.lines,
        "sums": [(total.dtype, total.shape) for total in tape.sums[-1]],
        "given to the optimizer": [g.tolist() for g in kept],
        "clients": bench.stack.theta.tolist(),
        "model": {name: value.tolist() for name, value in bench.model.state_dict().items()},
        "generators": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "left on parameters": [p.grad for p in bench.model.parameters()],
    }


BAD_LABEL = 2


def sometimes_nan(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the rows of one class a loss of nan."""
    return cross_entropy(logits, labels) * torch.where(labels == BAD_LABEL, float("nan"), 1.0)


def neighbours(seed: int) -> tuple[list[TokenisedText], list[TokenisedText], int]:
    """Return the data of three clients, the same without the last row of one, and which one."""
    generator = np.random.default_rng(seed)
    rows, labels = [], []
    for _ in range(3):
        num_rows = int(generator.choice([1, 1, 2, 5]))
        rows.append(random_rows(num_rows, seed=int(generator.integers(2**31))))
        labels.append(generator.choice([0, 1, BAD_LABEL, -100], size=num_rows, p=[0.4, 0.3, 0.2, 0.1]).tolist())
    changed = int(generator.integers(3))
    rows[changed][-1] = rows[changed][-1] * int(generator.integers(1, 5))
    before = [client_data(mine, of) for mine, of in zip(rows, labels, strict=True)]
    fewer = client_data(rows[changed][:-1], labels[changed][:-1])
    return before, [fewer if client == changed else data for client, data in enumerate(before)], changed


def check_only_the_release_depends_on_the_data(
    cohort: ModuleType, bench: CohortBench, capfd: pytest.CaptureFixture[str], *, num_pairs: int
) -> None:
    own, others = [], []
    for seed in range(num_pairs):
        tape, sample_rate = Tape(), 1.0 if seed % 2 else 0.5
        before, after, changed = neighbours(seed)
        capfd.readouterr()
        left = everything_else(cohort, bench, before, tape, sample_rate), capfd.readouterr()
        right = everything_else(cohort, bench, after, tape, sample_rate), capfd.readouterr()
        same = left == right  # not in the assert: pytest would compare thousands of numbers line by line
        assert same
        for one, other in zip(*tape.sums, strict=True):
            moved = (one.double() - other.double()).norm(dim=1)
            own.append(float(moved[changed]))
            others += [float(moved[client]) for client in range(len(moved)) if client != changed]
    assert max(own) <= BOUND * (1 + 1e-5)
    # Another width of padding rounds otherwise: measured at most 2e-6 of C.
    assert max(others) <= BOUND * 1e-5
    # The pairs are worth something: removed rows do count, up to the bound.
    assert max(own) > 0.99 * BOUND


@pytest.fixture(scope="module")
def nan_bench() -> CohortBench:
    return CohortBench(loss=LossOfLogits(sometimes_nan))


def test_only_the_release_depends_on_the_data(nan_bench: CohortBench, capfd: pytest.CaptureFixture[str]) -> None:
    check_only_the_release_depends_on_the_data(shipped, nan_bench, capfd, num_pairs=40)


DIVIDED = "total.div_(training.divisor)"
LEAKS = {
    "steps returned": [("return training.num_steps", "return sum(map(len, drawn))")],
    "a divisor": [(DIVIDED, "total.div_(max(1, sum(map(len, drawn))))")],
    "a line printed": [(TOTAL, f"        print(len(drawn[0]), len(drawn[1]), len(drawn[2]))\n{TOTAL}")],
    "a line logged": [
        ("import math\n", "import logging\nimport math\n"),
        (TOTAL, f"        logging.warning('%s', [len(mine) for mine in drawn])\n{TOTAL}"),
    ],
    "a step skipped": [(TOTAL, f"        if not all(map(len, drawn)):\n            continue\n{TOTAL}")],
    "a stream": [('"step": step}', '"step": step + 100 * sum(map(len, shares))}')],
    "an early stop": [
        ("        optimizer.step()\n", "        optimizer.step()\n        if sum(map(len, drawn)) < 4: break\n")
    ],
    "a learning rate": [(DIVIDED, "total.div_(training.divisor + len(drawn[0]) + len(drawn[1]) + len(drawn[2]))")],
    "a global seed": [(TOTAL, f"        torch.rand(sum(map(len, drawn)))\n{TOTAL}")],
    "twice the bound": [("else mechanism.max_grad_norm", "else 2 * mechanism.max_grad_norm")],
    "rows of all clients": [
        ("        found.add_to(total)", "        total += found.values.sum(dim=0)"),
    ],
    "a clip of the cohort": [
        ("    return total\n", "    return total * min(1.0, 0.5 / float(total.norm().clamp(min=1e-9)))\n"),
    ],
}


@pytest.mark.parametrize("name", LEAKS)
def test_whatever_else_depends_on_the_data_is_caught(
    name: str, nan_bench: CohortBench, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        check_only_the_release_depends_on_the_data(mutant(shipped, *LEAKS[name]), nan_bench, capfd, num_pairs=10)


BROKEN_LAYERS = {
    "no guard against nan": ("        self.values.masked_fill_(silent[:, None], 0.0)  # 0 * nan is nan\n", ""),
}


@pytest.mark.parametrize("name", BROKEN_LAYERS)
def test_an_engine_whose_rows_meet_is_caught(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    broken = CohortBench(loss=LossOfLogits(sometimes_nan), engine=engine_over(BROKEN_LAYERS[name]))
    with pytest.raises(AssertionError):
        check_only_the_release_depends_on_the_data(shipped, broken, capfd, num_pairs=10)


def batch_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels) / len(labels)


def test_a_mean_over_the_micro_batch_is_caught(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        check_only_the_release_depends_on_the_data(
            shipped, CohortBench(loss=LossOfLogits(batch_mean)), capfd, num_pairs=10
        )
