"""The formulas of starts against PEFT's own initialisers, which change the base model's weights; ours take the side.

PEFT computes in float32 (it refuses wider weights), so products agree to its rounding. Mutants this file kills: the
scale left out of PiSSA; Q and R swapped; KPM's directions for IPM's; moments that are not centred for EVA, or not
divided for CorDA; LoRA-GA's A and B from the same directions; a step of LoRA-SB uphill.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, TaskType, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor

from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.network import BaseModel, attach_lora, tiny_random
from fedlr.models.peft_state import adapted_layers, read_adapter
from fedlr.models.starts import tuner_starts as peft_starts
from fedlr.models.starts.factors import (
    corda_factors,
    eva_factors,
    lora_ga_factors,
    lora_sb_bases,
    olora_factors,
    pissa_factors,
    signed_svd,
)
from fedlr.models.starts.starts import centred_moments, mean_moments, weight_gradients
from fedlr.tasks.losses import class_losses, cross_entropy
from fedlr.tasks.synthetic import VOCABULARY
from fedlr.tasks.text_classification import TextClassification
from fedlr.tasks.tokenise import TokenisedText, tokenise

LABELS, SCALE = ("negative", "positive"), 2.0


def base() -> BaseModel:
    return tiny_random(label_names=LABELS, seed=7)


def texts() -> TokenisedText:
    """Twelve texts of ten tokens: without padding, which PEFT counts."""
    drawn = np.random.default_rng(0)
    words = [" ".join(drawn.choice(VOCABULARY, size=8)) for _ in range(12)]
    data = LabelledText(tuple(words), np.arange(12, dtype=np.int64) % 2, LABELS, None, "made up")
    return tokenise(data, base().tokenizer, max_length=32)


def by_peft(start: Callable[..., Any], rank: int, **options: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, B and the changed weight of every layer as PEFT makes them, in float64, by path."""
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=SCALE * rank, target_modules=["query", "output.dense"], **options
    )
    batch = texts().batch(range(12))
    model = start(base().network, config, peft_starts.PublicBatch(batch, class_losses))
    return {
        path: tuple(
            t.detach().double()
            for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight)
        )
        for path, layer in adapted_layers(model).items()
    }


def plain(model: Any, config: LoraConfig, _public: object) -> Any:
    return get_peft_model(model, config)


def ours(rank: int = 4) -> tuple[Any, dict[str, Tensor]]:
    config = AdapterConfig(rank=rank, lora_alpha=SCALE * rank, target_modules=["query", "output.dense"])
    model = attach_lora(base(), config, seed=0)
    return model, {p: la.get_base_layer().weight.detach().double() for p, la in adapted_layers(model).items()}


