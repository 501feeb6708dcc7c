"""Nothing that a message holds is unpickled: an array of objects is refused, and what it would call is not called.

Mutant this file kills: numbers read by numpy with `allow_pickle=True`; `tests/test_house_rules.py` finds its text.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.flower import records as wire


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def nothing_is_unpickled(canary: Path) -> None:
    """The check that the mutant fails."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    for data, dtype, shape in ((file.getvalue(), "float32", (1,)), (file.getvalue(), "object", (1,))):
        record = wire.to_record({Slot("layer", "lora_A"): torch.ones(1)})
        record[wire.ARRAYS] = ArrayRecord({"float32": Array(dtype, shape, "numpy.ndarray", data)})
        with pytest.raises(InputError):
            wire.from_record(record)
    assert not canary.exists()


def test_nothing_in_a_record_is_unpickled(tmp_path: Path) -> None:
    nothing_is_unpickled(tmp_path / "canary")


def test_a_reader_that_unpickles_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(array: Array, dtype: str) -> np.ndarray:
        return np.lib.format.read_array(io.BytesIO(array.data), allow_pickle=True)

    monkeypatch.setattr(wire, "_numbers", numbers)
    with pytest.raises(AssertionError):
        nothing_is_unpickled(tmp_path / "canary")
