"""A device that caches what the frozen layers give keeps features while only the head trains, and no longer.

Mutant killed: features that stay when an adapter is not zero, or a round trains more than the head.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_B, AdapterState
from fedlr.client.device import Device
from fedlr.client.trainee import only_head
from fedlr.flower.messages import Reply, Request
from fedlr.flower.terms import Terms
from fedlr.models.network import BaseModel, attach_lora, pretrained
from fedlr.models.peft_state import read_adapter
from fedlr.rounds.round import RoundRequest
from tests.client.device_files import LABELS, device_settings, terms_tree
from tests.families import save_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("bert", tmp_path_factory.mktemp("base") / "bert")


def model(folder: Path) -> BaseModel:
    return pretrained(name_or_path=str(folder), label_names=LABELS, seed=0, head_std=0, pooling="mean")


def asked(folder: Path, round_index: int, block: frozenset[str], *, far: bool = False) -> Request:
    base = model(folder)
    tree = terms_tree(
        {"model_sha256": base.fingerprint, "adapter.train_head": True, "adapter.layers": [1], "randomness": "seeded"}
    )
    terms = Terms.read(json.dumps(tree))
    adapter = read_adapter(attach_lora(base, terms.adapter, seed=0))
    if far:
        adapter = adapter.with_tensors({s: torch.ones_like(t) for s, t in adapter.tensors.items() if s.role == LORA_B})
    task = RoundRequest(round_index, adapter.select(block), block)
    return Request(terms, 0, task, adapter.fingerprint(), adapter.scale, adapter)


def test_a_device_keeps_features_while_only_the_head_trains(folder: Path, tmp_path: Path) -> None:
    section = {
        "_target_": "fedlr.models.network.pretrained",
        "name_or_path": str(folder),
        "head_std": 0,
        "pooling": "mean",
    }
    changes: dict[str, Any] = {"model": section, "policy__allowed_models": [model(folder).body_sha256]}
    changes |= {"privacy__randomness": "seeded", "policy__allow_seeded_randomness": True}
    sums = {}
    for cached in (True, False):
        where = tmp_path / f"cached {cached}"
        device = Device(
            device_settings(where, privacy__epsilon=1e4, runtime__cache_prefix=cached, **changes), say=lambda line: None
        )
        for number, block in enumerate((frozenset({HEAD}), frozenset({HEAD, LORA_B}))):
            reply = Reply.read(device.answer(asked(folder, number, block).record()))
            assert reply.facts.refused is None
            sums[cached, number] = reply.tensors
            assert device._trainee.features == (cached and number == 0)
        assert device.num_models_loaded == (2 if cached else 1)
    for number in range(2):
        for slot, tensor in sums[True, number].items():
            torch.testing.assert_close(tensor, sums[False, number][slot], rtol=1e-4, atol=1e-5)


def test_features_are_for_the_head_alone_on_adapters_that_are_zero(folder: Path) -> None:
    head = asked(folder, 0, frozenset({HEAD}))
    far = asked(folder, 0, frozenset({HEAD}), far=True)
    both = asked(folder, 0, frozenset({HEAD, LORA_B}))
    assert only_head(head.task, head.enrolled)
    assert not only_head(head.task, None)
    assert not only_head(far.task, far.enrolled)
    assert not only_head(both.task, both.enrolled)
    side = next(iter(far.enrolled.factors().items()))
    assert not only_head(head.task, AdapterState(head.enrolled.tensors, 1.0, side=dict([side])))