FORMULAS: dict[str, Callable[[Tensor], Any]] = {
    "pissa": lambda weight: pissa_factors(weight, 4, scale=SCALE),
    "olora": lambda weight: olora_factors(weight, 4),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_products_and_what_is_left_of_the_base_are_pefts(name: str) -> None:
    _, weights = ours()
    theirs = by_peft(plain, 4, init_lora_weights=name)
    assert len(theirs) == 6
    for path, (lora_A, lora_B, residual) in theirs.items():
        made = FORMULAS[name](weights[path])
        torch.testing.assert_close(made.lora_B @ made.lora_A, lora_B @ lora_A, rtol=0, atol=1e-5)
        torch.testing.assert_close(weights[path] - SCALE * made.lora_B @ made.lora_A, residual, rtol=0, atol=1e-5)
        torch.testing.assert_close(made.lora_A.norm(dim=1), lora_A.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_is_pefts(method: str) -> None:
    model, weights = ours()
    moments = mean_moments(model, texts())
    config = CordaConfig(corda_method=method)
    for path, (lora_A, lora_B, residual) in by_peft(
        peft_starts.corda, 4, init_lora_weights="corda", corda_config=config
    ).items():
        made = corda_factors(weights[path], moments[path], 4, scale=SCALE, strongest=method == "ipm")
        torch.testing.assert_close(made.lora_B @ made.lora_A, lora_B @ lora_A, rtol=0, atol=2e-3)
        torch.testing.assert_close(weights[path] - SCALE * made.lora_B @ made.lora_A, residual, rtol=0, atol=4e-3)
        torch.testing.assert_close(made.lora_B.norm(dim=0), lora_B.norm(dim=0), rtol=1e-2, atol=1e-4)


def test_eva_is_pefts() -> None:
    """At half of all directions its random projection is the whole space, and so exact."""
    model, _ = ours(16)
    centred = centred_moments(model, texts())
    options = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    for path, (lora_A, lora_B, _) in by_peft(peft_starts.eva, 16, **options).items():
        if not path.endswith("query"):
            continue  # the others read 64 inputs, of which PEFT looks at 32 random ones
        made = eva_factors(centred[path], 16, out_features=len(lora_B))
        assert not made.lora_B.any() and not lora_B.any()
        assert ((made.lora_A * lora_A).sum(dim=1).abs() > 0.999).all(), "the same directions, up to sign"


def test_lora_ga_has_the_directions_of_pefts_and_the_lengths_of_the_paper() -> None:
    model, _ = ours()
    layers = {path: layer.get_base_layer() for path, layer in adapted_layers(model).items()}
    gradients = weight_gradients(model, layers, texts(), task=TextClassification())
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    for path, (lora_A, lora_B, _) in by_peft(peft_starts.lora_ga, 4, **options).items():
        made = lora_ga_factors(gradients[path], 4)
        for own, their in ((made.lora_A, lora_A), (made.lora_B.T, lora_B.T)):
            cosines = torch.nn.functional.cosine_similarity(own, their).abs()
            assert (cosines > 0.99).all()
        length = len(gradients[path]) ** 0.25 / 4
        torch.testing.assert_close(made.lora_A @ made.lora_A.T, length**2 * torch.eye(4).double())
        torch.testing.assert_close(made.lora_B.T @ made.lora_B, length**2 * torch.eye(4).double())


def test_lora_ga_needs_two_directions_a_rank() -> None:
    with pytest.raises(InputError, match=r"adapter\.rank <= 4 .* two directions a rank, got 5"):
        lora_ga_factors(torch.randn(8, 20), 5)


def test_gradients_are_those_of_the_mean_loss_and_the_weights_stay_frozen() -> None:
    model, _ = ours()
    layers = {path: layer.get_base_layer() for path, layer in adapted_layers(model).items()}
    found = weight_gradients(model, layers, texts(), task=TextClassification())
    assert not any(layer.weight.requires_grad for layer in layers.values())
    path, layer = next(iter(layers.items()))
    batch = texts().batch(range(12))
    step = torch.zeros_like(layer.weight)
    step[3, 5] = 1e-2
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.weight.add_(sign * step)
            losses.append(cross_entropy(model(**batch.inputs).logits.double(), batch.targets).mean().item())
            layer.weight.sub_(sign * step)
    assert found[path][3, 5].item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-5)


def test_lora_sb_is_the_best_approximation_of_a_downhill_step() -> None:
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    U, sigma, Vh = lora_sb_bases(gradient, 6, learning_rate=0.1)
    torch.testing.assert_close(U @ torch.diag(sigma) @ Vh, -0.1 * gradient.sign())
    U, sigma, Vh = lora_sb_bases(gradient, 2, learning_rate=0.1)
    torch.testing.assert_close(U.T @ U, torch.eye(2).double())
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(2).double())
    assert torch.sum(U @ torch.diag(sigma) @ Vh * gradient) < 0


def test_no_start_depends_on_the_signs_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    made = [pissa_factors(weight, 3, scale=1.0), olora_factors(weight, 3)]
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def turned_svd(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(matrix, full_matrices=full_matrices)
        return -U, S, -Vh

    def turned_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = qr(matrix)
        return -Q, -R

    monkeypatch.setattr(torch.linalg, "svd", turned_svd)
    monkeypatch.setattr(torch.linalg, "qr", turned_qr)
    for one, again in zip(made, [pissa_factors(weight, 3, scale=1.0), olora_factors(weight, 3)], strict=True):
        assert torch.equal(one.lora_A, again.lora_A) and torch.equal(one.lora_B, again.lora_B)


def test_a_decomposition_gives_its_matrix_back() -> None:
    matrix = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    U, S, Vh = signed_svd(matrix)
    torch.testing.assert_close(U @ torch.diag(S) @ Vh, matrix.double())
    assert read_adapter(ours()[0]).scale == SCALE
