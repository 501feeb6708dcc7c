"""Models that lie in one GGUF file, as llama.cpp keeps them: converted once into a folder that transformers reads.

The weights are de-quantised: they are those of the file, not of the model that it was made from. The folder is named by
the SHA-256 of the file, is whole or absent, and lies in the cache: $FEDLR_CACHE, else $XDG_CACHE_HOME/fedlr, else
~/.cache/fedlr.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.files import cache_folder, make_folder, whole_folder

FORMAT = 1  # of the converted folders


def gguf_in(folder: str | Path) -> Path | None:
    """Return the only GGUF file of a folder that holds no model of another kind; None where there is none.

    Raises:
        InputError: if there are several.
    """
    inside = Path(folder)
    if not inside.is_dir() or (inside / "config.json").is_file():
        return None
    found = sorted(inside.glob("*.gguf"))
    if len(found) > 1:
        raise InputError(
            f"Expected one .gguf file in {str(folder)!r} for model.name_or_path, got "
            f"{', '.join(file.name for file in found)}; put the one that is meant into a folder of its own"
        )
    return found[0] if found else None


def converted(file: Path) -> Path:
    """Return a folder with the model and the tokenizer of a GGUF file, which is made where it is not there.

    Raises:
        InputError: if the file cannot be read, or the package `gguf` is not installed.
    """
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{sha256[:32]}-{FORMAT}"
    if not folder.is_dir():
        make_folder(folder.parent)
        convert(file, folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file in bfloat16, and its tokenizer, into a folder that does not exist.

    Raises:
        InputError: as `converted`.
    """
    if find_spec("gguf") is None:
        raise InputError(f"Expected the package gguf, which reads {file.name}, got none; pip install --no-deps gguf")
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # De-quantised in float32, which is exact, and rounded once.
        network: Any = cast(Any, AutoModelForCausalLM).from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # of a format with errors of its own
        raise InputError(
            f"Expected a GGUF file of a causal language model that transformers reads, got {file.name}: "
            f"{first_line(error)}"
        ) from error
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config  # the folder holds plain numbers
    network.hf_quantizer, network.is_quantized = None, False
    network = network.to(torch.bfloat16)
    with whole_folder(folder) as partial:
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
