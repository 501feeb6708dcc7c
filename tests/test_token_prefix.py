"""A decoder above its cached prefix says what the whole one says, row by row, and its sums are the same.

Mutants this file kills: states given to another row than theirs, and a family that changes its embeddings served.
"""

import numpy as np
import pytest
import torch

from fedlr.adapters.state import LORA_B
from fedlr.data.store import TableStore
from fedlr.errors import InputError
from fedlr.models import token_prefix
from fedlr.models.peft_state import train_only
from fedlr.models.token_prefix import encode_token_prefix, reads_tokens_in_order, without_token_prefix
from fedlr.tasks.causal_lm import CausalLM
from fedlr.tasks.tokenised_turns import TokenisedTurns
from fedlr.training.fused import FusedGradients
from tests.causal_families import END, VOCABULARY, causal_model
from tests.training.small_models import mutant

SERVED = ("llama", "smollm2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "mixtral")


def turns(num_rows: int = 7) -> TokenisedTurns:
    draws = np.random.default_rng(2)
    lengths = draws.integers(4, 12, num_rows)
    ids = draws.integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenisedTurns(ids, draws.random(len(ids)) < 0.6, offsets, END, 0)


def upper(family: str) -> torch.nn.Module:
    return causal_model(family, layers=[1])


def sums(model: torch.nn.Module, data: TokenisedTurns, rows: list[int]) -> torch.Tensor:
    engine = FusedGradients(model, train_only(model, frozenset({LORA_B})), loss=CausalLM().losses)
    found = engine.clipped_sum(data.batch(rows), max_grad_norm=0.3)
    return torch.cat([tensor.flatten() for tensor in found.values()])


@pytest.mark.parametrize("family", SERVED)
def test_sums_above_a_cached_prefix_are_those_of_the_whole_model(family: str) -> None:
    model, data, rows = upper(family), turns(), [4, 0, 6]
    assert reads_tokens_in_order(model)
    short = without_token_prefix(model)
    cached = encode_token_prefix(model, data, token_budget=24, num_threads=2)
    assert set(cached.batch(rows).inputs) == {"inputs_embeds", "attention_mask"}
    whole, above = sums(model, data, rows), sums(short, cached, rows)
    assert float((whole - above).norm()) <= 1e-5 * float(whole.norm()) and float(whole.norm()) > 0
    first = cached.batch([0]).inputs["inputs_embeds"]
    assert torch.equal(cached.subset([4, 0]).batch([1]).inputs["inputs_embeds"], first)
    others = mutant(token_prefix, ("data.offsets, rows, put)", "data.offsets, rows[::-1], put)"))
    wrong = others.encode_token_prefix(model, data, token_budget=10**6)
    assert float((whole - sums(short, wrong, rows)).norm()) > 1e-2 * float(whole.norm())


def test_a_family_that_does_more_before_its_layers_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"embed_tokens.*got gpt2; set runtime\.cache_prefix=false"):
        without_token_prefix(causal_model("gpt2"))
    model = upper("granite")
    model.get_base_model().base_model.embedding_multiplier = 3.0
    with pytest.raises(InputError, match=r"embeddings are all.*got granite; set runtime\.cache_prefix=false"):
        without_token_prefix(model)
    trusting = mutant(token_prefix, ("if not _same_logits(model, short):", "if False:"))
    data, rows = turns(), [1, 2]
    wrong = sums(trusting.without_token_prefix(model), encode_token_prefix(model, data), rows)
    assert float((sums(model, data, rows) - wrong).norm()) > 1e-3 * float(wrong.norm())


def test_an_adapter_in_the_first_layer_leaves_no_prefix() -> None:
    with pytest.raises(InputError, match=r"upper layers only.*adapter\.layers"):
        without_token_prefix(causal_model("llama"))


def test_a_store_gives_states_again_to_the_bit_and_bfloat16_stays_so(tmp_path) -> None:
    model, data = upper("llama"), turns()
    first = encode_token_prefix(model, data, store=TableStore(tmp_path)).hidden
    assert np.array_equal(encode_token_prefix(model, data, store=TableStore(tmp_path)).hidden, first)
    assert len(list(tmp_path.glob("*.table"))) == 1
    other = turns().subset([0, 2, 1])
    assert len(encode_token_prefix(model, other, store=TableStore(tmp_path)).hidden) < len(first)
    assert len(list(tmp_path.glob("*.table"))) == 2
    low = encode_token_prefix(model.bfloat16(), data)
    assert low.hidden.dtype == np.uint16 and low.batch([0]).inputs["inputs_embeds"].dtype == torch.bfloat16
