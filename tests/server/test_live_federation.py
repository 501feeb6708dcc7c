"""A federation of processes has the simulation's numbers."""

from pathlib import Path

import pytest

from simulations.federation_command import LARGEST_DIFFERENCE, adapter_difference
from tests.server.live import charges, rehearsed, simulated


@pytest.mark.timeout(600)
def test_three_runtimes_are_one_experiment(tmp_path: Path) -> None:
    words = ("num_rounds=3",)
    in_process = simulated(tmp_path / "local", *words)
    with_flower = simulated(tmp_path / "flower", *words, "runtime=flower")
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        rehearsal.watch(timeout_s=240)
        for other in (with_flower, rehearsal.run_dir):
            assert adapter_difference(in_process / "adapter", other / "adapter") <= LARGEST_DIFFERENCE
        assert charges(rehearsal) == [3, 3, 3]
        logs = [(rehearsal.logs / f"client-{client}.log").read_text() for client in range(3)]
        assert [log.count("base model") for log in logs] == [1, 1, 1], "loaded once a device"
