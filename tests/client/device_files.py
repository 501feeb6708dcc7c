"""A device's folder as its owner would make it, with a tiny model and made-up rows; and sane terms to start from.

A device has labelled texts, unless its settings are changed by `LANGUAGE` or `PICTURES`, with the terms of the same
name.
"""

import copy
import csv
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, Slot
from fedlr.client.settings import Settings, load_settings
from fedlr.flower.node_key import create_node_key
from fedlr.flower.task_terms import reading_sha256
from fedlr.models.causal import tiny_random_causal
from fedlr.models.network import BaseModel, tiny_random
from fedlr.models.vision import tiny_vit
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.tasks.made_up_images import made_up_images
from fedlr.tasks.synthetic import synthetic_text
from fedlr.tasks.synthetic_chat import synthetic_chat

LABELS = ("negative", "positive")
MODEL = {"_target_": "tiny_random", "hidden_size": 16, "num_layers": 1}
PATH = "base_model.model.bert.encoder.layer.0.attention.self.query"
LANGUAGE_PATH = "base_model.model.model.layers.0.self_attn.q_proj"
PICTURE_PATH = "base_model.model.vit.layers.0.attention.q_proj"
SMALL = {"hidden_size": 16, "num_layers": 1}


@cache
def tiny(seed: int = 0) -> BaseModel:
    """Return the model of the settings; the body of this one alone depends on the seed."""
    return tiny_random(label_names=LABELS, seed=seed, hidden_size=16, num_layers=1)


@cache
def tiny_language_model() -> BaseModel:
    """Return the model of `LANGUAGE`."""
    return tiny_random_causal(seed=0, **SMALL)


@cache
def tiny_picture_model() -> BaseModel:
    """Return the model of `PICTURES`."""
    return tiny_vit(label_names=LABELS, seed=0, **SMALL)


LANGUAGE: Mapping[str, Any] = {
    "model": {"_target_": "tiny_random_causal", **SMALL},
    "data": {"_target_": "conversations", "path": "chats.jsonl", "format": "messages"},
    "policy__allowed_models": [tiny_language_model().body_sha256],
    "policy__allowed_tasks": ["causal_lm"],
}
PICTURES: Mapping[str, Any] = {
    "model": {"_target_": "tiny_vit", **SMALL},
    "data": {"_target_": "images", "path": "pictures", "labels": list(LABELS), "image_size": 16},
    "policy__allowed_models": [tiny_picture_model().body_sha256],
}


def language_task(**changes: Any) -> dict[str, Any]:
    """Return what terms say of a language model."""
    sha256 = reading_sha256(tiny_language_model(), has_turns=True)
    task = {"name": "causal_lm", "reading_sha256": sha256, "has_turns": True, "template": None, "max_response": None}
    return {**task, **changes}


def picture_task(**changes: Any) -> dict[str, Any]:
    """Return what terms say of pictures."""
    return {"name": "image_classification", "reading_sha256": reading_sha256(tiny_picture_model()), **changes}


def language_terms(changes: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Return changes that make sane terms those of a language model."""
    model = {"model_sha256": tiny_language_model().fingerprint, "adapter.target_modules": ["q_proj"]}
    return {**model, "label_names": ..., "task": language_task(), **(changes or {})}


def picture_terms(changes: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Return changes that make sane terms those of pictures."""
    model = {"model_sha256": tiny_picture_model().fingerprint, "adapter.target_modules": ["q_proj"]}
    return {**model, "task": picture_task(), "max_length": 1, **(changes or {})}


def write_chats(path: Path) -> None:
    """Write made-up conversations."""
    turns = [[{"role": t.role, "content": t.text} for t in row] for row in synthetic_chat(40, seed=0).turns]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns), encoding="utf-8")


