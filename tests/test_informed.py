"""Starting rows of lora_A chosen by the frozen base: orthonormal, the leading directions, from nobody's examples.

Mutants this file kills: left singular vectors in place of right ones; the weakest directions first; rows of one layer
given to all; a base that is changed (PiSSA's); signs left to the library; moments that count padding; a Conv1D read the
wrong way round.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from fedlr.adapters.state import LORA_A, Slot
from fedlr.errors import InputError
from fedlr.models.adapter_config import INFORMED, AdapterConfig
from fedlr.models.network import AdaptedModel, attach_lora, pretrained, tiny_random, word_tokenizer
from fedlr.models.peft_state import adapted_layers, read_adapter
from fedlr.models.starts.from_base import input_moments, leading_rows, made_up_text, principal_rows
from fedlr.tasks.synthetic import VOCABULARY

LABELS = ("negative", "positive")


def attached(
    source: bool | str, *, seed: int = 0, rank: int = 4, targets: str | list[str] = "all-linear"
) -> AdaptedModel:
    base = tiny_random(label_names=LABELS, seed=7)
    config = AdapterConfig(rank=rank, lora_alpha=4, target_modules=targets, init_lora_weights=source)
    return attach_lora(base, config, seed=seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: layer.get_base_layer().weight.detach().double() for path, layer in adapted_layers(model).items()}


def gram_error(rows: Tensor) -> float:
    return float((rows.double() @ rows.double().T - torch.eye(len(rows)).double()).abs().max())


@pytest.mark.parametrize("source", INFORMED)
def test_rows_are_orthonormal_signed_and_B_is_zero(source: str) -> None:
    for layer in read_adapter(attached(source)).factors().values():
        assert gram_error(layer.lora_A) < 1e-5
        assert (layer.lora_A.gather(1, layer.lora_A.abs().argmax(dim=1, keepdim=True)) > 0).all()
        assert not layer.lora_B.any()


@pytest.mark.parametrize("source", INFORMED)
def test_the_base_and_its_function_stay(source: str) -> None:
    plain = tiny_random(label_names=LABELS, seed=7)
    inputs = plain.tokenizer(["the film was fine"], return_tensors="pt")
    expected = plain.network(**inputs).logits
    model = attached(source)
    assert torch.equal(model(**inputs).logits, expected)
    names = {
        name.replace(".base_layer", "").replace("base_model.model.", ""): t for name, t in model.state_dict().items()
    }
    assert all(
        torch.equal(names[name], t) for name, t in plain.network.state_dict().items() if "classifier" not in name
    )
    assert not any(p.requires_grad and "lora" not in n and "classifier" not in n for n, p in model.named_parameters())


def test_principal_rows_answer_with_the_largest_singular_values() -> None:
    model = attached("principal")
    rows = read_adapter(model).factors()
    for path, weight in weights(model).items():
        answers = (weight @ rows[path].lora_A.double().T).norm(dim=0)
        assert torch.allclose(answers, torch.linalg.svdvals(weight)[:4], rtol=1e-5)


def test_rows_of_activations_hold_the_most_energy_that_as_many_can() -> None:
    model = attached("activations", seed=5)
    moments = input_moments(model, made_up_text(tiny_random(label_names=LABELS, seed=7).tokenizer, seed=5))
    drawn = read_adapter(attached("orthogonal")).factors()
    for path, layer in read_adapter(model).factors().items():
        rows, moment = layer.lora_A.double(), moments[path]
        held = (rows @ moment @ rows.T).trace()
        assert held == pytest.approx(float(torch.linalg.eigvalsh(moment)[-4:].sum()), rel=1e-5)
        random = torch.linalg.qr(drawn[path].lora_A.double().T).Q.T
        assert held > (random @ moment @ random.T).trace()


def test_no_drawn_number_is_left_and_the_rows_of_weights_need_no_seed() -> None:
    assert (
        read_adapter(attached("principal", seed=1)).fingerprint() == read_adapter(attached("principal")).fingerprint()
    )
    one, same, other = (read_adapter(attached("activations", seed=seed)).fingerprint() for seed in (1, 1, 2))
    assert one == same != other


def test_layers_differ_where_their_inputs_do() -> None:
    rows = {path: layer.lora_A for path, layer in read_adapter(attached("activations")).factors().items()}
    query, value, output = (
        next(r for p, r in rows.items() if p.endswith(end)) for end in ("self.query", "self.value", "output.dense")
    )
    assert torch.equal(query, value), "one input, one moment"
    assert not torch.allclose(query, output, atol=0.1)


def test_padding_is_not_counted() -> None:
    model = attached(True, targets=["query"])
    tokenizer = tiny_random(label_names=LABELS, seed=7).tokenizer
    texts = [" ".join(VOCABULARY[:20]), VOCABULARY[30]]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    alone = [tokenizer([text], return_tensors="pt") for text in texts]
    together, apart = input_moments(model, iter([padded])), input_moments(model, iter(alone))
    assert padded["attention_mask"].sum() < padded["attention_mask"].numel()
    for path, moment in together.items():
        assert torch.allclose(moment, apart[path], rtol=1e-4, atol=1e-4)


def test_watching_leaves_no_hook_behind() -> None:
    model = attached("activations")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_made_up_text_has_ordinary_tokens_only_and_repeats() -> None:
    tokenizer = tiny_random(label_names=LABELS, seed=7).tokenizer
    one, same, other = (list(made_up_text(tokenizer, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    inner = torch.cat([batch["input_ids"][:, 1:-1].flatten() for batch in one])
    assert tokenizer.unk_token_id not in inner and tokenizer.pad_token_id not in inner
    assert inner.unique().numel() > len(tokenizer) / 2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("source", INFORMED)
def test_a_conv1d_is_read_the_right_way_round(tmp_path: Path, source: str) -> None:
    network = GPT2ForSequenceClassification(GPT2Config(vocab_size=150, n_embd=16, n_layer=2, n_head=2, n_positions=40))
    network.save_pretrained(tmp_path)
    word_tokenizer(VOCABULARY, max_length=32).save_pretrained(tmp_path)
    base = pretrained(name_or_path=str(tmp_path), label_names=LABELS, seed=0)
    config = AdapterConfig(rank=4, lora_alpha=4, target_modules=["c_attn"], init_lora_weights=source)
    model = attach_lora(base, config, seed=0)
    for path, layer in read_adapter(model).factors().items():
        assert layer.lora_A.shape == (4, 16) and gram_error(layer.lora_A) < 1e-5
        if source == "principal":
            weight = weights(model)[path].T
            assert torch.allclose((weight @ layer.lora_A.double().T).norm(dim=0), torch.linalg.svdvals(weight)[:4])


@pytest.mark.parametrize("source", INFORMED)
def test_numbers_that_are_not_finite_are_refused(source: str) -> None:
    base = tiny_random(label_names=LABELS, seed=7)
    for layer in base.network.bert.encoder.layer:
        layer.attention.self.value.weight[0, 0] = float("inf")
    config = AdapterConfig(rank=4, lora_alpha=4, target_modules=["value"], init_lora_weights=source)
    with pytest.raises(InputError, match=f"init_lora_weights={source}, got others in base_model"):
        attach_lora(base, config, seed=0)


@pytest.mark.parametrize("function", [principal_rows, leading_rows])
def test_signs_do_not_depend_on_the_library(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0])) + 0.3
    rows = function(matrix)
    svd, eigh = torch.linalg.svd, torch.linalg.eigh

    class Flipped:
        def __init__(self, Vh: Tensor, eigenvectors: Tensor) -> None:
            self.Vh, self.eigenvectors = -Vh, -eigenvectors

    monkeypatch.setattr(torch.linalg, "svd", lambda m, full_matrices: Flipped(svd(m).Vh, svd(m).U))
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: Flipped(eigh(m).eigenvectors, eigh(m).eigenvectors))
    assert torch.equal(function(matrix), rows)


def test_every_layer_gets_its_own_slot_and_nothing_else_changes() -> None:
    drawn, chosen = read_adapter(attached(True)), read_adapter(attached("principal"))
    assert {slot for slot in drawn.tensors if not torch.equal(drawn.tensors[slot], chosen.tensors[slot])} == {
        Slot(path, LORA_A) for path in drawn.factors()
    }
