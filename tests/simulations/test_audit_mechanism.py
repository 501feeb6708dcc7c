"""The mechanism audit passes a federation that does what it says, and fails others (R-A1, R-P1, R-P5, R-P6).

Mutants this file kills, each planted in a federation's own parts: the five of `fedlr.simulations.audit.planted`; noise
of 0.9 of its scale, none in one step of two, none on the last tensor, the same on every tensor, uniform noise; a clip
at 1.1 C; a loss that averages over the batch; batches that are never empty, drawn once for all steps, or of a fixed
size. Every one is found by the kind of check that is meant for it. All numbers come from fixed seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from fedlr.privacy.audit.finding import LEVEL
from fedlr.simulations.audit.mechanism import (
    draw_findings,
    gather_noise,
    mechanism_audit,
    noise_findings,
    sensitivities,
    sensitivity_findings,
)
from fedlr.simulations.audit.planted import PLANTED
from fedlr.simulations.federation import Federation
from fedlr.streams import Randomness
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import federation

NUM_DRAWS = 12_000
Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]


@dataclass
class Drawing:
    """A generator whose normal numbers are something else; it knows how many tensors it has drawn for."""

    generator: np.random.Generator
    draw: Callable[["Drawing", tuple[int, ...]], NDArray[np.float64]]
    num_drawn: int = 0
    first: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def standard_normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        found = self.draw(self, shape)
        self.num_drawn += 1
        return found


@dataclass(frozen=True)
class OtherNoise:
    """Streams whose noise is drawn in another way."""

    randomness: Randomness
    draw: Callable[[Drawing, tuple[int, ...]], NDArray[np.float64]]
    in_step: int | None = None  # None: in all

    def sampling(self, **key: int) -> np.random.Generator:
        return self.randomness.sampling(**key)

    def noise(self, *, client: int, round_index: int, step: int) -> Any:
        generator = self.randomness.noise(client=client, round_index=round_index, step=step)
        return generator if self.in_step not in (None, step) else Drawing(generator, self.draw)


def same_everywhere(drawing: Drawing, shape: tuple[int, ...]) -> NDArray[np.float64]:
    size = int(np.prod(shape))
    if not drawing.first.size:
        drawing.first = drawing.generator.standard_normal(100_000)
    return drawing.first[:size].reshape(shape)


def not_on_the_last(f: Federation) -> Callable[[Drawing, tuple[int, ...]], NDArray[np.float64]]:
    num = len(f.start.adapter.select(f.request().block))
    return lambda drawing, shape: drawing.generator.standard_normal(shape) * (drawing.num_drawn < num - 1)


@dataclass(frozen=True)
class OtherDraws:
    """A sampler that says it draws as another does."""

    sampler: Any
    other: Callable[[Any, int, np.random.Generator], NDArray[np.int64]]

    def draw(self, num_examples: int, generator: np.random.Generator) -> NDArray[np.int64]:
        return self.other(self.sampler, num_examples, generator)

    def dp_event(self, noise_multiplier: float) -> Any:
        return self.sampler.dp_event(noise_multiplier)


def never_empty(sampler: Any, num_examples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    while not len(found := sampler.draw(num_examples, generator)):
        pass
    return found


def once_for_all(sampler: Any, num_examples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return sampler.draw(num_examples, np.random.default_rng(num_examples))


def of_a_fixed_size(sampler: Any, num_examples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(generator.permutation(num_examples)[: round(sampler.sample_rate * num_examples)])


def averaged(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mean(*args: Any, **keywords: Any) -> Tensor:
        losses = loss(*args, **keywords)
        return losses / len(losses)

    return mean


def with_noise(draw: Callable[[Drawing, tuple[int, ...]], Any], in_step: int | None = None) -> Any:
    return lambda f: replace(f, randomness=OtherNoise(f.randomness, draw, in_step))


def with_draws(other: Callable[..., NDArray[np.int64]]) -> Any:
    return lambda f: replace(f, training=replace(f.training, sampler=OtherDraws(f.training.sampler, other)))


NOISE_MUTANTS: dict[str, Callable[[Federation], Federation]] = {
    "off": PLANTED["noise off"],
    "reused": PLANTED["noise reused"],
    "one seed": PLANTED["one seed for all clients"],
    "0.9": lambda f: replace(f, mechanism=replace(f.mechanism, noise_multiplier=0.9 * f.mechanism.noise_multiplier)),
    "not in one step": with_noise(lambda drawing, shape: np.zeros(shape), in_step=1),
    "not on the last tensor": lambda f: with_noise(not_on_the_last(f))(f),
    "the same on all tensors": with_noise(same_everywhere),
    "uniform": with_noise(lambda drawing, shape: drawing.generator.uniform(-(3**0.5), 3**0.5, shape)),
}
CLIP_MUTANTS: dict[str, Callable[[Federation], Federation]] = {
    "doubled": PLANTED["clip doubled"],
    "1.1": lambda f: replace(f, mechanism=replace(f.mechanism, max_grad_norm=1.1 * f.mechanism.max_grad_norm)),
    "rows that meet": lambda f: replace(f, training=replace(f.training, loss=averaged(f.training.loss))),
}
DRAW_MUTANTS: dict[str, Callable[[Federation], Federation]] = {
    "truncated": PLANTED["batch truncated"],
    "never empty": with_draws(never_empty),
    "once for all": with_draws(once_for_all),
    "of a fixed size": with_draws(of_a_fixed_size),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


def noise_of(f: Federation, accounted: Federation) -> list[str]:
    std = accounted.mechanism.noise_multiplier * accounted.mechanism.max_grad_norm
    found = noise_findings(gather_noise(f, num_draws=NUM_DRAWS), std=std)
    return [one.check for one in found if not one.holds]


def clip_of(f: Federation, accounted: Federation) -> list[str]:
    found = sensitivity_findings(f, [*sensitivities(f)], accounted=accounted.mechanism)
    return [one.check for one in found if not one.holds]


def draws_of(f: Federation, accounted: Federation) -> list[str]:
    return [one.check for one in draw_findings(f, accounted=accounted.mechanism) if not one.holds]


@pytest.mark.parametrize("overrides", [(), ("adapter.train_head=true", "method=rolora", "trainer.sample_rate=1.0")])
def test_a_federation_that_does_what_it_says_passes(overrides: tuple[str, ...]) -> None:
    f = federation(*overrides)
    found = mechanism_audit(f, accounted=f.mechanism, num_draws=40_000)
    assert [one for one in found if not one.holds] == []
    by_name = {one.check: one for one in found}
    assert len(by_name) == len(found) == 10
    assert all(one.p_value is None or one.p_value >= LEVEL for one in found)
    assert by_name["noise_scale"].num_draws >= 40_000
    assert by_name["sensitivity"].measured == pytest.approx(1.0, abs=1e-5), "the bound was never reached"
    assert abs(by_name["mu"].measured / by_name["mu"].expected - 1) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hooks", "ghost", "loop"])
def test_clients_that_train_one_by_one_pass(mode: str) -> None:
    f = federation("trainer.engine=opacus", f"trainer.grad_sample_mode={mode}")
    found = mechanism_audit(f, accounted=f.mechanism, num_draws=NUM_DRAWS)
    assert [one for one in found if not one.holds] == []


@pytest.mark.parametrize("name", NOISE_MUTANTS)
def test_other_noise_is_found(name: str) -> None:
    f = federation()
    assert noise_of(NOISE_MUTANTS[name](f), f) != []


@pytest.mark.parametrize("name", CLIP_MUTANTS)
def test_a_sum_that_one_row_moves_further_is_found(name: str) -> None:
    f = federation()
    assert clip_of(CLIP_MUTANTS[name](f), f) == ["sensitivity"]


@pytest.mark.parametrize("name", DRAW_MUTANTS)
def test_other_batches_are_found(name: str) -> None:
    f = federation()
    assert draws_of(DRAW_MUTANTS[name](f), f) != []


def test_a_tensor_that_is_sent_beside_the_noised_steps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: the engine adds a bare number to what it sends."""
    import fedlr.simulations.audit.probe as probe
    from fedlr.simulations.audit.mechanism import sent_finding

    f = federation()
    assert sent_finding(f, accounted=f.mechanism).holds
    answer = probe.Probe.train

    def leaking(self: probe.Probe, *args: Any, **keywords: Any) -> probe.Answer:
        found = answer(self, *args, **keywords)
        return replace(found, sent=[{slot: tensor + 0.1 for slot, tensor in sent.items()} for sent in found.sent])

    monkeypatch.setattr(probe.Probe, "train", leaking)
    assert not sent_finding(f, accounted=f.mechanism).holds
