"""The adapter of an earlier run as the start of this one: read from its folder, checked, and nothing of it is run.

The folder is untrusted. Its model card says which base, labels and tensors it is of, and what it cost in privacy; all
but the last is compared with what is here. A start is not free for whoever was in the earlier run: the released adapter
is a function of both, so for a row that both read the epsilons add up (Dwork and Roth 2014, theorem 3.16), and the
statement says so (`fedlr.privacy.earlier`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, Slot
from fedlr.errors import InputError
from fedlr.errors.messages import one_line, shown
from fedlr.models.export import labels_text
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import LAYOUT, read_adapter
from fedlr.privacy.earlier import earlier_run

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LARGEST_TEXT = 4_000_000  # bytes of a card or a configuration
KEY = "adapter.start_from"
BASE = re.compile(r"Base tensors: SHA-256 `([0-9a-f]{64})`")
TENSORS = re.compile(r"Adapter tensors: SHA-256 `([0-9a-f]{64})`")
STATEMENT = re.compile(r"^```json\n(.*?)\n```", re.DOTALL | re.MULTILINE)


def read_start(folder: Path, base: BaseModel, model: AdaptedModel) -> tuple[AdapterState, dict[str, Any]]:
    """Return the adapter in a folder that `fedlr` exported, and what its card says of the privacy of its run.

    Args:
        folder: with the weights, the configuration of PEFT and the model card.
        base: the model of this run.
        model: it with its adapter, whose tensors the folder must have; not changed.

    Raises:
        InputError: a file is missing or broken, or the adapter is of another base, of other labels, layers, ranks or
            scale; the message names what differs.
    """
    if hasattr(model, LAYOUT):
        raise InputError(f"Expected adapter=lora with {KEY}, got another system, whose start is not read from a folder")
    drawn, card = read_adapter(model), _text(folder / CARD)
    _check_card(folder, card, base, model)
    _check_scale(folder, drawn.scale)
    adapter = AdapterState(_tensors(folder / WEIGHTS, drawn.tensors), drawn.scale)
    stated = TENSORS.search(card)
    if stated is None or stated[1] != adapter.fingerprint():
        raise InputError(
            f"Expected the adapter of its model card in {KEY}={str(folder)!r}, got other tensors: a file was changed, "
            "or the folder also has what the run folded into its base, which no start can be"
        )
    return adapter, _earlier(folder, card, stated[1])


def _check_card(folder: Path, card: str, base: BaseModel, model: AdaptedModel) -> None:
    found, labels = BASE.search(card), labels_text(model).strip()
    if found is None:
        raise InputError(
            f"Expected a model card of fedlr in {folder / CARD}, got another: without it nobody knows which base model "
            "the adapter is of, and what it cost in privacy"
        )
    if found[1] != base.fingerprint:
        raise InputError(
            f"Expected an adapter of this run's base model, SHA-256 {base.fingerprint:.12}, in {KEY}={str(folder)!r}, "
            f"got one of {found[1]:.12}: take model, pooling, labels and, of what is drawn, seed of the earlier run"
        )
    if base.task_type != "CAUSAL_LM" and labels not in card:
        told = re.search(r"^Labels: .*?\. ", card, re.MULTILINE)
        raise InputError(
            f"Expected an adapter of these labels in {KEY}={str(folder)!r}: {labels!r}; got "
            f"{shown(told[0].strip()) if told else 'none'}: name them in the earlier run's order in data.labels"
        )


def _check_scale(folder: Path, scale: float) -> None:
    path = folder / CONFIG
    try:
        config = json.loads(_text(path))
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
        found = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        is_plain = config["peft_type"] == "LORA" and not config.get("alpha_pattern") and not config.get("use_dora")
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise InputError(
            f"Expected the configuration of a LoRA adapter in {path}, got {one_line(error)[:80]}"
        ) from error
    if not is_plain:
        raise InputError(f"Expected plain LoRA of one scale for all layers in {path}, got another adapter")
    if abs(found - scale) > 1e-9 * scale:
        raise InputError(
            f"Expected the scale lora_alpha / rank = {scale:g} of this run's adapter in {KEY}={str(folder)!r}, got "
            f"{found:g}; set adapter.rank={rank} and adapter.lora_alpha={alpha:g}"
        )


def _tensors(path: Path, expected: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Return the tensors by slot; names, shapes and types are compared before anything is loaded."""
    names = {_name(slot): slot for slot in expected}
    wanted = {name: tuple(expected[slot].shape) for name, slot in names.items()}
    tensors: dict[Slot, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            if found == wanted:
                tensors = {slot: file.get_tensor(name) for name, slot in names.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"Expected the tensors of an adapter in {path}, got {one_line(error)[:120]}") from error
    if found != wanted:
        raise InputError(_difference(path, found, wanted))
    for slot, tensor in tensors.items():
        if tensor.dtype != expected[slot].dtype or not tensor.isfinite().all():
            raise InputError(
                f"Expected finite numbers of {expected[slot].dtype} in {path}, got others in {_name(slot)[:80]}"
            )
    return tensors


def _difference(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    name = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))[0]
    shape = found.get(name, "none")
    return (
        f"Expected the tensors of this run's adapter in {path}, got {name[:100]} of shape {shape} where "
        f"this run has {wanted.get(name, 'none')}: take adapter.rank, adapter.layers, adapter.target_modules and "
        "adapter.train_head of the earlier run"
    )


def _name(slot: Slot) -> str:
    return f"{slot.path}.{slot.role}.weight" if slot.role in (LORA_A, LORA_B) else slot.path


def _earlier(folder: Path, card: str, sha256: str) -> dict[str, Any]:
    try:
        statement = json.loads(STATEMENT.findall(card)[-1])
        if "client_unit" in statement:
            raise ValueError("epsilons of two units, of which neither can be counted on here")
        return {"folder": str(folder), "adapter_sha256": sha256, **earlier_run(statement)}
    except (IndexError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"Expected the privacy statement of the earlier run in {folder / CARD}, got {one_line(error)[:80]}"
        ) from error


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"Expected at most {LARGEST_TEXT:,} bytes in {path}, got {path.stat().st_size:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        if (path.parent / "adapter").is_dir():
            raise InputError(
                f"Expected the adapter folder of an earlier run, got the run: set {KEY}={path.parent}/adapter"
            ) from error
        raise InputError(
            f"Expected the adapter folder of an earlier run in {KEY}, RUN_DIR/adapter, got {str(path.parent)!r} "
            f"without a readable {path.name} ({one_line(error)[:80]})"
        ) from error
