"""What a reader needs to check the numbers and to use the adapter: commands, configuration, versions."""

from fedlr.report.layout import code, details, paragraph, table
from fedlr.report.run_files import Run

AUTO_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}


def reproduce(run: Run) -> list[str]:
    """Return the HTML of the last section."""
    versions = [[str(name), str(version)] for name, version in sorted(run.versions.items())]
    return [
        paragraph("Recompute privacy.json from the ledger alone, in the folder of this report:"),
        code("fedlr statement ."),
        paragraph("Load the adapter with plain PEFT, in the same folder (no fedlr needed):"),
        code(loading_snippet(run)),
        paragraph("SHA-256 of the adapter's tensors:"),
        code(run.summary.adapter_sha256),
        details("Resolved configuration (config.yaml)", [code(run.config)]),
        details("Versions (versions.json)", [table(["Package", "Version"], versions, text_columns=2)]),
    ]


def loading_snippet(run: Run) -> str:
    """Return the lines of Python that load the adapter on its base model."""
    base = run.adapter_config.get("base_model_name_or_path") or "THE_BASE_MODEL"
    auto_class = AUTO_CLASSES.get(str(run.adapter_config.get("task_type")), "AutoModelForSequenceClassification")
    labels = (
        f", num_labels={len(run.partition.labels)}" if run.partition and auto_class.endswith("Classification") else ""
    )
    return (
        f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f"base = {auto_class}.from_pretrained({str(base)!r}{labels})\n"
        'model = PeftModel.from_pretrained(base, "adapter")'
    )
