"""The released adapter: a folder that any PEFT tool opens."""

import json
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from fedlr.adapter import ADAPTER_NAME, AdapterState, write_adapter

CARD = """\
---
base_model: {base}
library_name: peft
tags: [lora, federated-learning, differential-privacy]
---
# {name}

A LoRA adapter for `{base}`, trained by a federation with `{method}` (fedlr). Base tensors: SHA-256 `{base_sha256}`.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={num_labels})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
merged = model.merge_and_unload()
```

Labels: {labels}. Adapter tensors: SHA-256 `{adapter_sha256}`.

## Privacy statement
{statement}

The full statement, with what it does not cover:

```json
{statement_json}
```
"""


def export_adapter(
    model: PeftModel,
    adapter: AdapterState,
    folder: Path,
    *,
    name: str,
    method: str,
    base: str,
    base_sha256: str,
    statement: dict[str, Any],
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a model card with the privacy statement.

    Plain `PeftModel.from_pretrained(base, folder)` gives the same logits to rounding; a frozen random head is included,
    because a base model loaded anew would draw another one. The folder is whole or absent.
    """
    write_adapter(model, adapter.tensors)
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = base
    partial = folder.with_name(folder.name + ".partial")
    # Embeddings never train here; left to guess, PEFT asks the hub for the base model's vocabulary.
    model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
    labels = cast(PreTrainedModel, model.get_base_model()).config.id2label or {}
    card = CARD.format(
        name=name,
        method=method,
        base=base,
        base_sha256=base_sha256,
        num_labels=len(labels),
        labels=", ".join(f"{index} = {label}" for index, label in sorted(labels.items())),
        adapter_sha256=adapter.fingerprint(),
        statement=statement["statement"],
        statement_json=json.dumps(statement, indent=2),
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(folder)
