"""EfficientNet-lite0 of linear layers and folded norms is the convolutional network with frozen batch norms.

Mutants this file kills: another padding of strided convolutions, a norm folded with another epsilon, a block that adds
what came in where it may not, pixels that are ordered by column.
"""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlr.errors import InputError
from fedlr.models import efficientnet_lite
from fedlr.models.efficientnet_lite import (
    STAGES,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    folded,
)
from fedlr.simulations.torch_archive import legacy_tensors, read_plain


def published() -> dict[str, Tensor]:
    """Make tensors by the names and of the shapes of the published ones."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def add(name: str, norm: str, *shape: int) -> None:
        fan = shape[1] * shape[2] * shape[3]
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        for part, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            found[f"{norm}.{part}"] = torch.rand(shape[0], generator=generator) + least

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    index, inside = 0, 32
    for blocks, kernel, _, expansion, outside in STAGES:
        for _ in range(blocks):
            place, wide = f"_blocks.{index}", inside * expansion
            if expansion > 1:
                add(f"{place}._expand_conv", f"{place}._bn0", wide, inside, 1, 1)
            add(f"{place}._depthwise_conv", f"{place}._bn1", wide, 1, kernel, kernel)
            add(f"{place}._project_conv", f"{place}._bn2", outside, wide, 1, 1)
            index, inside = index + 1, outside
    add("_conv_head", "_bn1", 1280, inside, 1, 1)
    found["_fc.weight"], found["_fc.bias"] = torch.randn(7, 1280, generator=generator) / 36, torch.zeros(7)
    return found


def reference(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the published network as it is published: convolutions, batch norms that know their statistics."""

    def layer(x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight, side = tensors[f"{name}.weight"], x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
        padded = F.pad(x, (total // 2, total - total // 2) * 2)
        y = F.conv2d(padded, weight, stride=stride, groups=groups)
        stats = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(y, *stats, training=False, eps=1e-3)

    x, index, inside = F.relu6(layer(x, "_conv_stem", "_bn0", 2)), 0, 32
    for blocks, _, first_stride, expansion, outside in STAGES:
        for number in range(blocks):
            place, stride = f"_blocks.{index}", first_stride if number == 0 else 1
            y = F.relu6(layer(x, f"{place}._expand_conv", f"{place}._bn0")) if expansion > 1 else x
            y = F.relu6(layer(y, f"{place}._depthwise_conv", f"{place}._bn1", stride, y.shape[1]))
            y = layer(y, f"{place}._project_conv", f"{place}._bn2")
            x = x + y if stride == 1 and inside == outside else y
            index, inside = index + 1, outside
    x = F.relu6(layer(x, "_conv_head", "_bn1"))
    return F.linear(x.mean(dim=(2, 3)), tensors["_fc.weight"], tensors["_fc.bias"])


def ours(tensors: dict[str, Tensor], image_size: int) -> EfficientNetLiteForImageClassification:
    network = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(image_size=image_size, num_labels=7))
    network.load_state_dict(folded(tensors))
    return network.eval()


def difference(image_size: int) -> float:
    tensors = published()
    x = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)) * 4 - 2
    with torch.no_grad():
        expected, found = reference(tensors, x), ours(tensors, image_size)(x).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("image_size", [64, 96])
def test_logits_are_those_of_the_network_with_batch_norms(image_size: int) -> None:
    assert difference(image_size) < 1e-5


@pytest.mark.parametrize("mutant", ["padding", "columns"])
def test_another_padding_or_order_of_pixels_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "padding":
        monkeypatch.setattr(efficientnet_lite, "_padded", lambda x, k, s: F.pad(x, (k // 2,) * 4))
    else:
        monkeypatch.setattr(efficientnet_lite, "_flat", lambda x: x.permute(0, 3, 2, 1).flatten(1, 2))
    assert difference(64) > 1e-3


def test_a_side_that_32_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 32, got 100"):
        EfficientNetLiteForImageClassification(EfficientNetLiteConfig(image_size=100))


def test_an_old_archive_is_read_as_data() -> None:
    tensors = {"weight": torch.arange(6.0).view(2, 3).T, "steps": torch.tensor([7])}
    sink = io.BytesIO()
    torch.save(tensors, sink, _use_new_zipfile_serialization=False)
    found = legacy_tensors(sink.getvalue())
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    for cut in (0, 30, len(sink.getvalue()) // 2):
        with pytest.raises(InputError):
            legacy_tensors(sink.getvalue()[:cut])


def test_code_in_an_archive_stays_text() -> None:
    called = read_plain(io.BytesIO(b"cos\nsystem\n(X\x02\x00\x00\x00lstR."))
    assert called == ("call", "os system", ("ls",))
    with pytest.raises(InputError, match="opcodes of a state dict, got INST"):
        read_plain(io.BytesIO(b"(ios\nsystem\n."))


def test_without_its_top_the_network_ends_with_the_last_block() -> None:
    tensors = published()
    whole, config = ours(tensors, 64), EfficientNetLiteConfig(image_size=64, num_labels=7)
    config.has_top = False  # as from_pretrained sets what a caller gives
    short = EfficientNetLiteForImageClassification(config)
    assert short.config.hidden_size == short.classifier.in_features == 320
    short.load_state_dict(
        {k: v for k, v in folded(tensors).items() if ".top." not in k and "classifier" not in k}, strict=False
    )
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = short.eval().efficientnet(x).last_hidden_state
        assert torch.equal(F.relu6(whole.efficientnet.top(states)), whole.efficientnet(x).last_hidden_state)
