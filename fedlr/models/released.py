"""An adapter that a run released, opened again: from its own two files, which must be those that the run wrote.

The folder may come from anywhere. PEFT would import modules that some keys of an `adapter_config.json` name, and would
read a pickle where the safetensors file is missing: neither is reached.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from fedlr.data.public import file_sha256
from fedlr.errors import InputError
from fedlr.errors.messages import first_line, one_line, shown
from fedlr.models.network import AdaptedModel, BaseModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES_CODE = ("auto_mapping", "megatron_config")  # keys by which PEFT imports what a file names
_MOST_CONFIG = 1_000_000  # bytes


def released_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that an adapter is read from, by name.

    Raises:
        InputError: if one of them is missing or cannot be read.
    """
    try:
        return {name: file_sha256(folder / name) for name in (CONFIG, TENSORS)}
    except OSError as error:
        raise InputError(f"Expected {CONFIG} and {TENSORS} in {folder}, got: {error.strerror or error}") from error


def open_released(base: BaseModel, folder: Path, *, files: Mapping[str, Any]) -> AdaptedModel:
    """Return a base model with a released adapter, for scoring.

    Args:
        base: of the run; PEFT wraps its network.
        folder: of the adapter.
        files: SHA-256 of both files as the run recorded them.

    Raises:
        InputError: a file is missing or was changed; the adapter is no adapter of this base; its configuration names
            code.
    """
    found = released_files(folder)
    for name, sha256 in found.items():
        if files.get(name) != sha256:
            raise InputError(
                f"Expected {folder / name} as the run wrote it (SHA-256 {files.get(name)!s:.16}), got another "
                f"({sha256:.16}): it was changed since"
            )
    _check_config(folder / CONFIG)
    try:
        model = PeftModel.from_pretrained(base.network, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        why = first_line(error)
        raise InputError(f"Expected an adapter of {base.source} in {folder}, got another: {why:.200}") from error
    return model.eval()


def _check_config(path: Path) -> None:
    try:
        data = path.read_bytes()
        config = json.loads(data[:_MOST_CONFIG])
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Expected a PEFT configuration in {path}, got: {one_line(error):.100}") from error
    if not isinstance(config, dict):
        raise InputError(f"Expected a PEFT configuration in {path}, got a {type(config).__name__}")
    for key in NAMES_CODE:
        if config.get(key):
            raise InputError(f"Expected {key} to be null in {path}, got {shown(config[key])}: it names code to import")
