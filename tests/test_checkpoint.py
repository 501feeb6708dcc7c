"""Checkpoints: the whole state comes back to the bit; a damaged one is seen, said, and the one before it is used."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.rounds.round import ServerState
from fedlr.runs.checkpoint import checkpoint_path, checkpoint_rounds, latest_checkpoint, save_checkpoint
from fedlr.runs.verified_folder import Corrupt

MORE = {"personal": {Slot("3 layer.0", LORA_A): torch.tensor([0.1, float("nan")]).bfloat16()}}


def state(round_index: int) -> ServerState:
    """A state of a round, with factors of two dtypes, a head, a side of rank 0 too, and two memories, one empty."""
    generator = torch.Generator().manual_seed(round_index)
    normal = torch.randn(2, 6, generator=generator)
    tensors = {
        Slot("layer.1", LORA_B): normal.T.bfloat16(),
        Slot("layer.1", LORA_A): normal,
        Slot("h", HEAD): normal[0],
    }
    side = {
        "layer.1": LoraFactors(normal.double(), normal.double().T),
        "layer.0": LoraFactors(normal[:0], normal[:0].T),
    }
    memory: dict[str, dict[Slot, Tensor]] = {"server Adam/v": {Slot("layer.1", LORA_A): normal.exp()}, "control": {}}
    return ServerState(AdapterState(tensors, 0.1 + 0.2, side=side, memory=memory), round_index)


def bits(tensors: Mapping[Slot, Tensor]) -> list[object]:
    """Everything of tensors that can be compared, in order."""
    return [
        (slot, t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist() if t.numel() else [])
        for slot, t in tensors.items()
    ]


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = state(7)
    assert save_checkpoint(tmp_path / "new" / "folder", saved, {"seed": 2**32 - 1}, more=MORE).name == "round-00007"
    found = latest_checkpoint(tmp_path / "new" / "folder", say=pytest.fail)
    assert found is not None and found.facts == {"seed": 2**32 - 1} and found.state.round_index == 7
    one, other = saved.adapter, found.state.adapter
    assert other.scale == one.scale and other.fingerprint() == one.fingerprint()
    assert bits(other.tensors) == bits(one.tensors) and bits(found.more["personal"]) == bits(MORE["personal"])
    assert list(other.memory) == list(one.memory) and set(other.side) == set(one.side)
    for name, slots in one.memory.items():
        assert bits(other.memory[name]) == bits(slots)
    for path, layer in one.side.items():
        assert other.side[path].lora_A.equal(layer.lora_A) and other.side[path].lora_B.equal(layer.lora_B)
        assert other.side[path].lora_B.dtype == layer.lora_B.dtype


def test_the_last_three_are_kept_and_an_abandoned_future_is_not(tmp_path: Path) -> None:
    for round_index in (0, 1, 2, 5, 12, 11):  # 11 after 12: a run that went back
        save_checkpoint(tmp_path, state(round_index), {})
    assert checkpoint_rounds(tmp_path) == [2, 5, 11]
    assert latest_checkpoint(tmp_path / "none", say=pytest.fail) is None


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    for round_index in (1, 2, 3):
        save_checkpoint(tmp_path, state(round_index), {})
    for round_index, left in ((3, 2), (2, 1)):
        path = checkpoint_path(tmp_path, round_index) / "adapter.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        said: list[str] = []
        found = latest_checkpoint(tmp_path, say=said.append)
        assert found is not None and found.state.round_index == left
        assert (
            f"round-{round_index:05d}/adapter.safetensors" in said[-2 if left == 2 else 1]
            and f"round {left}" in said[-1]
        )
    (checkpoint_path(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(Corrupt, match=r"3 damaged ones; the newest.*round-00003"):
        latest_checkpoint(tmp_path, say=said.append)


def test_a_checkpoint_of_another_version_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(1), {})
    monkeypatch.setattr("fedlr.runs.verified_folder.VERSION", 2)
    with pytest.raises(InputError, match="Expected version 2") as error:
        latest_checkpoint(tmp_path, say=pytest.fail)
    assert not isinstance(error.value, Corrupt)