def write_pictures(folder: Path, *, labels: tuple[str, str] = LABELS) -> None:
    """Write made-up pictures, in a folder for each label."""
    data = made_up_images(40, seed=0, num_labels=2)
    for number, (row, label) in enumerate(zip(data.rows, data.labels, strict=True)):
        (folder / labels[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.pixels[row]).save(folder / labels[label] / f"{number}.png")


def client_yaml(folder: Path, **changes: Any) -> Path:
    """Write client.yaml and the files it names; `changes` are sections or values, by dotted key with __ for a dot."""
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\n")
    if not (folder / "device.key").exists():
        create_node_key(folder / "device.key")
    data = synthetic_text(40, seed=0)
    with (folder / "letters.csv").open("w", newline="") as file:
        rows = zip(data.texts, (data.label_names[label] for label in data.labels), strict=True)
        csv.writer(file).writerows([("text", "label"), *rows])
    tree: dict[str, Any] = {
        "server": {"address": "127.0.0.1:1", "root_certificates": "ca.crt", "private_key": "device.key"},
        "name": "ward-3",
        "state_dir": "state",
        "dataset_id": "letters",
        "model": dict(MODEL),
        "data": {"_target_": "table", "path": "letters.csv", "labels": list(LABELS)},
        "privacy": {"epsilon": 6.0, "delta": 1e-5, "accountant": "rdp"},
        "policy": {"allowed_models": [tiny().body_sha256]},
    }
    for key, value in changes.items():
        changed(tree, key.replace("__", "."), value)
    if tree["data"].get("path") == "chats.jsonl":
        write_chats(folder / "chats.jsonl")
    if tree["data"].get("path") == "pictures":
        write_pictures(folder / "pictures")
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def device_settings(folder: Path, *, num_experiments: int = 0, **changes: Any) -> Settings:
    """Return the settings of a device that is ready: its state folder and its ledger are there."""
    settings = load_settings(client_yaml(folder, **changes))
    settings.state_dir.mkdir(mode=0o700, exist_ok=True)
    for number in range(num_experiments):
        (settings.experiments_dir / f"{number:032x}").mkdir(parents=True)
    budget, p = settings.budget(), settings.privacy
    if budget is not None and not settings.ledger_path.exists():
        name = settings.dataset_id
        PrivacyLedger.create(
            settings.ledger_path, budget, dataset_id=name, randomness=p.randomness, accountant=p.accountant
        )
    return settings


TERMS: Mapping[str, Any] = {
    "protocol": 1,
    "experiment_id": "0123456789abcdef" * 2,
    "name": "tiny",
    "num_rounds": 3,
    "seed": 0,
    "model_sha256": "",
    "label_names": list(LABELS),
    "max_length": 32,
    "adapter": {"system": "lora", "rank": 2, "lora_alpha": 2.0, "target_modules": ["query"]},
    "trainer": {
        "num_steps": 2,
        "sample_rate": 0.2,
        "divisor": 8.0,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
        "after_noise": None,
        "engine": "fused",
        "check_parity": False,
        "grad_sample_mode": "hooks",
        "token_budget": 1024,
    },
    "client_rule": None,
    "mechanism": {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.2, "divisor": 8.0, "delta": 1e-5},
    "randomness": "os",
}


def terms_tree(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return sane terms as plain values, with changes by dotted key."""
    tree = copy.deepcopy(dict(TERMS)) | {"model_sha256": tiny().fingerprint}
    for key, value in (changes or {}).items():
        changed(tree, key, value)
    return tree


def changed(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; the value `...` removes it."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if value is ...:
        del tree[last]
    else:
        tree[last] = dict(value) if isinstance(value, dict) else value


def enrolled(system: str = "lora", scale: float = 1.0, path: str = PATH) -> AdapterState:
    """Return the adapter of the sane terms, as a server sends it, or two blocks of another system."""
    if system != "lora":
        return AdapterState({Slot(PATH, f"{system}.lambda_{block}"): torch.ones(2) for block in "bd"}, scale)
    lora_A = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    return AdapterState({Slot(path, LORA_A): lora_A, Slot(path, LORA_B): torch.zeros(16, 2)}, scale)
