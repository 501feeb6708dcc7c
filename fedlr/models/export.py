"""The released adapter: a folder that any PEFT tool opens."""

import json
import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import AdapterState
from fedlr.files import whole_folder
from fedlr.models.network import BaseModel
from fedlr.models.peft_state import ADAPTER_NAME, adapted_layers, base_layers, head_parts, write_adapter
from fedlr.models.picture_usage import picture_usage
from fedlr.models.pooling import NORMALISED, PooledClassifier
from fedlr.models.served import generation_settings, with_one_rank
from fedlr.models.tuners.exported import INSIDE, portable, title_of
from fedlr.models.usage import reference, usage
from fedlr.tasks.pictures import PictureProcessor

CARD = """\
---
base_model: {base}
library_name: peft
tags: [{tag}, federated-learning, differential-privacy]
---
# {name}

{article} {system} adapter for `{base}`, trained by a federation with `{method}` (fedlr).
Base tensors: SHA-256 `{base_sha256}`. {reading}{released}
{personal}
In this folder:

```python
{usage}```

{labels}Adapter tensors: SHA-256 `{adapter_sha256}`.

## Privacy statement
{statement}

The full statement, with what it does not cover:

```json
{statement_json}
```
"""

PERSONAL = """
Every client kept {roles} to itself, and was scored with its own: here is the part they share, with the start's {roles}.
"""


def export_adapter(
    model: PeftModel,
    adapter: AdapterState,
    folder: Path,
    *,
    name: str,
    method: str,
    base: BaseModel,
    max_length: int,
    statement: dict[str, Any],
    personal: Sequence[str] = (),
    has_pairs: bool = False,
    released: str = "",
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a model card with the privacy statement.

    `released` says which model of the run it is.

    The tokenizer lies beside it, with the run's pad token, and the card's lines of Python open both (`models.usage`).

    Plain `PeftModel.from_pretrained(base, folder)` gives the same logits to rounding; where features are pooled by us
    the card defines that base, in a few lines without fedlr. A frozen random head is included, because a base model
    loaded anew would draw another one. What the server folded away stands beside the factors, as ranks of the layers
    more, and each layer has its own rank; of a language model all have the largest (`models.served`), and what ends an
    answer is written too. The folder is whole or absent.
    """
    write_adapter(model, adapter.tensors)
    system = title_of(model)
    layers = adapted_layers(model)
    if any(path in adapter.side or rank != layers[path].r[ADAPTER_NAME] for path, rank in adapter.ranks().items()):
        _set_ranks(model, adapter)
    model = portable(model, adapter.side)
    config = cast(LoraConfig, model.peft_config[ADAPTER_NAME])
    source, is_causal = reference(base.source), base.task_type == "CAUSAL_LM"
    if is_causal and isinstance(config, LoraConfig):
        with_one_rank(model)
    config.base_model_name_or_path = source
    if not isinstance(config.target_modules, str | None):
        config.target_modules = _target_modules(model, config.target_modules)
    card = CARD.format(
        name=name,
        article="An" if system == "IA3" else "A",
        system=system,
        personal=PERSONAL.format(roles=", ".join(personal)) if personal else "",
        tag=str(config.peft_type).rpartition(".")[2].lower(),
        method=method,
        base=source,
        base_sha256=base.fingerprint,
        reading=reading_text(base),
        released=f" {released[0].upper()}{released[1:]}." if released else "",
        usage=usage_of(base, max_length=max_length, has_pairs=has_pairs),
        labels="" if is_causal else labels_text(model),
        adapter_sha256=adapter.fingerprint(),
        statement=statement["statement"],
        statement_json=json.dumps(statement, indent=2),
    )
    with whole_folder(folder) as partial:
        # Embeddings never train here; left to guess, PEFT asks the hub for the base model's vocabulary.
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        base.tokenizer.save_pretrained(str(partial))
        if is_causal:
            generation_settings(base).save_pretrained(str(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")


def usage_of(base: BaseModel, *, max_length: int, has_pairs: bool) -> str:
    """Return the Python of the card that opens an adapter on its base, whatever the base reads."""
    if isinstance(base.tokenizer, PictureProcessor):
        return picture_usage(base, base.tokenizer)
    return usage(base, max_length=max_length, has_pairs=has_pairs)


def reading_text(base: BaseModel) -> str:
    """Say how a row comes into the model."""
    if base.task_type == "CAUSAL_LM":
        return template_text(base)
    return pooling_text(base.pooling, row="picture" if isinstance(base.tokenizer, PictureProcessor) else "text")


def labels_text(model: PeftModel) -> str:
    """Say which class each index stands for."""
    labels = cast(PreTrainedModel, model.get_base_model()).config.id2label or {}
    return f"Labels: {', '.join(f'{index} = {label}' for index, label in sorted(labels.items()))}. "


def template_text(base: BaseModel) -> str:
    """Say by which chat template conversations were written; the tokenizer beside the adapter has it."""
    template = base.tokenizer.chat_template
    if not isinstance(template, str):
        return "It continues plain texts."
    return f"Conversations were written by the chat template of SHA-256 `{sha256(template.encode()).hexdigest()}`."


def pooling_text(pooling: str | None, *, row: str = "text") -> str:
    """Say what the head reads of a text or a picture.

    >>> pooling_text("mean_normalised")
    'The head reads the mean over the tokens of a text, of length 1 (pooling `mean_normalised`).'
    """
    if pooling is None:
        return f"The head reads a {row} as the base model's own class does (pooling `null`)."
    what = {"cls": "the first token", "mean": "the mean over the tokens", "last": "the last token"}
    length = ", of length 1" if pooling.endswith(NORMALISED) else ""
    return f"The head reads {what[pooling.removesuffix(NORMALISED)]} of a {row}{length} (pooling `{pooling}`)."


def _target_modules(model: PeftModel, names: Collection[str]) -> list[str]:
    """Return what the configuration says of its layers, sorted: the same file for the same adapter.

    Where a name would also stand for a layer of the head, which has no adapter, or for one that was taken out of the
    base (a pooler that nothing reads), the layers' whole paths.
    """
    if isinstance(model.get_base_model(), PooledClassifier):
        return sorted(path.removeprefix(INSIDE) for path in base_layers(model))
    heads = [path for path, (_, part) in head_parts(model).items() if isinstance(part, nn.Linear)]
    if any(path.endswith(f".{name}") for path in heads for name in names):
        return sorted(path.removeprefix(INSIDE) for path in base_layers(model))
    return sorted(names)


def _set_ranks(model: PeftModel, adapter: AdapterState) -> None:
    """Give each layer its rank, its side product as further ranks, at most min(D, K) in all; the scale stays."""
    config = cast(LoraConfig, model.peft_config[ADAPTER_NAME])
    config.use_rslora = False  # the patterns give the scale as alpha / rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    products = adapter.products()
    for path, layer in adapted_layers(model).items():
        total = LowRankSum(max_rank=min(len(products[path].lora_B), products[path].lora_A.shape[1]))
        total.add(products[path])
        both = total.factors()
        rank = len(both.lora_A)
        for factor, tensor in ((layer.lora_A, both.lora_A.float()), (layer.lora_B, both.lora_B.float())):
            linear = nn.Linear(tensor.shape[1], len(tensor), bias=False)
            linear.weight = nn.Parameter(tensor.contiguous())
            factor[ADAPTER_NAME] = linear
        name = path.removeprefix("base_model.model.")
        config.rank_pattern[f"^{re.escape(name)}"] = rank
        config.alpha_pattern[f"^{re.escape(name)}"] = adapter.scale * rank
