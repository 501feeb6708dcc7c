"""The mean of the last models: exact where row spaces agree, and never part of what trains.

Mutants: a mean of factors in place of products; one that counts the start.
"""

import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Slot
from fedlr.methods.aggregate.last_models import mean_model, past_models, with_past
from fedlr.methods.method import SvdRefactor

A, B, TOP = Slot("layer", LORA_A), Slot("layer", LORA_B), Slot("head.weight", HEAD)


def models(count: int, *, finaliser: object = None, same_rows: bool = True) -> list[AdapterState]:
    generator = torch.Generator().manual_seed(0)
    rows, found = torch.randn(3, 8, generator=generator), []
    for _ in range(count):
        own = rows if same_rows else torch.randn(3, 8, generator=generator)
        tensors = {A: own, B: torch.randn(5, 3, generator=generator), TOP: torch.randn(2, 5, generator=generator)}
        adapter = AdapterState(tensors, scale=2.0)
        found.append(finaliser(adapter) if callable(finaliser) else adapter)
    return found


def chained(steps: list[AdapterState], *, average_last: int) -> AdapterState:
    """Return the last of these states, the first of which is the start, with the past that rounds leave."""
    state = steps[0]
    for round_index, after in enumerate(steps[1:]):
        state = with_past(state, after, num_rounds=round_index, average_last=average_last)
    return state


def product(adapter: AdapterState) -> torch.Tensor:
    return adapter.tensors[B].double() @ adapter.tensors[A].double()


def test_one_model_is_itself_to_the_bit() -> None:
    state = chained(models(4), average_last=1)
    assert not state.memory and mean_model(state) is state


def test_the_start_is_in_no_mean() -> None:
    two = models(2)
    assert mean_model(chained(two, average_last=5)).fingerprint() == two[1].fingerprint()


def test_heads_and_lora_B_of_common_rows_are_averaged_and_the_rows_kept() -> None:
    steps = models(5)
    mean = mean_model(chained(steps, average_last=3))
    for slot in (TOP, B):
        torch.testing.assert_close(mean.tensors[slot], torch.stack([one.tensors[slot] for one in steps[-3:]]).mean(0))
    assert mean.tensors[A] is steps[-1].tensors[A] and not mean.memory


def test_products_in_one_row_space_are_averaged_exactly_however_their_rows_are_turned() -> None:
    steps = models(4, finaliser=SvdRefactor())
    assert not torch.equal(steps[2].tensors[A], steps[3].tensors[A])
    mean = mean_model(chained(steps, average_last=3))
    exact = torch.stack([product(one) for one in steps[1:]]).mean(0)
    torch.testing.assert_close(product(mean), exact, atol=1e-5, rtol=1e-5)
    factors = {slot: torch.stack([one.tensors[slot] for one in steps[1:]]).mean(0) for slot in (A, B)}
    mutant = product(mean.with_tensors(factors))
    assert float((mutant - exact).norm()) > 0.1 * float(exact.norm())


def test_other_row_spaces_give_the_best_product_of_the_rank() -> None:
    steps = models(3, same_rows=False)
    mean = product(mean_model(chained(steps, average_last=2)))
    exact = (product(steps[1]) + product(steps[2])) / 2
    U, S, Vh = torch.linalg.svd(exact)
    torch.testing.assert_close(mean, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5, rtol=1e-5)


def test_only_as_many_models_are_remembered_as_the_mean_needs() -> None:
    steps = models(9)
    state = chained(steps, average_last=4)
    assert [tensors[TOP] is steps[-1 - age].tensors[TOP] for age, tensors in enumerate(past_models(state), 1)] == [
        True
    ] * 3
    other = steps[-1].remembering("momentum", {TOP: torch.ones(2, 5)})
    assert with_past(state, other, num_rounds=9, average_last=2).memory.keys() == {"momentum", "past-1"}
