"""The ideal sum_k p_k B_k A_k of a stream: exact against its dense definition, whatever trained, in bounded memory.

Here are layers that are small enough to stay exact, whatever the cohort; `test_ideal_sketch.py` has the others.

Mutants killed: a weight on both factors; a fold that forgets what was folded before; a stack that is never folded.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fedlr.methods.measure.ideal as shipped
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from tests.training.small_models import mutant

PATHS = ("layer.0", "layer.1")
TRAINED = [(LORA_B,), (LORA_A,), (LORA_A, LORA_B), (HEAD,)]
MANY = tuple(1.0 + k % 5 for k in range(40))  # 40 clients of rank 3: more columns than either layer has rank


def dense(adapter: AdapterState, updates: list[ClientUpdate], path: str) -> Tensor:
    slot_A, slot_B = Slot(path, LORA_A), Slot(path, LORA_B)
    products = (
        u.weight * u.tensors.get(slot_B, adapter.tensors[slot_B]) @ u.tensors.get(slot_A, adapter.tensors[slot_A])
        for u in updates
    )
    return sum(products) / sum(update.weight for update in updates)


def is_exact(module: ModuleType, adapter: AdapterState, updates: list[ClientUpdate]) -> None:
    ideal = module.Ideal.of(adapter, iter(updates))
    for path in PATHS:
        expected, layer = dense(adapter, updates, path), adapter.factors()[path]
        other = LoraFactors(layer.lora_A.flip(0), layer.lora_B)
        right = torch.randn(layer.lora_A.T.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        # Twice: reading an ideal must not change it.
        for _ in range(2):
            assert ideal.norm(path) == pytest.approx(float(expected.norm()), rel=1e-13)
            distance = torch.dist(expected, other.lora_B @ other.lora_A)
            assert ideal.distance(path, other) == pytest.approx(float(distance), rel=1e-12)
            torch.testing.assert_close(
                ideal.times(path, right, elsewhere=other), expected @ right, rtol=1e-12, atol=1e-12
            )
            assert ideal.is_exact(path) and ideal.sd(path) == ideal.sd(path, other) == 0.0


@pytest.mark.parametrize("weights", [(3.0,), (1.0, 2.0, 5.0, 8.0), MANY], ids=len)
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_the_ideal_is_that_of_the_dense_products(federation, trained, weights):
    is_exact(shipped, *federation(*trained, weights=weights))


@pytest.mark.parametrize(
    "change",
    [
        ("torch.cat([lora_A.double() for lora_A, _, _ in", "torch.cat([lora_A.double() * w for lora_A, _, w in"),
        ("self._folded_DK.addmm_(stacked", "self._folded_DK.zero_().addmm_(stacked"),
        ("alpha=update.weight", "alpha=1.0"),
    ],
    ids=["weight on both factors", "fold that forgets", "no weight"],
)
def test_ideals_that_are_not_exact_are_seen(federation, change):
    with pytest.raises(AssertionError):
        for trained in TRAINED:
            is_exact(mutant(shipped, change), *federation(*trained, weights=MANY))


def test_watching_a_stream_passes_every_update_on(federation):
    adapter, updates = federation(LORA_B)
    ideal = shipped.Ideal(adapter)
    passed = list(ideal.watch(iter(updates)))
    assert all(one is other for one, other in zip(passed, updates, strict=True))
    assert ideal.norm("layer.0") == shipped.Ideal.of(adapter, updates).norm("layer.0")


def numbers_held(module: ModuleType, num_clients: int) -> int:
    """How many numbers the ideal of a 40 x 24 layer holds after so many updates of both factors."""
    slots = {Slot("layer", LORA_A): (2, 24), Slot("layer", LORA_B): (40, 2)}
    adapter = AdapterState({slot: torch.zeros(shape) for slot, shape in slots.items()}, scale=1.0)
    ideal = module.Ideal(adapter)
    for client in range(num_clients):
        tensors = {slot: torch.ones(shape) for slot, shape in slots.items()}
        ideal.add(ClientUpdate(client, tensors, 1.0, 0))
    return sum(t.numel() for t in reachable_tensors(ideal))


def reachable_tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from reachable_tensors(one)
    elif hasattr(value, "__dict__"):
        yield from reachable_tensors(vars(value))


def test_memory_does_not_grow_with_the_cohort():
    rank, whole = 2 * (40 + 24), 40 * 24
    assert numbers_held(shipped, 1) < whole  # few clients: factors, and no D x K matrix
    for num_clients in (100, 1000):
        assert numbers_held(shipped, num_clients) <= whole + rank * (24 // 2 + 2)


def test_a_stack_that_grows_with_the_cohort_is_seen():
    stacks = mutant(shipped, ("if self._num_columns > (", "if 0 > ("))
    assert numbers_held(stacks, 1000) > 100 * numbers_held(shipped, 1000) / 4
