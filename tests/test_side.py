"""A folded product is part of the frozen weights: same function, no growth of error, and all copies see it.

Mutants killed: a product merged on top of the last one; a transposed product; a scale that is left out.
"""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import fedlr.models.base_delta
from fedlr.adapters.state import AdapterState, LoraFactors
from fedlr.errors import InputError
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import read_adapter
from tests.training.small_models import mutant

IN, OUT, PATH = 6, 4, "base_model.model.layer"
WRONG = {
    "on top of the last": ("plain.double() + adapter.scale", "weight.double() + adapter.scale"),
    "without the scale": ("plain.double() + adapter.scale * product_DK", "plain.double() + product_DK"),
}


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(layer: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layer = layer or nn.Linear(IN, OUT)
    return get_peft_model(One(layer), LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])).eval()


def with_side(adapter: AdapterState, *, rank: int, seed: int = 1) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    layer = LoraFactors(torch.randn(rank, IN, generator=g), torch.randn(OUT, rank, generator=g))
    return replace(adapter, side={PATH: layer})


def follows(side: SideWeights, model: nn.Module) -> None:
    """After several merges the layer computes exactly one product more than at first, and then none."""
    x, adapter = torch.randn(3, IN), read_adapter(model)
    plain = model(x)
    for rank, seed in ((1, 1), (3, 2), (3, 2), (2, 3)):
        one = with_side(adapter, rank=rank, seed=seed)
        side.merge(one)
        layer = one.side[PATH]
        torch.testing.assert_close(model(x), plain + adapter.scale * x @ layer.lora_A.T @ layer.lora_B.T)
    side.merge(adapter)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("layer", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["Linear", "Conv1D"])
def test_a_layer_computes_its_side_product_and_nothing_older(layer: nn.Module) -> None:
    model = adapted(layer)
    follows(SideWeights(model), model)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_merges_are_seen(change: tuple[str, str]) -> None:
    model = adapted()
    with pytest.raises(AssertionError):
        follows(mutant(fedlr.models.base_delta, change).SideWeights(model), model)


def test_a_square_layer_is_not_merged_the_wrong_way_round() -> None:
    model = adapted(nn.Linear(IN, IN, bias=False))
    x, adapter = torch.randn(3, IN), read_adapter(model)
    layer = LoraFactors(torch.randn(2, IN), torch.randn(IN, 2))
    plain = model(x)
    SideWeights(model).merge(replace(adapter, side={PATH: layer}))
    torch.testing.assert_close(model(x), plain + adapter.scale * x @ layer.lora_A.T @ layer.lora_B.T)


def test_a_model_without_a_side_is_not_touched() -> None:
    model = adapted()
    before = model.base_model.model.layer.base_layer.weight._version
    SideWeights(model).merge(read_adapter(model))
    assert model.base_model.model.layer.base_layer.weight._version == before


def test_a_base_that_would_round_it_away_is_refused() -> None:
    model = adapted()
    adapter = with_side(read_adapter(model), rank=1)
    with pytest.raises(InputError, match="Expected float32 linear layers for a method that folds"):
        SideWeights(model.to(torch.bfloat16)).merge(adapter)


def test_the_hash_of_an_adapter_tells_its_side() -> None:
    adapter = read_adapter(adapted())
    one, other = with_side(adapter, rank=1), with_side(adapter, rank=1, seed=2)
    assert len({state.fingerprint() for state in (adapter, one, other)}) == 3
