"""Pictures through the engines: one row is one example, whatever the others are, and every engine says the same.

Mutants this file kills: pixels scaled by the mean of their micro-batch; a picture that is averaged with its neighbour;
features or states of another picture's row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedlr.adapters.state import HEAD, LORA_B
from fedlr.errors import InputError
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from fedlr.models.network import BaseModel, attach_lora, frozen, seeded
from fedlr.models.peft_state import adapter_parameters, train_only
from fedlr.models.picture_prefix import (
    GIVEN_STATES,
    encode_picture_features,
    encode_picture_prefix,
    without_picture_prefix,
)
from fedlr.models.pooling import PooledClassifier
from fedlr.models.prefix import without_encoder
from fedlr.models.vision import tiny_vit
from fedlr.tasks.batch import Batch
from fedlr.tasks.image_classification import image_classification
from fedlr.tasks.made_up_images import made_up_images
from fedlr.tasks.pictures import EncodedImages, PictureProcessor, encode_images
from fedlr.training.first_token import first_token_only
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from fedlr.training.supported import check_supported

NAMES = ("bar", "cross", "disc")
TASK = image_classification(label_names=NAMES)
BLOCK = frozenset({LORA_B, HEAD})
SIDES = {"vit": 16, "efficientnet": 64}


def lite(pooling: str | None = None) -> BaseModel:
    """Make EfficientNet-lite0 with random weights for pictures of 64 pixels."""
    with seeded(0):
        config = EfficientNetLiteConfig(image_size=64, num_labels=3, initializer_range=0.05)
        network = EfficientNetLiteForImageClassification(config)
        if pooling is not None:
            network = PooledClassifier(network.base_model, pooling=pooling, num_labels=3, head_std=0.1)
    processor = PictureProcessor(64, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16)
    return frozen(network, processor, "random lite")


def adapted(kind: str) -> nn.Module:
    """Return a model whose LoRA and head are away from their start."""
    if kind == "vit":
        base, targets, layers = tiny_vit(label_names=NAMES, seed=0), ["q_proj", "v_proj"], None
    else:
        base, targets, layers = lite(), r".*layers\.(14|15)\.(expand|project)|.*\.top", None
    config = AdapterConfig(rank=2, lora_alpha=2.0, target_modules=targets, layers=layers)
    model = attach_lora(base, config, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def pictures(kind: str, num: int = 9) -> EncodedImages:
    side = SIDES[kind]
    table = made_up_images(num, 0, image_size=side)
    processor = PictureProcessor(side, side, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)
    return encode_images(table, processor)


def test_pixels_are_scaled_as_the_models_own_processor_scales_them() -> None:
    table = made_up_images(6, 0, image_size=16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = encode_images(table, PictureProcessor(16, 16, mean, std, 16)).batch([4, 1]).inputs["pixel_values"]
    theirs = ViTImageProcessorPil(image_mean=list(mean), image_std=list(std), size={"height": 16, "width": 16})
    wanted = theirs([table.pixels[4], table.pixels[1]], return_tensors="pt")["pixel_values"]
    assert ours.dtype == torch.float32 and ours.is_contiguous() and torch.allclose(ours, wanted, atol=1e-5)


def test_pictures_of_another_size_are_refused_and_rows_stay_what_they_are() -> None:
    table = made_up_images(6, 0, image_size=16)
    with pytest.raises(InputError, match=r"32 x 32 pixels.*got 16 x 16; set data\.image_size=32"):
        encode_images(table, PictureProcessor(32, 32, (0.5,), (0.5,), 4))
    data = encode_images(table, PictureProcessor(16, 16, (0.5,), (0.5,), 4))
    some = data.subset([5, 2])
    assert some.pixels is data.pixels and torch.equal(
        some.batch([1]).inputs["pixel_values"], data.batch([2]).inputs["pixel_values"]
    )
    assert data.batch([0]).inputs["pixel_values"].shape == (1, 1, 16, 16) and data.lengths.tolist() == [4] * 6


@pytest.mark.parametrize("kind", ["vit", "efficientnet"])
def test_engines_give_the_same_sums(kind: str) -> None:
    model, data = adapted(kind), pictures(kind)
    check_supported(model, BLOCK)
    trained = train_only(model, BLOCK)
    batch = data.batch(np.arange(len(data)))
    loop = LoopGradients(model, trained, loss=TASK.losses)
    norms = [joint(loop.clipped_sum(batch.one(row), max_grad_norm=np.inf)) for row in range(3)]
    for bound in (sorted(norms)[1], np.inf):
        wanted = loop.clipped_sum(batch, max_grad_norm=bound)
        for engine in (HookGradients, GhostGradients, FusedGradients):
            made = engine(model, trained, loss=TASK.losses)
            found = made.clipped_sum(batch, max_grad_norm=bound)
            made.close()
            assert joint({slot: found[slot] - wanted[slot] for slot in wanted}) <= 5e-5 * joint(wanted) > 0


def joint(tensors: dict) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def by_batch(self: PictureProcessor, pixels: np.ndarray) -> Tensor:
    """Scale pixels by their micro-batch: a mutant, by which one picture changes all others."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return (values - values.mean()) / values.std()


