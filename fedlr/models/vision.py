"""Base models for pictures: image classifiers of transformers, and a tiny one for tests.

They are loaded as those for text are (`fedlr.models.network`): safetensors only, no remote code, a head from the run's
seed or from zero, dropout off. What a model reads of a picture, its `preprocessor_config.json` says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.image_processing_base import ImageProcessingMixin

from fedlr.errors import InputError, in_range
from fedlr.models.efficientnet_lite import MODEL_TYPE  # lets its folders be loaded by transformers
from fedlr.models.network import BaseModel, _not_loaded, frozen, resolve, seeded, with_head
from fedlr.models.pooling import POOLINGS
from fedlr.tasks.pictures import PictureProcessor

PATCH = 16  # pixels of a side: what a picture costs where its model has no patches of its own


def pretrained_images(
    *,
    name_or_path: str,
    label_names: Sequence[str],
    seed: int,
    published_as: str | None = None,
    head_std: float | None = 0,
    pooling: str | None = None,
    image_size: int | None = None,
    has_top: bool = True,
    fetched_by: str | None = None,
) -> BaseModel:
    """Load an image classifier by Hugging Face name, from a local folder, or from an installed package.

    Args:
        name_or_path: a hub name (`google/vit-base-patch16-224`), a folder, or `pkg:PACKAGE/FOLDER`.
        label_names: one name a class, in the order of the label indices.
        seed: draws the tensors that the checkpoint lacks.
        published_as: the name by which others can get the same base model; written into exported adapters.
        head_std: standard deviation of a new head's weights; None: the model's own initializer_range; 0: the last layer
            of the head is zero, so it must train.
        pooling: what the head reads of a picture's states, one of `models.pooling.POOLINGS`; None: what the class does.
        image_size: side of a picture, for a network without positions; None: the model's own.
        has_top: of EfficientNet-lite, whether its last convolution, to 1280 channels, is there; false: the head reads
            the 320 of the last block.
        fetched_by: the command that fetches the folder, told where it is missing.

    Raises:
        InputError: if nothing can be loaded from there, with what to change.
    """
    if fetched_by is not None and not Path(name_or_path).expanduser().is_dir():
        raise InputError(f"There is no model folder {name_or_path!r}; fetch it with: {fetched_by}")
    location = resolve(name_or_path)
    if head_std is not None and head_std != 0:
        in_range(1e-9, 1e3, **{"model.head_std": head_std})
    if pooling not in (None, *POOLINGS):
        raise InputError(f"Expected model.pooling to be null, or one of {', '.join(POOLINGS)}, got {pooling!r}")
    drawn = {"initializer_range": head_std} if head_std else {}
    sized: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    sized |= {} if has_top else {"has_top": False}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(location)
        with seeded(seed):
            network, report = AutoModelForImageClassification.from_pretrained(
                location,
                num_labels=len(label_names),
                id2label=dict(enumerate(label_names)),
                label2id={name: index for index, name in enumerate(label_names)},
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **drawn,
                **sized,
            )
    except InputError:
        raise
    except Exception as error:  # each of the formats in such a folder has errors of its own
        raise _not_loaded(name_or_path, location, error) from error
    if not has_top and network.config.model_type != MODEL_TYPE:
        raise InputError(f"Expected model.has_top=true for {name_or_path}, which is no EfficientNet-lite, got false")
    config = network.config
    network, parts = with_head(
        network, report, num_labels=len(label_names), seed=seed, head_std=head_std, pooling=pooling
    )
    return frozen(network, _processor(config, settings, name_or_path), published_as or name_or_path, **parts)


def tiny_vit(
    *,
    label_names: Sequence[str],
    seed: int,
    image_size: int = 16,
    patch_size: int = 4,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
) -> BaseModel:
    """Build a ViT with random weights: for tests that take seconds."""
    in_range(1, 4096, hidden_size=hidden_size, image_size=image_size, patch_size=patch_size)
    in_range(1, 256, num_layers=num_layers, num_heads=num_heads)
    if hidden_size % num_heads or image_size % patch_size:
        raise InputError(
            f"Expected hidden_size to be a multiple of num_heads={num_heads}, and image_size of "
            f"patch_size={patch_size}, got {hidden_size} and {image_size}"
        )
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=2 * hidden_size,
        # The default of 0.02 gives a network of this width nothing to adapt.
        initializer_range=0.2,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    with seeded(seed):
        network = AutoModelForImageClassification.from_config(config)
    sizes = {"image_size": image_size, "patch_size": patch_size, "hidden_size": hidden_size}
    sizes |= {"num_layers": num_layers, "num_heads": num_heads}
    made = {"label_names": list(label_names), "seed": seed, **sizes}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return frozen(network, _processor(config, half, "tiny-vit"), "tiny-vit", made=made)


def _processor(config: Any, settings: Mapping[str, Any], name: str) -> PictureProcessor:
    """Return what a model reads of a picture, by its own files."""
    size = getattr(config, "image_size", None) or _side(settings.get("size") or settings.get("crop_size"))
    height, width = (size, size) if isinstance(size, int) else tuple(size or (0, 0))
    if not isinstance(height, int) or not 1 <= height <= 4096 or not 1 <= width <= 4096:
        raise InputError(f"Expected image_size in the config.json of {name}, the side of its pictures, got {size!r}")
    if not settings.get("do_rescale", True) or abs(float(settings.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-6:
        raise InputError(f"Expected a processor of {name} that reads pixels from 0 to 1, got another rescale_factor")
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * config.num_channels, [1.0] * config.num_channels
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != config.num_channels:
        raise InputError(
            f"Expected image_mean and image_std of {config.num_channels} channels in the preprocessor_config.json of "
            f"{name}, got {mean!r} and {std!r}"
        )
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) else PATCH
    num_patches = max(1, (height // patch) * (width // patch))
    return PictureProcessor(height, width, tuple(map(float, mean)), tuple(map(float, std)), num_patches)


def _side(size: Any) -> Any:
    if not isinstance(size, Mapping):
        return size
    return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
