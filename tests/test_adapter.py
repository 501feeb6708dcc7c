"""The adapter's values: addressed by slot, read and written exactly, hashed whole."""

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, LoraFactors, Slot, num_bytes, num_values
from fedlr.models.peft_state import adapter_parameters, read_adapter, train_only, write_adapter
from tests.training.small_models import CLASSIFIERS, EVERYTHING, batch, random_rows, small_model


def state(**changes: object) -> AdapterState:
    tensors = {Slot("x", LORA_A): torch.arange(6.0).reshape(2, 3), Slot("x", LORA_B): torch.ones(4, 2)}
    return AdapterState({**tensors, **changes.pop("tensors", {})}, scale=changes.pop("scale", 2.0))


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_what_is_read_writes_back_to_the_same_logits(architecture: str) -> None:
    model = small_model(architecture).eval()
    inputs = batch(random_rows(4, seed=1))
    before, adapter = model(**inputs).logits, read_adapter(model)
    write_adapter(model, {slot: torch.zeros_like(t) for slot, t in adapter.tensors.items()})
    assert not torch.allclose(model(**inputs).logits, before)
    write_adapter(model, adapter.tensors)
    assert torch.equal(model(**inputs).logits, before)
    assert {slot.role for slot in adapter.tensors} == EVERYTHING


def test_a_layers_update_is_scale_times_b_times_a() -> None:
    model = small_model("bert")
    adapter = read_adapter(model)
    for path, layer in adapter.factors().items():
        delta = model.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(adapter.scale * layer.lora_B @ layer.lora_A, delta)


def test_what_is_read_is_a_copy() -> None:
    model = small_model("bert")
    adapter = read_adapter(model)
    before = adapter.fingerprint()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(1)
    assert adapter.fingerprint() == before


def test_exactly_the_block_trains() -> None:
    model = small_model("roberta")
    for block in ({LORA_A}, {LORA_B, HEAD}, {LORA_B}):
        trained = train_only(model, frozenset(block))
        assert list(trained) == sorted(trained)
        assert {slot.role for slot in trained} == block
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}


@pytest.mark.parametrize(
    "other",
    [
        state(scale=2.0000000000000004),
        state(tensors={Slot("x", LORA_A): torch.arange(6.0).reshape(3, 2)}),
        state(tensors={Slot("x", LORA_A): torch.arange(6.0).reshape(2, 3).double()}),
        state(tensors={Slot("x", LORA_B): torch.ones(4, 2) + 2**-23}),
        state(tensors={Slot("x", HEAD): torch.tensor(1.0)}),
        state(tensors={Slot("y", LORA_A): torch.ones(1)}),
    ],
    ids=["scale", "shape", "dtype", "last bit", "a scalar more", "a slot more"],
)
def test_fingerprint_sees_every_difference(other: AdapterState) -> None:
    assert other.fingerprint() != state().fingerprint()


def test_fingerprint_sees_values_and_not_how_they_lie_in_memory() -> None:
    backwards = AdapterState(dict(reversed(state().tensors.items())), scale=2.0)
    transposed = state(tensors={Slot("x", LORA_A): torch.arange(6.0).reshape(2, 3).T.contiguous().T})
    assert state().fingerprint() == backwards.fingerprint() == transposed.fingerprint()


@pytest.mark.parametrize("slot", [Slot("y", LORA_A), Slot("x", "lora_a"), Slot("x", LORA_B)])
def test_unknown_slots_and_other_shapes_are_refused(slot: Slot) -> None:
    model = small_model("bert")
    with pytest.raises(ValueError, match="Expected a tensor that the adapter has"):
        state().with_tensors({slot: torch.ones(2, 3)})
    with pytest.raises(ValueError, match="Expected a tensor that the model has"):
        write_adapter(model, {slot: torch.ones(2, 3)})


def test_new_factors_leave_the_old_state_alone() -> None:
    before = state()
    after = before.with_factors({"x": LoraFactors(torch.zeros(2, 3), torch.zeros(4, 2))})
    assert float(before.factors()["x"].lora_B.sum()) == 8
    assert float(after.factors()["x"].lora_B.sum()) == 0


def test_sizes_are_of_numbers_and_of_their_bytes() -> None:
    tensors = [torch.ones(2, 3), torch.ones(5, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float64)]
    assert num_values(tensors) == 6 + 5 + 1
    assert num_bytes(tensors) == 24 + 10 + 8
