"""What trains is the model as `runtime` says: its base in bfloat16, its frozen layers cached where there is room."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlr.models.peft_state import adapter_parameters
from fedlr.simulations.federation import Federation, assemble
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, rounds

CACHED = ("runtime.cache_prefix=true", "adapter.layers=[1]")
LOW = "runtime.base_dtype=bfloat16"


def assembled(*overrides: str) -> Federation:
    with torch_threads(1):
        return assemble(experiment(*overrides), seed=0)


def test_a_run_in_bfloat16_over_stored_states_trains_float32_and_is_found_again(tmp_path: Path) -> None:
    said: list[str] = []
    overrides = (*CACHED, LOW, f"runtime.cache_dir={tmp_path / 'cache'}")
    first = assembled(*overrides)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = assemble(experiment(*overrides, "method=ffa_lora"), seed=0, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files
    assert len(files) == 2 and str(tmp_path) in said[0]
    assert first.test.hidden.dtype == np.uint16
    assert np.array_equal(first.clients[0].table.hidden, again.clients[0].table.hidden)
    own = {id(parameter) for parameter in adapter_parameters(first.working).values()}
    assert {p.dtype for p in first.working.parameters() if id(p) not in own} == {torch.bfloat16}
    adapter, metrics, _ = rounds(first, tmp_path / "run")
    assert adapter != first.start.adapter.fingerprint()
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert {p.dtype for p in first.model.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter_parameters(first.working).values()} == {torch.float32}


def test_states_that_are_too_many_for_the_memory_go_to_a_file() -> None:
    kept, mapped = assembled(*CACHED), assembled(*CACHED, "runtime.memory_gb=1e-5")
    assert not isinstance(kept.test.hidden, np.memmap)
    assert isinstance(mapped.test.hidden, np.memmap)
    assert kept.test.hidden.tobytes() == mapped.test.hidden.tobytes()


def test_a_processor_that_is_slow_in_bfloat16_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert any("bfloat16" in note for note in assembled(LOW).notes)
    assert not any("bfloat16" in note for note in assembled().notes)
