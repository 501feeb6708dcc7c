"""The last layer computes the token that is read, where that is known to be the same.

The per-example gradients of the whole fused engine, this included, are compared in test_fused_parity.py and its
neighbours. Mutant killed here: no probe (`test_a_model_that_reads_every_token_stays_whole`).
"""

import pytest
import torch
from torch import Tensor, nn

from fedlr.models.peft_state import adapted_layers
from fedlr.models.precision import with_bfloat16_base
from fedlr.models.prefix import without_prefix
from fedlr.training import first_token
from fedlr.training.first_token import first_token_only
from tests.training.small_models import batch, mutant, random_rows, small_model

LAST_LINEAR = {
    "bert": "encoder.layer.1.output.dense",
    "roberta": "encoder.layer.1.output.dense",
    "distilbert": "transformer.layer.1.ffn.lin2",
}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def tokens_computed(model: nn.Module, inputs: dict[str, Tensor], name: str) -> list[int]:
    layer = next(module for path, module in model.named_modules() if path.endswith(name))
    seen: list[int] = []
    handle = layer.register_forward_pre_hook(lambda _layer, given: seen.append(given[0].shape[1]))
    logits(model, inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize("architecture", sorted(LAST_LINEAR))
def test_the_last_layer_computes_one_token_and_the_logits_are_those_of_all(architecture: str) -> None:
    model = small_model(architecture, targets="all-linear")
    short = first_token_only(model)
    inputs = batch(random_rows(5, seed=1))
    assert tokens_computed(model, inputs, LAST_LINEAR[architecture]) == [inputs["input_ids"].shape[1]]
    assert tokens_computed(short, inputs, LAST_LINEAR[architecture]) == [1]
    torch.testing.assert_close(logits(short, inputs), logits(model, inputs), rtol=1e-5, atol=1e-6)


def test_a_model_behind_its_cached_prefix_is_served() -> None:
    model = without_prefix(small_model("bert", layers_to_transform=[1]))
    states = {"inputs_embeds": torch.randn(4, 6, 16), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    states["attention_mask"][0, 3:] = 0
    short = first_token_only(model)
    assert tokens_computed(short, states, LAST_LINEAR["bert"]) == [1]
    torch.testing.assert_close(logits(short, states), logits(model, states), rtol=1e-5, atol=1e-6)


def test_a_model_over_a_bfloat16_base_is_served() -> None:
    model = with_bfloat16_base(small_model("bert"))
    inputs = batch(random_rows(5, seed=1))
    short = first_token_only(model)
    assert tokens_computed(short, inputs, LAST_LINEAR["bert"]) == [1]
    torch.testing.assert_close(logits(short, inputs), logits(model, inputs), rtol=0.05, atol=0.05)


def test_names_and_tensors_stay() -> None:
    model = small_model("bert", targets="all-linear")
    short = first_token_only(model)
    assert list(adapted_layers(short)) == list(adapted_layers(model))
    assert {id(p) for p in short.parameters()} == {id(p) for p in model.parameters()}
    assert short.training == model.training


class MeanPooler(nn.Module):
    """Reads every token, as sentence encoders do."""

    def forward(self, states: Tensor) -> Tensor:
        return states.mean(dim=1)


def test_a_model_that_reads_every_token_stays_whole() -> None:
    model = small_model("bert")
    next(m for m in model.modules() if hasattr(m, "pooler")).pooler = MeanPooler()
    inputs = batch(random_rows(5, seed=1))
    torch.testing.assert_close(logits(first_token_only(model), inputs), logits(model, inputs))

    unprobed = mutant(first_token, ("if not _same_logits(model, short):", "if False:"))
    assert not torch.allclose(logits(unprobed.first_token_only(model), inputs), logits(model, inputs), rtol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "llama_lm"])
def test_a_model_of_another_structure_stays_whole(architecture: str) -> None:
    model = small_model(architecture)
    inputs = batch(random_rows(5, seed=1))
    assert torch.equal(logits(first_token_only(model), inputs), logits(model, inputs))