def worst_move(data: EncodedImages, engine: Callable, model: nn.Module) -> float:
    """Return by how many times its bound one picture moves the clipped sum, at worst: removed, or replaced."""
    trained = train_only(model, BLOCK)
    made, loop = engine(model, trained, loss=TASK.losses), LoopGradients(model, trained, loss=TASK.losses)
    bound = joint(loop.clipped_sum(data.batch([0]), max_grad_norm=np.inf)) / 3
    black = replace(data, pixels=np.concatenate([data.pixels, np.zeros_like(data.pixels[:1])]))
    worst = 0.0
    for row in range(len(data)):
        others = [other for other in range(len(data)) if other != row]
        changed = replace(black, rows=np.where(np.arange(len(data)) == row, len(data.pixels), data.rows))
        whole = made.clipped_sum(data.batch(range(len(data))), max_grad_norm=bound)
        for batch, times in ((data.batch(others), 1), (changed.batch(range(len(data))), 2)):
            found = made.clipped_sum(batch, max_grad_norm=bound)
            worst = max(worst, joint({slot: whole[slot] - found[slot] for slot in whole}) / (times * bound))
    made.close()
    return worst


@pytest.mark.parametrize("engine", [HookGradients, FusedGradients])
def test_one_picture_moves_the_clipped_sum_by_at_most_c(engine: Callable) -> None:
    assert worst_move(pictures("vit"), engine, adapted("vit")) <= 1 + 1e-5


def test_pixels_scaled_by_their_batch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PictureProcessor, "pixel_values", by_batch)
    assert worst_move(pictures("vit"), FusedGradients, adapted("vit")) > 1.05


def upper(kind: str) -> nn.Module:
    """Return a model with adapters in its upper layers only."""
    if kind == "vit":
        base, targets, layers = tiny_vit(label_names=NAMES, seed=0, num_layers=3), ["q_proj", "v_proj"], [2]
    else:
        base, targets, layers = lite(), r".*layers\.(14|15)\.(expand|project)|.*\.top", None
    config = AdapterConfig(rank=2, lora_alpha=2.0, target_modules=targets, layers=layers)
    model = attach_lora(base, config, seed=0).eval()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1
    return model


@pytest.mark.parametrize("kind", ["vit", "efficientnet"])
def test_states_of_the_prefix_give_the_logits_of_the_whole_model(kind: str) -> None:
    model, data = upper(kind), pictures(kind)
    cached, short = encode_picture_prefix(model, data, num_threads=2), without_picture_prefix(model)
    assert cached.hidden is not None and cached.hidden.shape[0] == len(data) and hasattr(short, GIVEN_STATES)
    rows = [7, 0, 3]
    with torch.no_grad():
        whole, above = (m(**d.batch(rows).inputs).logits for m, d in ((model, data), (short, cached)))
        last = first_token_only(short)(**cached.batch(rows).inputs).logits
        some = short(**cached.subset(rows).batch([0, 1, 2]).inputs).logits
    assert torch.allclose(whole, above, atol=1e-5) and torch.allclose(whole, last, atol=1e-5)
    assert torch.equal(some, above)
    check_supported(model, BLOCK)


def test_behind_a_cached_prefix_a_vit_still_computes_its_last_layer_for_one_token() -> None:
    short = first_token_only(without_picture_prefix(upper("vit")))
    assert any(type(module).__name__ == "_VitLayer" for module in short.modules())


def test_features_of_a_head_are_cached() -> None:
    config = AdapterConfig(rank=2, lora_alpha=2.0, target_modules=["top"])
    model = attach_lora(lite("mean_normalised"), config, seed=0).eval()
    data = pictures("efficientnet")
    cached = encode_picture_features(model, data)
    batch, short = cached.batch([4, 8]), without_encoder(model)
    assert cached.lengths.tolist() == [1] * 9 and batch.inputs["inputs_embeds"].shape == (2, 1, 1281)
    with torch.no_grad():
        whole, found = model(**data.batch([4, 8]).inputs).logits, short(**batch.inputs).logits
    assert torch.allclose(whole, found, atol=1e-5) and float(whole.abs().max()) > 0
    norms = torch.linalg.vector_norm(batch.inputs["inputs_embeds"][:, 0, :-1], dim=1)
    assert torch.allclose(norms, torch.ones(2), atol=1e-5)


def test_a_text_model_or_table_is_refused_for_pictures() -> None:
    from fedlr.models.network import tiny_random
    from fedlr.tasks.synthetic import synthetic_text

    table = made_up_images(6, 0)
    with pytest.raises(InputError, match="reads text; set model=pretrained_images, or task"):
        TASK.check(tiny_random(label_names=NAMES, seed=0), table, max_length=1)
    with pytest.raises(InputError, match="a table of another kind; set data=images, or task"):
        TASK.encode(tiny_vit(label_names=NAMES, seed=0), synthetic_text(6, 0), max_length=1)


def test_answers_are_scored() -> None:
    model, data = adapted("vit"), pictures("vit")
    batch: Batch = data.batch(range(len(data)))
    with torch.no_grad():
        found = TASK.evaluation(
            [TASK.answers(model, batch.rows(slice(0, 4))), TASK.answers(model, batch.rows(slice(4, 9)))]
        )
        right = float((model(**batch.inputs).logits.argmax(-1) == batch.targets).float().mean())
    assert found.accuracy == pytest.approx(right) and found.scores is not None and found.loss > 0
