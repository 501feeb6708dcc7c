"""EfficientNet-lite0 as a classifier that every engine here can train: a convolutional network of 4.65 M parameters.

Notable choices:

* Batch norm would mix the examples of a batch. Frozen, it is an affine map, and is folded into the convolution before
  it when the weights are fetched: there is none in this network.
* A convolution of one pixel is a linear layer over pixels, and is one here: LoRA, clipping and per-example gradients
  treat it as any linear layer. Maps are (N, T, C), the T pixels of a square row by row, like tokens.
* Strided convolutions pad as TensorFlow's "same" does, which for sides that 32 divides is fixed.

The names are those by which adapters and caches find their way: `embeddings` is the stem, `layers` are the 16 blocks,
`top` is the last convolution before the mean over the map.

Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946, table 1, in the "lite" form of its authors: without squeeze
and excitation, ReLU6 for swish. Legend: N pictures, T pixels of a map, C channels, K classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from fedlr.errors import InputError

MODEL_TYPE = "fedlr_efficientnet_lite"
# Of each stage: blocks, side of the kernel, stride of the first block, expansion, channels that leave.
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
STEM, TOP = 32, 1280
STRIDE = 32  # pixels of a picture's side for one of the last map's


class EfficientNetLiteConfig(PretrainedConfig):
    """Shape of the network; `image_size` is the side of a picture, a multiple of 32.

    Without its top the network ends with the last block: a fourth of the features, and of a head's noise.
    """

    model_type = MODEL_TYPE

    def __init__(self, image_size: int = 224, has_top: bool = True, **others: Any) -> None:
        self.image_size, self.has_top, self.num_channels, self.hidden_size = image_size, has_top, 3, TOP
        self.initializer_range = others.pop("initializer_range", 0.02)
        super().__init__(**{key: value for key, value in others.items() if key not in ("num_channels", "hidden_size")})


class Stem(nn.Module):
    """The first convolution, from a picture to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, STEM, 3, stride=2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (N, 3, side, side) to (N, T, C)."""
        pixels = pixel_values.to(self.convolution.weight.dtype)
        return _flat(F.relu6(self.convolution(_padded(pixels, 3, 2))))


class Block(nn.Module):
    """A wider map, a convolution of each channel by itself, a narrower map; added to what came in where they fit."""

    def __init__(self, inside: int, outside: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = nn.Linear(inside, wide) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride=stride, groups=wide)
        self.project = nn.Linear(wide, outside)
        self.adds = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, C) to (N, T / stride², C')."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        side = math.isqrt(wide.shape[1])
        square = wide.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        kernel, stride = self.depthwise.kernel_size[0], self.depthwise.stride[0]
        y: Tensor = self.project(_flat(F.relu6(self.depthwise(_padded(square, kernel, stride)))))
        return x + y if self.adds else y


class _OfLite(PreTrainedModel):
    config_class = EfficientNetLiteConfig
    base_model_prefix, main_input_name = "efficientnet", "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.zero_()


class EfficientNetLiteModel(_OfLite):
    """The network below the head."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        if config.image_size % STRIDE:
            raise InputError(f"Expected image_size to be a multiple of {STRIDE}, got {config.image_size}")
        config.hidden_size = TOP if config.has_top else STAGES[-1][-1]  # has_top may be set after the file was read
        self.embeddings = Stem()
        self.layers, inside = nn.ModuleList(), STEM
        for blocks, kernel, stride, expansion, outside in STAGES:
            for index in range(blocks):
                step = stride if index == 0 else 1
                self.layers.append(Block(inside, outside, kernel=kernel, stride=step, expansion=expansion))
                inside = outside
        self.top = nn.Linear(inside, TOP) if config.has_top else None
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_others: object) -> BaseModelOutput:
        """Map pictures (N, 3, side, side) to the last map (N, T, 1280), or (N, T, 320) without the top."""
        states = self.embeddings(pixel_values)
        for layer in self.layers:
            states = layer(states)
        return BaseModelOutput(last_hidden_state=states if self.top is None else F.relu6(self.top(states)))


class EfficientNetLiteForImageClassification(_OfLite):
    """The network and a linear head on the mean of its last map."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.efficientnet = EfficientNetLiteModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_others: object) -> ImageClassifierOutput:
        """Map pictures (N, 3, side, side) to logits (N, K)."""
        states = self.efficientnet(pixel_values).last_hidden_state
        return ImageClassifierOutput(logits=self.classifier(states.mean(dim=1)))


AutoConfig.register(MODEL_TYPE, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True)


def folded(published: dict[str, Tensor], *, eps: float = 1e-3) -> dict[str, Tensor]:
    """Return the published tensors by the names of `EfficientNetLiteForImageClassification`, batch norms folded in.

    Args:
        published: those of efficientnet-lite0 for PyTorch (`_blocks.0._expand_conv.weight`, ...).
        eps: of the batch norms.
    """
    places = {"_conv_stem": ("_bn0", "embeddings.convolution"), "_conv_head": ("_bn1", "top")}
    for index in range(sum(blocks for blocks, *_ in STAGES)):
        for ours, (theirs, norm) in _PARTS.items():
            if f"_blocks.{index}.{theirs}.weight" in published:
                places[f"_blocks.{index}.{theirs}"] = (f"_blocks.{index}.{norm}", f"layers.{index}.{ours}")
    found = {f"classifier.{name}": published[f"_fc.{name}"].clone() for name in ("weight", "bias")}
    for theirs, (norm, ours) in places.items():
        values = {
            name: published[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
        }
        scale = values["weight"] / (values["running_var"] + eps).sqrt()
        weight = published[f"{theirs}.weight"].double() * scale[:, None, None, None]
        if not ours.endswith(("convolution", "depthwise")):
            weight = weight.flatten(1)
        found[f"efficientnet.{ours}.weight"] = weight.float().contiguous()
        found[f"efficientnet.{ours}.bias"] = (values["bias"] - values["running_mean"] * scale).float()
    return found


_PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def _flat(x: Tensor) -> Tensor:
    """Return (N, T, C) of (N, C, side, side)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad (N, C, side, side) with zeros: the result of a convolution has side / stride pixels; the odd one is last."""
    total = max(kernel - stride, 0)
    before = total // 2
    return F.pad(x, (before, total - before, before, total - before))
