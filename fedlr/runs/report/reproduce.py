"""What a reader needs to check the numbers and to use the adapter: commands, configuration, versions."""

from pathlib import PurePath

import yaml

from fedlr.runs.report.layout import code, details, paragraph, table
from fedlr.runs.report.run_files import Run

AUTO_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
POOLED = "class Classifier(torch.nn.Module):"  # of a card's Python (fedlr.models.usage)
PACKAGE = "pkg:"  # a model inside an installed package (fedlr.models.network.resolve)


def reproduce(run: Run) -> list[str]:
    """Return the HTML of the last section."""
    versions = [[str(name), str(version)] for name, version in sorted(run.versions.items())]
    return [
        paragraph("Recompute privacy.json from the ledger alone, in the folder of this report:"),
        code("fedlr statement ."),
        *loading(run),
        paragraph("SHA-256 of the adapter's tensors:"),
        code(run.summary.adapter_sha256),
        details("Resolved configuration (config.yaml)", [code(run.config)]),
        details("Versions (versions.json)", [table(["Package", "Version"], versions, text_columns=2)]),
    ]


def loading(run: Run) -> list[str]:
    """Return the HTML that says how the adapter is loaded, by where its base model is."""
    base = base_of(run)
    if base is None:
        return [
            paragraph(
                "The base model of this run was made up from its seed and is in no hub and no folder: there is nothing "
                "to load the adapter on. Run with model=pretrained for an adapter that others can use."
            )
        ]
    where = "in the folder of this report"
    if base.startswith(PACKAGE):
        how = f"Load the adapter with PEFT, {where} (fedlr finds the base model in an installed package):"
    elif is_folder(base):
        how = (
            f"Load the adapter with plain PEFT, {where}. The base model is a folder of the machine that trained it"
            f"{'' if PurePath(base).is_absolute() else ', named from where the run was started'}: put your own path."
        )
    else:
        how = f"Load the adapter with plain PEFT, {where} (no fedlr needed; {base} is a name of the Hugging Face hub):"
    if POOLED in run.card:  # no class of transformers has this head: the card defines it
        opening = "Load the adapter with plain PyTorch, transformers and PEFT, in its folder (adapter/):"
        return [paragraph(opening), code(run.card.partition("```python\n")[2].partition("```")[0])]
    return [paragraph(how), code(loading_snippet(run, base))]


def base_of(run: Run) -> str | None:
    """Return the name or path of the base model; None of one that no file or hub holds."""
    parsed = yaml.safe_load(run.config)
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if isinstance(model, dict) and "name_or_path" not in model:
        return None
    return str(run.adapter_config.get("base_model_name_or_path") or "THE_BASE_MODEL")


def is_folder(base: str) -> bool:
    """Return whether a base model is named by a path: a hub has names of at most two parts.

    >>> is_folder("./encoder"), is_folder("a/b/c"), is_folder("FacebookAI/roberta-base")
    (True, True, False)
    """
    return base.startswith((".", "/", "~")) or base.count("/") > 1


def loading_snippet(run: Run, base: str) -> str:
    """Return the lines of Python that load the adapter on its base model."""
    auto_class = AUTO_CLASSES.get(str(run.adapter_config.get("task_type")), "AutoModelForSequenceClassification")
    labels = (
        f", num_labels={len(run.partition.labels)}" if run.partition and auto_class.endswith("Classification") else ""
    )
    place, found = repr(base), ""
    if base.startswith(PACKAGE):
        place, found = f"resolve({base!r})", "from fedlr.models.network import resolve\n"
    return (
        f"{found}from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f"base = {auto_class}.from_pretrained({place}{labels})\n"
        'model = PeftModel.from_pretrained(base, "adapter")'
    )
