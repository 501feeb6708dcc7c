"""The aggregation error and the singular values against their dense definitions."""

from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.measure.diagnostics import aggregation_error, singular_values
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import SvdRefactor


def test_the_aggregation_error_is_that_of_the_dense_products(federation):
    adapter, updates = federation(LORA_A, LORA_B)
    after, total = weighted_mean(adapter, updates), sum(update.weight for update in updates)
    errors = aggregation_error(Ideal.of(adapter, updates), after)
    for path, layer in after.factors().items():
        ideal = sum(
            update.weight / total * update.tensors[Slot(path, LORA_B)] @ update.tensors[Slot(path, LORA_A)]
            for update in updates
        )
        expected = torch.dist(ideal, layer.lora_B @ layer.lora_A) / ideal.norm()
        assert errors[path] == pytest.approx(float(expected), rel=1e-10) and errors[path] > 0.01


@pytest.mark.parametrize("finalise", [lambda adapter: adapter, SvdRefactor()])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_an_exact_method_has_no_error_but_rounding(federation, finalise, dtype, rounding):
    adapter, updates = federation(LORA_B, dtype=dtype)
    errors = aggregation_error(Ideal.of(adapter, updates), finalise(weighted_mean(adapter, updates)))
    assert all(error < rounding for error in errors.values())


def test_the_aggregation_error_is_zero_where_the_ideal_is_zero(federation):
    adapter, updates = federation(LORA_B)
    zero = [replace(u, tensors={s: torch.zeros_like(t) for s, t in u.tensors.items()}) for u in updates]
    assert set(aggregation_error(Ideal.of(adapter, zero), weighted_mean(adapter, zero)).values()) == {0.0}


def test_singular_values_are_those_of_delta_W_and_the_refactor_keeps_them(federation):
    adapter, _ = federation(LORA_B)
    values = singular_values(adapter)
    for path, layer in adapter.factors().items():
        dense = torch.linalg.svdvals(adapter.scale * layer.lora_B @ layer.lora_A)[:3]
        assert torch.allclose(torch.tensor(values[path], dtype=torch.float64), dense)
        assert singular_values(SvdRefactor()(adapter))[path] == pytest.approx(values[path])
