"""How a released adapter for pictures is opened with plain PEFT: the lines of Python in its model card.

A test runs them.
"""

import json
from pathlib import Path

from fedlr.models.efficientnet_lite import MODEL_TYPE
from fedlr.models.network import PACKAGE_PREFIX, BaseModel
from fedlr.models.pooling import BIAS_FEATURE, NORMALISED
from fedlr.models.usage import reference
from fedlr.tasks.pictures import PictureProcessor

_CODE = """\
{imports}
folder = "."  # this folder, with the adapter
{base}
model = PeftModel.from_pretrained(base, folder).eval()
mean, std = torch.tensor({mean}), torch.tensor({std})


@torch.no_grad()
def classify(pictures):
    \"\"\"Return the probability of each label, one row a picture of Pillow.\"\"\"
    size, smooth = ({width}, {height}), Image.Resampling.BICUBIC
    sized = [ImageOps.fit(picture.convert("{mode}"), size, smooth) for picture in pictures]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).reshape({height}, {width}, -1) for picture in sized])
    return model(pixel_values=((pixels / 255 - mean) / std).permute(0, 3, 1, 2)).logits.softmax(dim=-1)


print(classify([Image.new("RGB", (300, 200), "red"), Image.new("RGB", (64, 64), "white")]))
"""

_LOADED = """\
base = AutoModelForImageClassification.from_pretrained(
    {where}, num_labels={num_labels}, ignore_mismatched_sizes=True, dtype=torch.float32{sized}
)"""

_POOLED = """\
class Classifier(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.config, self.{prefix}, self.base_model_prefix = encoder.config, encoder, "{prefix}"
        self.classifier = torch.nn.Linear({num_features}, {num_labels}, bias=False)

    def forward(self, pixel_values, **others):
        states = self.{prefix}(pixel_values).last_hidden_state
        {pool}
        features = torch.nn.functional.pad(vectors, (0, 1), value={bias})
        return SequenceClassifierOutput(logits=self.classifier(features))


base = Classifier(AutoModelForImageClassification.from_pretrained({where}, dtype=torch.float32{sized}).base_model)"""

_POOL = {"cls": "vectors = states[:, 0]", "mean": "vectors = states.mean(1)", "last": "vectors = states[:, -1]"}
_NORMALISE = "vectors = torch.nn.functional.normalize(vectors, dim=-1)"
_MADE = """\
# The base model has random weights, and is published nowhere: fedlr makes it again.
base = tiny_vit({arguments}).network"""


def picture_usage(base: BaseModel, processor: PictureProcessor) -> str:
    """Return Python that opens an adapter on its base model and reads several pictures at once.

    It is run in the adapter's folder, and depends on fedlr only where the network is fedlr's own.
    """
    imports = ["import numpy as np", "import torch", "from peft import PeftModel", "from PIL import Image, ImageOps"]
    if base.made is not None:
        imports += ["", "from fedlr.models.vision import tiny_vit"]
        loading = _MADE.format(arguments=", ".join(f"{name}={value!r}" for name, value in base.made.items()))
    else:
        imports += ["from transformers import AutoModelForImageClassification"]
        if base.pooling is not None:
            imports += ["from transformers.modeling_outputs import SequenceClassifierOutput"]
        where = json.dumps(location := reference(base.source), ensure_ascii=False)
        note = ""
        if location.startswith(PACKAGE_PREFIX):
            package, _, inside = location.removeprefix(PACKAGE_PREFIX).partition("/")
            imports = ["from importlib.util import find_spec", "", *imports]
            where = f'find_spec("{package}").submodule_search_locations[0] + {json.dumps("/" + inside)}'
        elif Path(location).is_absolute():
            note = "# A folder of the machine that trained: put in where yours is; it must have the SHA-256 above.\n"
        if base.network.config.model_type == MODEL_TYPE:
            imports += ["", "import fedlr.models.efficientnet_lite  # the network, which transformers does not have"]
        loading = note + _loading(base, where, processor)
    return _CODE.format(
        imports="\n".join(imports) + "\n",
        base=loading,
        mean=list(processor.mean),
        std=list(processor.std),
        width=processor.width,
        height=processor.height,
        mode="RGB" if len(processor.mean) == 3 else "L",
    )


def _loading(base: BaseModel, where: str, processor: PictureProcessor) -> str:
    config = base.network.config
    own = config.model_type == MODEL_TYPE
    num_labels = len(config.id2label or {})
    sized = f", image_size={processor.height}, has_top={config.has_top}" if own else ""
    if base.pooling is None:
        return _LOADED.format(where=where, num_labels=num_labels, sized=sized)
    pool = _POOL[base.pooling.removesuffix(NORMALISED)]
    return _POOLED.format(
        where=where,
        sized=sized,
        prefix=base.network.base_model_prefix,
        num_features=base.network.num_features,
        num_labels=num_labels,
        pool=f"{pool}\n        {_NORMALISE}" if base.pooling.endswith(NORMALISED) else pool,
        bias=BIAS_FEATURE,
    )
